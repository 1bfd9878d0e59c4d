"""How the experts of a module of transformers lie and what they compute, or why no moe_mlp does.

Experts are a module with E weights in one parameter each, gate and up together, and a method
`_apply_gate` between them, called with x, each token's experts and their weights. transformers'
`use_experts_implementation` says of those in its table whether they are transposed, have biases and
have a gate; of others (Step 3) it is read off the shapes. What is found is then shown to be so: the
module's own forward is run on a few small values and compared.
"""

from __future__ import annotations

import inspect
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import reference
from ..packing import Packed
from .activation import name_by_values
from .dense import local
from .gate import Gate, InFloat64, gate_of

_SETTINGS = {bool, int, float, str, FunctionType, BuiltinFunctionType, MethodType}


class Form(NamedTuple):
    """first: the parameter of gate and up, or of up alone. packed: how gate and up lie in it, None
    for plain experts. transposed: whether weights are (E, in, out)."""

    first: str
    activation: str
    packed: Packed | None
    transposed: bool
    bias: bool

    def tensors(
        self, experts: Any, weights: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(first weight, down weight, first bias, down bias), the weights as (E, out, in); this
        rank's part of them. weights: as they are stored, in the place of the module's."""
        names = self.names()[len(weights or ()) :]
        held = (*(weights or ()), *(getattr(experts, name) for name in names))
        w, w_down, *biases = map(local, held)
        if self.transposed:
            w, w_down = w.mT, w_down.mT
        return (w, w_down, *biases) if self.bias else (w, w_down, None, None)

    def names(self) -> tuple[str, ...]:
        weights = (self.first, "down_proj")
        return (*weights, *(f"{name}_bias" for name in weights)) if self.bias else weights


def decorated(module: Any) -> bool:
    """Whether transformers' use_experts_implementation has been at its class, in any release."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def is_experts(module: Any) -> bool:
    """Whether it holds experts as those of transformers' table do, in the table or not."""
    if decorated(module):
        return True
    w = [getattr(module, name, None) for name in _BOTH]
    stacked = all(isinstance(t, nn.Parameter) and t.dim() == 3 for t in w)
    return stacked and hasattr(module, "_apply_gate")


_BOTH = ("gate_up_proj", "down_proj")
# A module's settings when it was looked at, and what was found.
_FORMS: WeakKeyDictionary[nn.Module, tuple[list[Any], Form | str]] = WeakKeyDictionary()


def form_of(experts: nn.Module) -> Form | str:
    """The form of `experts`, or why it has none. Looked for once, and again when a number, a flag,
    a function or the class of a module in it is another."""
    settings = settings_of(experts)
    known = _FORMS.get(experts)
    if known is None or known[0] != settings:
        known = _FORMS[experts] = (settings, _form_of(experts))
    return known[1]


# torch.compile takes the result for a constant, as it takes a number in a module for one.
form_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


# By torch's parametrizations PEFT adapts stacked weights for the length of a call: weights are then
# what they compute, and the class is a new one at each call.
_PARAMETRIZED = "parametrizations"


def own_type(module: nn.Module) -> type:
    """Its class, without what torch's parametrizations made of it."""
    kind = type(module)
    return kind.__bases__[0] if _PARAMETRIZED in vars(module)["_modules"] else kind


def settings_of(module: nn.Module) -> list[Any]:
    """What tells one module of a class from another, but for its tensors and its mode."""
    # Asked on every call.
    own = vars(module)
    kept = [v for name, v in own.items() if type(v) in _SETTINGS and name != "training"]
    found = [own_type(module), *kept]
    for name, inner in own["_modules"].items():
        if inner is not None and name != _PARAMETRIZED:
            found += settings_of(inner)
    return found


def _form_of(experts: Any) -> Form | str:
    kind = type(experts).__name__
    if getattr(experts, "has_post_expert_norm", False):
        return f"{kind} has a norm after each expert, which no kernel has"
    gated = getattr(experts, "has_gate", True)
    first = _BOTH[0] if gated else "up_proj"
    w, w_down = (getattr(experts, name, None) for name in (first, "down_proj"))
    if not (isinstance(w, Tensor) and isinstance(w_down, Tensor) and w.dim() == w_down.dim() == 3):
        return f"{kind} holds no {first} and down_proj of E experts: quantised or of another form"
    gate = gate_of(experts, "_apply_gate") if gated else _plain(experts)
    if isinstance(gate, str):
        return f"{kind}: {gate}"
    transposed = getattr(experts, "is_transposed", w.shape[1] == w_down.shape[2])
    bias = getattr(experts, "has_bias", False)
    form = Form(first, gate.activation, gate.packed, transposed, bias)
    return form if _agrees(experts, form) else f"{kind}: its forward is not that of experts so laid"


def _plain(experts: Any) -> Gate | str:
    act = getattr(experts, "act_fn", None)
    name = None if act is None else name_by_values(act)
    what = f"{type(act).__name__} is no activation that has a kernel"
    return what if name is None else Gate(name, None)


def _agrees(experts: Any, form: Form) -> bool:
    """Whether the module's own forward, at a width of 4 and a hidden width of 3, gives what `form`
    says, in float64."""
    generator = torch.Generator().manual_seed(0)
    like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    draw = lambda *size: 3 * torch.randn(size, generator=generator, **like)  # noqa: E731
    E, D, H, T, k = getattr(experts, form.first).shape[0], 4, 3, 5, 2
    own: Any = own_type(experts)
    small = own.__new__(own)
    modules = {k: m for k, m in vars(experts)["_modules"].items() if k != _PARAMETRIZED}
    parameters = dict(vars(experts)["_parameters"])
    vars(small).update(vars(experts), _modules=modules, _parameters=parameters)
    sizes = {form.first: (2 * H if form.packed else H, D), "down_proj": (D, H)}
    for name, size in sizes.items():
        w = draw(E, *(size[::-1] if form.transposed else size))
        small._parameters[name] = nn.Parameter(w)
        if form.bias:
            b = nn.Parameter(draw(E, size[0]))
            small._parameters[f"{name}_bias"] = b
    x, weights = draw(T, D), draw(T, k)
    index = torch.randint(E, (T, k), generator=generator, device="cpu")
    forward = inspect.unwrap(getattr(own, "_own_class", own).forward)
    w, w_down, b_first, b_down = form.tensors(small)
    routing = reference.route_to(index, weights, E)
    try:
        with torch.no_grad(), InFloat64():
            y = forward(small, x, index, weights)
            expected = reference.moe_mlp(
                x, routing, w, None, w_down, b_first, None, b_down, form.activation, form.packed
            )
    except Exception:  # whatever it is, it does not take what experts take
        return False
    return isinstance(y, Tensor) and y.shape == (T, D) and torch.allclose(y, expected, rtol=1e-9)
