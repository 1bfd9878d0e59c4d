"""From an activation module to the name of its kernel, and from a name to a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ... import check
from ...ops.gated_act import gated_act
from ...reference.activations import ACTIVATIONS, MODULES, computed_by, resolve


class NamedActivation(nn.Module):
    """What an argument `activation` of the functions names, as a module: phi(g), and of g and u
    phi(g) psi(u), by gated_act."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        row, scalars = resolve(activation)
        self.activation = row.spelled(**dict(zip(row.parameters, scalars, strict=True)))

    def forward(self, g: Tensor, u: Tensor | None = None) -> Tensor:
        if u is not None:
            return gated_act(g, u, activation=self.activation)
        check.activation("NamedActivation", self.activation, gated=False)
        return resolve(self.activation).phi(g)

    def extra_repr(self) -> str:
        return repr(self.activation)


def name_of(activation: nn.Module) -> str | None:
    """The name of the row of `fusedmlp.reference.activations.ACTIVATIONS` that `activation`
    computes, with the row's parameters as the module has them, or None.

    By its exact class: a subclass may compute something else.
    """
    for name in MODULES.get(type(activation), ()):
        row = ACTIVATIONS[name]
        if not row.settings or row.is_set_in(activation):
            return row.spelled_of(activation) if row.parameters else name
    return activation.activation if type(activation) is NamedActivation else None


def gate(activation: nn.Module, g: Tensor, u: Tensor) -> Tensor:
    """u * activation(g), or what a gate's name makes of both, by calling the module."""
    both = isinstance(activation, NamedActivation)
    return activation(g, u) if both else u * activation(g)


def gate_module(owner: str, activation: nn.Module | str) -> nn.Module:
    """The module of a gated layer's argument `activation`."""
    if isinstance(activation, str):
        check.activation(owner, activation)
        return NamedActivation(activation)
    if not isinstance(activation, nn.Module):
        raise TypeError(
            f"{owner}: activation must be an nn.Module or an activation's name, got {activation!r}"
        )
    return activation


def describe(activation: nn.Module) -> str:
    """Where a layer runs `activation`, for its repr and for explain()."""
    name = name_of(activation)
    kind = type(activation).__name__
    return f"{kind} in PyTorch" if name is None else f"{kind} fused as {name!r}"


def _instead(activation: object) -> str:
    """What names what was given as a function of PyTorch, or as an instance."""
    name = computed_by(activation)
    return "" if name is None else f": give its name, {name!r}"


def _maker(activation: object) -> str:
    kind = type(activation).__name__
    own = isinstance(activation, nn.Module)
    return f": give its class, {kind}, or lambda: {kind}(...)" if own else ""


def build(
    where: str, activation: nn.Module | Callable[[], nn.Module] | str, instances: bool = True
) -> nn.Module:
    """The module of one tensor that `activation` is, makes or names. `where` opens every error:
    "<Class>: <argument>".

    Raises TypeError for anything else, and for a module unless `instances` are accepted; ValueError
    for a name that there is not, and for that of a gate.
    """
    if isinstance(activation, str):
        owner, _, called = where.partition(": ")
        check.activation(owner, activation, gated=False, called=called)
        return NamedActivation(activation)
    if instances and isinstance(activation, nn.Module):
        return activation
    also = "an nn.Module, " if instances else ""
    expected = (
        f"{where} must be {also}an activation's name or a callable that makes an nn.Module from no "
        "arguments"
    )
    if isinstance(activation, nn.Module):
        remedy = _instead(activation) or _maker(activation)
        raise TypeError(f"{expected}, got {activation!r}{remedy}")
    try:
        made = activation()
    except TypeError as error:
        raise TypeError(f"{expected}, got {activation!r}{_instead(activation)}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"{expected}, got {activation!r}, which made {made!r}")
    return made
