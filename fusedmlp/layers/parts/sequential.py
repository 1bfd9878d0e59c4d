"""A Sequential that runs its linears fused with the activation behind them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ...backends import choice
from ...ops.linear_act import linear_act
from ...ops.mlp import mlp
from .activation import name_of
from .around import bare
from .block import passes_through

Row = list[nn.Module]
_LINEAR = nn.Linear.forward  # looked up once: five children ask in every call


class FusedSequential(nn.Sequential):
    """nn.Sequential's function, keys and children, in fewer calls.

    | children in a row | run as |
    |---|---|
    | Linear, activation, dropout that does not act (or none), Linear | mlp |
    | Linear, activation | linear_act |
    | any other | a call of the child |

    An activation counts if `fusedmlp` has a kernel for it. A child with hooks is called.
    """

    def forward(self, x: Tensor) -> Tensor:
        if choice.always_reference(x):
            return super().forward(x)  # what the references compute, without a second look at x
        for row, activation in self._rows():
            x = row[0](x) if activation is None else _fused(row, activation, x)
        return x

    def _rows(self) -> Iterator[tuple[Row, str | None]]:
        """The children, cut into what runs as one call, and its activation if it is fused."""
        children: Row = list(self._modules.values())
        start = 0
        while start < len(children):
            count, activation = _row_at(children, start)
            yield children[start : start + count], activation
            start += count

    def path(self) -> str:
        """What runs as one call now: children joined by "+"."""
        rows = (" + ".join(type(m).__name__ for m in row) for row, _ in self._rows())
        return "runs " + ", ".join(rows)

    def extra_repr(self) -> str:
        return self.path()


def first_two(net: nn.Module) -> Row:
    """A linear, or a norm and a linear: what meets x before its width or dtype can change."""
    return list(net._modules.values())[:2]  # type: ignore[return-value]


def _row_at(children: Row, start: int) -> tuple[int, str | None]:
    """How many children, from `start` on, are one call, and the activation that is fused in it."""
    left = len(children) - start
    if left < 2 or not _is_linear(children[start]):
        return 1, None
    act = children[start + 1]
    activation = name_of(act)
    if activation is None or not bare(act):
        return 1, None
    second = 2
    if left > 2 and passes_through(children[start + 2]) and bare(children[start + 2]):
        second = 3
    if left > second and _is_linear(children[start + second]):
        return second + 1, activation
    return 2, activation


def _fused(row: Row, activation: str, x: Tensor) -> Tensor:
    w, b = row[0].weight, row[0].bias
    if len(row) == 2:
        return linear_act(x, w, b, activation=activation)  # type: ignore[arg-type]
    second = row[-1]
    return mlp(x, w, second.weight, b, second.bias, activation=activation)  # type: ignore[arg-type]


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is _LINEAR and bare(module)
