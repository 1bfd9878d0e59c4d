"""PEFT's LoRA layers in a fused call: what they hold is read again at every call.

| layer | in a fused call |
|---|---|
| one adapter active | base weight and bias are read, and A, B and the scaling as an Adapter |
| merged, or disabled, or without the active adapter | base weight and bias are read |
| with a bias of the adapter (lora_bias) | scaling times it is added to the base's bias |
| whatever `refusal` names | called, as projections of other libraries are |

Nothing is copied or cached, so switching, merging, saving and loading are PEFT's own. An adapter of
another dtype than x, as PEFT's float32 ones on a bfloat16 base, is cast to x's for the products.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..check.lora import RANKS
from ..layers.parts.around import bare
from ..layers.parts.block import passes_through
from ..packing import Packed, halves
from ..reference.lora import Adapter, Lora
from .around import stands_around
from .projection import called, full_name, read

_HOME = "peft.tuners.lora.layer"


class Part(NamedTuple):
    """What a fused call reads of a projection: weight (out, in), bias and adapter."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None


def _is_layer(module: nn.Module) -> bool:
    """Whether its forward is that of PEFT's Linear, which nobody has replaced."""
    kind = type(module)
    if kind.__module__ != _HOME or kind.__name__ != "Linear":
        return False
    forward: Any = kind.forward
    return bool(forward.__code__.co_filename == sys.modules[_HOME].__file__)


def base_of(module: Any) -> nn.Module:
    """What a fused call reads the weight and bias of, where it reads a projection: the base of a
    LoRA layer, which it may read in one state and not in another."""
    base: nn.Module = module.base_layer if _is_layer(module) else module
    return base


def wraps_parameter(module: nn.Module) -> bool:
    """Whether it is PEFT's wrapper of a module, to one parameter of which it adds s B A for the
    length of a call (target_parameters)."""
    kind = type(module)
    return kind.__module__ == _HOME and kind.__name__ == "ParamWrapper"


def wrappers_of(module: Any) -> tuple[nn.Module, list[Any]]:
    """What stands in PEFT's wrappers of parameters, and those, the outermost first."""
    found = []
    while wraps_parameter(module):
        found.append(module)
        module = module.base_layer
    return module, found


def beneath(module: Any) -> Any:
    """What stands in them, or `module` itself."""
    return wrappers_of(module)[0]


def active(module: Any) -> list[str]:
    """Names of the adapters that it has and that are neither merged nor off."""
    if module._disable_adapters or module.merged_adapters:
        return []
    names = module._active_adapter
    names = [names] if isinstance(names, str) else names
    return [name for name in names if name in module.lora_A]


def refusal(module: Any) -> str | None:
    """Why a fused call must call `module`; None where it reads what the module holds."""
    if not _is_layer(module):
        return called(module)
    why = _state(module)
    return why and f"is a {full_name(type(module))} {why}"


def _state(module: Any) -> str | None:
    if read(module.base_layer) is None and bare(module):
        return f"whose base {called(module.base_layer)}"
    return beside(module)


def beside(module: Any) -> str | None:
    """Why the adapter of a LoRA layer cannot be read beside its base, whatever that is."""
    if not bare(module):
        return f"that {stands_around(module)}"
    if module._disable_adapters and module.merged_adapters:
        return "that is merged and disabled, which its next call unmerges"
    names = active(module)
    if len(names) > 1:
        return f"with {len(names)} adapters active at once ({', '.join(names)})"
    return _of_adapter(module, names[0]) if names else None


def _of_adapter(module: Any, name: str) -> str | None:
    if name in module.lora_variant:
        kind = type(module.lora_variant[name]).__name__
        return f"whose adapter {name!r} is a {kind}, not W + s B A"
    if not passes_through(dropout := module.lora_dropout[name]) or not bare(dropout):
        p = getattr(dropout, "p", None)
        return (
            f"whose lora_dropout {p} is at work"
            if bare(dropout)
            else "whose lora_dropout has hooks"
        )
    a, b = module.lora_A[name], module.lora_B[name]
    if (first := read(a)) is None or read(b) is None or first[1] is not None:
        return f"whose adapter {name!r} is not of two plain nn.Linears"
    if not RANKS[0] <= first[0].shape[0] <= RANKS[-1]:
        return f"whose rank {first[0].shape[0]} is not from {RANKS[0]} to {RANKS[-1]}"
    if not isinstance(module.scaling[name], (int, float)):
        return f"whose scaling is a {type(module.scaling[name]).__name__}, not a number"
    return None


def part(module: Any, x: Tensor) -> Part | None:
    """What a fused call reads of a projection; None where it must be called."""
    if (plain := read(module)) is not None:
        return Part(*plain, None)
    if refusal(module) is not None:
        return None
    weight, bias = read(module.base_layer)  # type: ignore[misc]
    return Part(weight, *adapter_of(module, bias, x))


def adapter_of(module: Any, bias: Tensor | None, x: Tensor) -> tuple[Tensor | None, Adapter | None]:
    """The base's bias with that of the adapter, and the adapter, where `beside` has no reason."""
    names = active(module)
    if not names:
        return bias, None
    (name,) = names
    scale = module.scaling[name]
    (a, _), (b, extra) = read(module.lora_A[name]), read(module.lora_B[name])  # type: ignore[misc]
    if extra is not None:
        extra = scale * extra
        bias = extra.to(x.dtype) if bias is None else (bias + extra).to(bias.dtype)
    return bias, Adapter(a.to(x.dtype), b.to(x.dtype), scale)


def lora_of(first: list[Part], down: Part, packed: Packed | None) -> Lora | None:
    """The adapters of a block; that of a packed projection is one A under both halves of B."""
    if all(p.adapter is None for p in (*first, down)):
        return None
    up = first[-1].adapter
    gate = first[0].adapter if len(first) == 2 else None
    if packed and up is not None:
        a, b, scale = up
        gate, up = (Adapter(a, half.t(), scale) for half in halves(b.t(), packed))
    return Lora(gate, up, down.adapter)


def describe(paths: dict[str, nn.Module]) -> str:
    """The adapters that a fused call reads, for the report: "" where there are none."""
    words = []
    for path, module in paths.items():
        if not _is_layer(module):
            continue
        layer: Any = module
        weight = read(layer.base_layer)
        for name in active(layer):
            own = layer.lora_A[name].weight
            word = f"{path} {name!r} of rank {own.shape[0]}"
            if weight is not None and own.dtype != weight[0].dtype:
                word += f" ({str(own.dtype)[6:]}, multiplied in x's dtype)"
            words.append(word)
    return f"LoRA inside: {', '.join(words)}" if words else ""
