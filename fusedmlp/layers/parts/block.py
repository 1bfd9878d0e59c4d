"""What the dense layers share: the choice between one fused call and two, and argument checks.

A block is one call, `gated_mlp` or `mlp`, as long as nothing stands between its two projections.
Active dropout does, so the block is then the first projection with its activation fused, dropout,
and F.linear. A module that something stands around (around.py) is called, and so are the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ...check.layer import check_x
from ...check.numbers import number
from ...ops.gated_act import gated_act
from ...ops.gated_linear import gated_linear
from ...ops.gated_mlp import gated_mlp
from ...ops.linear_act import linear_act
from ...ops.mlp import mlp
from ...packing import Packed
from ...reference.activations import resolve
from .around import bare

# Exact types: a subclass may do something in eval, or at p = 0.
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def positive_int(owner: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {value}")


def probability(owner: str, name: str, value: float) -> None:
    number(owner, name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{owner}: {name} must be in [0.0,1.0), got {value}")


def build_norm(owner: str, norm_layer: Callable[[int], nn.Module], width: int) -> nn.Module:
    """norm_layer(width). Raises TypeError for anything else than a callable that makes a module."""
    expected = f"{owner}: norm_layer must be a callable that makes an nn.Module from its width"
    if isinstance(norm_layer, nn.Module) or not callable(norm_layer):
        raise TypeError(f"{expected}, got {norm_layer!r}")
    made = norm_layer(width)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{expected}, got {norm_layer!r}, which made {made!r}")
    return made


def reset_others(owner: nn.Module) -> None:
    """Reset what `owner` holds beside its nn.Linears: a norm, an activation, a dropout module."""
    for module in owner.modules():
        if not isinstance(module, nn.Linear):
            _reset(owner, module)


def reset_tree(owner: nn.Module, module: nn.Module) -> None:
    """Initialise a module that `owner` was given, by its own methods."""
    if callable(initialise := getattr(module, "init_weights_", None)):
        initialise()
        return
    _reset(owner, module)
    for child in module.children():
        reset_tree(owner, child)


def _reset(owner: nn.Module, module: nn.Module) -> None:
    if not (module._parameters or module._buffers):
        return
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise TypeError(
            f"{type(owner).__name__}: {type(module).__name__} must have reset_parameters() to "
            "be initialised, got a module without"
        )
    reset()


def affine(owner: nn.Module, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an nn.Linear. What a replacement adds to them would be lost: refused."""
    if (kind := type(linear)).forward is not nn.Linear.forward:
        raise TypeError(
            f"{type(owner).__name__}: every projection must be an nn.Linear, whose parameters are "
            f"read without calling it, got {kind.__module__}.{kind.__name__}; merge adapters first"
        )
    return linear.weight, linear.bias  # type: ignore[return-value]


def check_input(owner: str, x: Tensor, *modules: nn.Module | None) -> None:
    """check_x against the nn.Linear among `modules`, which x reaches in its own width and dtype.

    Exact type: a subclass may hold another dtype than it takes, or compute its weight on access.
    """
    for module in modules:
        if type(module) is nn.Linear:
            weight = module.weight
            check_x(owner, x, weight.shape[-1], weight.dtype)
            return


def passes_through(dropout: nn.Module | None) -> bool:
    """Whether calling `dropout` now would return its input unchanged."""
    if dropout is None or type(dropout) is nn.Identity:
        return True
    return type(dropout) in DROPOUTS and (not dropout.training or bool(dropout.p == 0))


def block_path(dropout: nn.Module | None, *, activation: str, gated: bool) -> str:
    """For explain(): what gated_block, or plain_block, runs now."""
    whole, first = ("gated_mlp", "gated_linear") if gated else ("mlp", "linear_act")
    return calls(dropout, whole, first, repr(activation))


def calls(dropout: nn.Module | None, whole: str, first: str, what: str) -> str:
    """One call of `whole`, or what stands for it around a dropout at work."""
    if passes_through(dropout):
        return f"one {whole}, {what}"
    return f"{first}, {what}, then {type(dropout).__name__} and a linear in PyTorch"


def gated_block(
    owner: nn.Module,
    x: Tensor,
    gate: nn.Module,
    up: nn.Module | None,
    down: nn.Module,
    dropout: nn.Module | None,
    *,
    activation: str,
    packed: Packed | None = None,
    recompute: bool = False,
) -> Tensor:
    """down(dropout(act(gate(x)) * up(x))); with `packed`, `gate` holds both halves, `up` none."""
    w_gate, b_gate = affine(owner, gate)
    w_up, b_up = (None, None) if up is None else affine(owner, up)
    w_down, b_down = affine(owner, down)
    if not bare(gate, up, down, dropout):
        check_x(type(owner).__name__, x, w_gate.shape[-1], w_gate.dtype)
        u = None if up is None else up(x)
        h = gated_act(gate(x), u, activation=activation, packed=packed)
        return down(h if dropout is None else dropout(h))
    if passes_through(dropout):
        return gated_mlp(
            x, w_gate, w_up, w_down, b_gate, b_up, b_down,
            activation=activation, packed=packed, recompute=recompute,
        )  # fmt: skip
    h = gated_linear(x, w_gate, w_up, b_gate, b_up, activation=activation, packed=packed)
    return F.linear(dropout(h), w_down, b_down)  # type: ignore[misc]


def plain_block(
    owner: nn.Module,
    x: Tensor,
    first: nn.Module,
    second: nn.Module,
    dropout: nn.Module | None,
    *,
    activation: str,
    recompute: bool = False,
) -> Tensor:
    """second(dropout(act(first(x))))."""
    w_in, b_in = affine(owner, first)
    w_out, b_out = affine(owner, second)
    if not bare(first, second, dropout):
        check_x(type(owner).__name__, x, w_in.shape[-1], w_in.dtype)
        h = resolve(activation).phi(first(x))
        return second(h if dropout is None else dropout(h))
    if passes_through(dropout):
        return mlp(x, w_in, w_out, b_in, b_out, activation=activation, recompute=recompute)
    h = linear_act(x, w_in, b_in, activation=activation)
    return F.linear(dropout(h), w_out, b_out)  # type: ignore[misc]
