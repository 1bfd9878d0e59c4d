"""From an activation module to the name of its kernel."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...reference.activations import ACTIVATIONS, MODULES


def name_of(activation: nn.Module) -> str | None:
    """The name of the row of `fusedmlp.reference.activations.ACTIVATIONS` that `activation`
    computes, with the row's parameters as the module has them, or None.

    By its exact class: a subclass may compute something else.
    """
    for name in MODULES.get(type(activation), ()):
        row = ACTIVATIONS[name]
        if row.is_set_in(activation):
            return row.spelled_of(activation) if row.parameters else name
    return None


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
