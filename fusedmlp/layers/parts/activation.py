"""From an activation module to the name of its kernel: the one place that knows both."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...activations import BSiLU, Gelu2, ReluSquared
from ...reference.activations import BSILU_ALPHA

_NAMES: dict[type, str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Identity: "identity",
    ReluSquared: "relu_sq",
    Gelu2: "gelu2",
}
_GELU_NAMES = {"none": "gelu", "tanh": "gelu_tanh"}


def name_of(activation: nn.Module | type) -> str | None:
    """The name of a module or class in `fusedmlp.reference.activations.ACTIVATIONS`, or None.

    A class stands for what it builds without arguments. Exact types only: a subclass may compute
    something else.
    """
    kind = activation if isinstance(activation, type) else type(activation)
    if kind is nn.GELU:
        return _GELU_NAMES.get(getattr(activation, "approximate", "none"))
    if kind is BSiLU:
        return "bsilu" if getattr(activation, "alpha", BSILU_ALPHA) == BSILU_ALPHA else None
    return _NAMES.get(kind)


def describe(activation: nn.Module) -> str:
    """Where a layer runs `activation`, for its repr and for explain()."""
    name = name_of(activation)
    kind = type(activation).__name__
    return f"{kind} in PyTorch" if name is None else f"{kind} fused as {name!r}"


def build(
    where: str, activation: nn.Module | Callable[[], nn.Module], instances: bool = True
) -> nn.Module:
    """The module that `activation` is or makes. `where` opens every error: "<Class>: <argument>".

    Raises TypeError for anything else, and for a module unless `instances` are accepted.
    """
    if instances and isinstance(activation, nn.Module):
        return activation
    also = "an nn.Module or " if instances else ""
    expected = f"{where} must be {also}a callable that makes an nn.Module from no arguments"
    if isinstance(activation, nn.Module) or not callable(activation):
        raise TypeError(f"{expected}, got {activation!r}")
    try:
        made = activation()
    except TypeError as error:
        raise TypeError(f"{expected}, got {activation!r}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"{expected}, got {activation!r}, which made {made!r}")
    return made
