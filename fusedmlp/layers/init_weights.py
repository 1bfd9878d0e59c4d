"""Initial values by the role of a layer, in place.

| module | role | weight | bias |
|---|---|---|---|
| Linear | gating | Xavier uniform, gain 0.1 scale | 1 |
| Linear | attention | Xavier uniform, gain scale / sqrt(2) | kept |
| Linear | embedding | uniform in +-scale / sqrt(rows) | kept |
| Linear | default, expert, feedforward | scale * Kaiming normal, fan-in | 0 |
| Conv1d, Conv2d | any | scale * Kaiming normal, fan-out | 0 |
| BatchNorm1d, BatchNorm2d, LayerNorm, RMSNorm | any | 1 | 0 |
| Embedding | any | normal, std 0.02 scale | |
| GRU, LSTM | any | orthogonal | 0 |
| other | any | kept | kept |

Under "default" a Linear takes its role from its name, the first that matches: "gate" or "gating":
gating; "q_proj", "k_proj", "v_proj" or "attention": attention; "embed" or "token": embedding;
"expert" or "router": expert. Names and roles are mlp_utils', where `scale` had no effect on Kaiming
values; here it has.

Every function raises ValueError for an unknown method or nonlinearity and for a scale that is
negative or not finite, and TypeError for what is no module or number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..check.numbers import finite

__all__ = ["apply_initialization", "create_initializer", "initialize_weights"]

METHODS = ("default", "gating", "attention", "embedding", "expert", "feedforward")
_ROLES = {
    "gating": ("gate", "gating"),
    "attention": ("q_proj", "k_proj", "v_proj", "attention"),
    "embedding": ("embed", "token"),
    "expert": ("expert", "router"),
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm)


@torch.no_grad()
def initialize_weights(
    module: nn.Module,
    init_method: str = "default",
    nonlinearity: str = "relu",
    scale: float = 1.0,
    layer_name: str = "",
) -> None:
    """Initialise one module in place; its children are not touched.

    Args:
        module: what to initialise; of a kind that the table does not list, it is left as it is.
        init_method: "default" or a role: "gating", "attention", "embedding", "expert" or
            "feedforward", which is the default's formula whatever the name says.
        nonlinearity: what Kaiming's gain is for, a name of torch.nn.init.calculate_gain.
        scale: a factor on the weights, as the table has it.
        layer_name: where init_method is "default", the name that a Linear's role is read from.

    A weight that is parametrised is assigned, so its parametrisation needs a right inverse.
    """
    _check_module("initialize_weights", "module", module)
    _check("initialize_weights", init_method, nonlinearity, scale)
    if isinstance(module, nn.Linear):
        role = _role(layer_name) if init_method == "default" else init_method
        _linear(module, role, nonlinearity, scale)
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        _fill(module, "weight", lambda w: _kaiming(w, "fan_out", nonlinearity, scale))
        _fill(module, "bias", nn.init.zeros_)
    elif isinstance(module, _NORMS):
        _fill(module, "weight", nn.init.ones_)
        _fill(module, "bias", nn.init.zeros_)
    elif isinstance(module, nn.Embedding):
        _fill(module, "weight", lambda w: nn.init.normal_(w, 0, 0.02 * scale))
    elif isinstance(module, nn.GRU | nn.LSTM):
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)


def apply_initialization(
    model: nn.Module, init_method: str = "default", nonlinearity: str = "relu", scale: float = 1.0
) -> None:
    """`initialize_weights` on `model` and every module in it, each with its dotted name."""
    _check_module("apply_initialization", "model", model)
    _check("apply_initialization", init_method, nonlinearity, scale)
    for name, module in model.named_modules():
        initialize_weights(module, init_method, nonlinearity, scale, name)


def create_initializer(
    init_method: str, nonlinearity: str = "relu", scale: float = 1.0
) -> Callable[[nn.Module], None]:
    """`initialize_weights` as a function of the module alone, for `model.apply`.

    No name reaches it: under "default" every Linear has the default role.
    """
    _check("create_initializer", init_method, nonlinearity, scale)

    def initializer(module: nn.Module) -> None:
        initialize_weights(module, init_method, nonlinearity, scale)

    return initializer


def _check_module(function: str, name: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: {name} must be an nn.Module, got {type(module).__name__}")


def _check(function: str, method: str, nonlinearity: str, scale: float) -> None:
    if method not in METHODS:
        raise ValueError(
            f"{function}: init_method must be one of {', '.join(METHODS)}; got {method!r}"
        )
    try:
        nn.init.calculate_gain(nonlinearity)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(
            f"{function}: nonlinearity must be a name of torch.nn.init.calculate_gain, got "
            f"{nonlinearity!r}"
        ) from None
    finite(function, "scale", scale)
    if scale < 0:
        raise ValueError(f"{function}: scale must not be negative, got {scale}")


def _role(layer_name: str) -> str:
    name = layer_name.lower()
    for role, parts in _ROLES.items():
        if any(part in name for part in parts):
            return role
    return "default"


def _linear(linear: nn.Linear, role: str, nonlinearity: str, scale: float) -> None:
    if role == "gating":
        _fill(linear, "weight", lambda w: nn.init.xavier_uniform_(w, 0.1 * scale))
        _fill(linear, "bias", nn.init.ones_)
    elif role == "attention":
        _fill(linear, "weight", lambda w: nn.init.xavier_uniform_(w, scale * 0.5**0.5))
    elif role == "embedding":
        bound = scale * linear.out_features**-0.5
        _fill(linear, "weight", lambda w: nn.init.uniform_(w, -bound, bound))
    else:
        _fill(linear, "weight", lambda w: _kaiming(w, "fan_in", nonlinearity, scale))
        _fill(linear, "bias", nn.init.zeros_)


def _kaiming(weight: Tensor, mode: str, nonlinearity: str, scale: float) -> None:
    nn.init.kaiming_normal_(weight, mode=mode, nonlinearity=nonlinearity)  # type: ignore[arg-type]
    weight.mul_(scale)


def _fill(module: nn.Module, name: str, fill: Callable[[Tensor], object]) -> None:
    """Run `fill` on a parameter, if the module has it."""
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    fill(tensor)
    # A parametrised tensor is computed at each access: what was filled is a copy.
    if is_parametrized(module, name):
        setattr(module, name, tensor)
