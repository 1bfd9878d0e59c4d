"""A Sequential that runs its linears fused with the activation behind them."""

from __future__ import annotations

from torch import Tensor, nn

from ...ops.linear_act import linear_act
from ...ops.mlp import mlp
from .activation import name_of
from .around import bare
from .block import passes_through

Row = list[nn.Module]


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
        for row in self._rows():
            x = _run(row, x)
        return x

    def _rows(self) -> list[Row]:
        """The children, cut into what runs as one call."""
        children: Row = list(self._modules.values())
        rows = []
        while children:
            count = _row_length(children)
            rows.append(children[:count])
            children = children[count:]
        return rows

    def path(self) -> str:
        """What runs as one call now: children joined by "+"."""
        rows = (" + ".join(type(m).__name__ for m in row) for row in self._rows())
        return "runs " + ", ".join(rows)

    def extra_repr(self) -> str:
        return self.path()


def first_two(net: nn.Module) -> Row:
    """A linear, or a norm and a linear: what meets x before its width or dtype can change."""
    return list(net._modules.values())[:2]  # type: ignore[return-value]


def _row_length(children: Row) -> int:
    """How many children, from the first on, are one call."""
    if len(children) < 2 or not _is_linear(children[0]):
        return 1
    if name_of(children[1]) is None or not bare(children[1]):
        return 1
    second = 3 if len(children) > 2 and passes_through(children[2]) and bare(children[2]) else 2
    return second + 1 if len(children) > second and _is_linear(children[second]) else 2


def _run(row: Row, x: Tensor) -> Tensor:
    first = row[0]
    if len(row) == 1:
        return first(x)
    w, b = first.weight, first.bias
    activation = name_of(row[1])
    assert activation is not None
    if len(row) == 2:
        return linear_act(x, w, b, activation=activation)  # type: ignore[arg-type]
    second = row[-1]
    return mlp(x, w, second.weight, b, second.bias, activation=activation)  # type: ignore[arg-type]


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and bare(module)
