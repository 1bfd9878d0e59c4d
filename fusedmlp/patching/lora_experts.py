"""PEFT's adapters of stacked experts (target_parameters), read by moe_mlp and not added to weights.

PEFT wraps such experts once for each adapted parameter. A wrapper puts torch's parametrization
around its parameter for the length of a call, by a method of its own, and so forms W + s B A of all
experts twice: for a check of torch's, and where it is read. `attach` has that method of a wrapper
around patched experts hand s, B and A to them instead. All else of the wrapper is PEFT's: what is
active, merged or disabled, its hooks and its errors.

Where a wrapper came after patch() or has another reason (`refusal`), its parametrization is there.
Of one that holds s, B and A the weight beneath is read, and any other is what it computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..check.lora import RANKS
from ..layers.parts.around import bare
from ..packing import halves
from ..reference.lora import Adapter, Lora
from .around import stands_around
from .form import Form, form_of
from .lora import active
from .projection import local

_METHOD, _FACTORS = "_activate_lora", "get_delta_factors"  # of PEFT's ParamWrapper
_PROXY = ("peft.tuners.lora.layer", "_LoraFactorsProxy")


class Factors(NamedTuple):
    """scale * lhs @ rhs, which is added to a stacked weight as it is stored."""

    lhs: Tensor
    rhs: Tensor
    scale: float


def attach(wrapper: nn.Module) -> bool:
    """Whether it was not attached before and is now."""
    if _METHOD in vars(wrapper):
        return False
    vars(wrapper)[_METHOD] = functools.partial(_activate, wrapper)
    return True


def detach(wrapper: nn.Module) -> None:
    vars(wrapper).pop(_METHOD, None)


def _activate(wrapper: Any, names: list[str]) -> AbstractContextManager[None]:
    if refusal(wrapper) is not None:
        own: AbstractContextManager[None] = getattr(type(wrapper), _METHOD)(wrapper, names)
        return own
    return _beside(wrapper)


@contextmanager
def _beside(wrapper: Any) -> Iterator[None]:
    experts, key = wrapper.get_base_layer(), wrapper.parameter_name
    experts._adapters[key] = factors_of(wrapper)
    try:
        yield
    finally:
        unread = experts._adapters.pop(key, None) is not None
    if unread:
        raise TypeError(
            f"patched {type(experts).__name__}: its forward must be that of patch(), which reads "
            f"adapters of {key}, got another; unpatch(model) first"
        )


def refusal(wrapper: Any) -> str | None:
    """Why PEFT adds the adapters of a wrapper to the weight; None where moe_mlp takes them."""
    experts = wrapper.get_base_layer()
    if not active(wrapper):
        return "none is active"
    if _METHOD not in vars(wrapper):
        return "it was wrapped after patch(), and patch(model) once more attaches it"
    if "_adapters" not in vars(experts):
        return "its experts are not patched"
    if experts._split is not None:
        return "its experts are spread over ranks"
    form = form_of(experts)
    return form if isinstance(form, str) else unread(wrapper, form)


def unread(wrapper: Any, form: Form) -> str | None:
    """Why s, B and A of its one active adapter are not an Adapter of moe_mlp."""
    if missing := [m for m in (_METHOD, _FACTORS) if not hasattr(type(wrapper), m)]:
        return f"this version of PEFT has no {missing[0]}()"
    names = active(wrapper)
    if len(names) > 1:
        return f"{len(names)} adapters are active at once ({', '.join(names)})"
    if wrapper.parameter_name not in form.names()[:2]:
        return f"{wrapper.parameter_name} is no stacked weight"
    if wrapper.num_experts == 1:
        return "there is one expert, whose adapter PEFT holds as a matrix"
    for name in names:
        if wrapper.r[name] not in RANKS:
            return f"its rank {wrapper.r[name]} is not from {RANKS[0]} to {RANKS[-1]}"
        if not isinstance(scale := wrapper.scaling[name], (int, float)):
            return f"its scaling is a {type(scale).__name__}, not a number"
    return None


def factors_of(wrapper: Any) -> Factors | None:
    """Those of its active adapter, where `unread` has no reason."""
    return next((Factors(*wrapper.get_delta_factors(name)) for name in active(wrapper)), None)


def block_refusal(wrapper: Any, form: Form) -> str | None:
    """Why a block around the experts, which reads what they hold, must call them."""
    if not bare(wrapper):
        return f"a wrapper of PEFT around its experts {stands_around(wrapper)}"
    if wrapper._disable_adapters and wrapper.merged_adapters:
        return "adapters of its experts are merged and disabled, which the next call unmerges"
    why = unread(wrapper, form)
    return why and f"PEFT adds LoRA to {wrapper.parameter_name} before each call, as {why}"


def described(wrappers: list[Any], refusal: Callable[[Any], str | None] = refusal) -> str:
    """For the report: which adapters are read, and which are added, and why."""
    inside, added = [], []
    for wrapper in wrappers:
        if not (names := active(wrapper)):
            continue
        ranks = " and ".join(f"{name!r} of rank {wrapper.r[name]}" for name in names)
        if why := refusal(wrapper):
            added.append(f"{ranks} to {wrapper.parameter_name} before each call, as {why}")
        else:
            inside.append(f"{wrapper.parameter_name} {ranks}")
    words = [f"LoRA inside: {', '.join(inside)}"] if inside else []
    words += [f"PEFT adds LoRA {', '.join(added)}"] if added else []
    return "; ".join(words)


def taken(experts: Any, name: str) -> tuple[Tensor, Factors | None]:
    """A weight of the experts without what an adapter adds to it, and that."""
    own = vars(experts)
    given = own.get("_adapters", {}).pop(name, None)
    around = own["_modules"].get("parametrizations", {})
    if name in around and len(around[name]) == 1 and own.get("_split") is None:
        proxy = around[name][0]
        if (type(proxy).__module__, type(proxy).__name__) == _PROXY:
            return around[name].original, Factors(proxy.lhs, proxy.rhs, proxy.scaling)
    return getattr(experts, name), given


def lora_of(first: Factors | None, down: Factors | None, form: Form) -> Lora | None:
    """The adapters of moe_mlp; that of a packed weight is one a under both halves of b."""
    if first is None and down is None:
        return None
    gate, last = _adapter(first, form), _adapter(down, form)
    if gate is None or not form.packed:
        return Lora(gate=gate, down=last)
    gate, up = (Adapter(gate.a, half, gate.scale) for half in halves(gate.b, form.packed, 1))
    return Lora(gate, up, last)


def _adapter(factors: Factors | None, form: Form) -> Adapter | None:
    """PEFT stores B with its experts last, where no kernel reads a row at once: B is copied."""
    if factors is None:
        return None
    lhs, rhs, scale = factors
    b, a = (rhs.mT, lhs.mT) if form.transposed else (lhs, rhs)
    return Adapter(local(a).contiguous(), local(b).contiguous(), scale)
