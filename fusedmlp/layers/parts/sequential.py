"""A Sequential that runs its linears fused with the activation behind them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ...backends import choice
from ...ops.linear_act import linear_act
from ...ops.mlp import mlp
from .activation import name_of
from .around import bare
from .block import DROPOUTS, passes_through
from .widths import Reader

Row = list[nn.Module]
_LINEAR = nn.Linear.forward  # looked up once: five children ask in every call


class FusedSequential(nn.Sequential, Reader):
    """nn.Sequential's function, keys and children, in fewer calls.

    | children in a row | run as |
    |---|---|
    | Linear, activation, dropout that does not act (or none), Linear | mlp |
    | Linear, activation | linear_act |
    | any other | a call of the child |

    An activation counts if `fusedmlp` has a kernel for it. A child with hooks is called.
    """

    recompute = False  # whether mlp saves x alone for backward

    def forward(self, x: Tensor) -> Tensor:
        if choice.always_reference(x) and not self.recompute:
            return super().forward(x)  # what the references compute, without a second look at x
        for row, activation in self._rows():
            x = row[0](x) if activation is None else _fused(row, activation, x, self.recompute)
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

    def _reads(self) -> Iterator[tuple[str, Tensor | int]]:
        names = {child: name for name, child in self._modules.items()}
        for row, activation in self._rows():
            linears = [child for child in row if activation and isinstance(child, nn.Linear)]
            for linear in linears:
                yield f"{names[linear]}.weight", linear.weight
            if len(linears) == 1:
                yield f"{names[linears[0]]}.out_features", linears[0].out_features

    def extra_repr(self) -> str:
        return self._noted(self.path(), "recompute=True" if self.recompute else "")

    def recomputing(self, owner: str) -> None:
        """Let mlp save x alone. Raises ValueError where no two linears are ever one call."""
        row = [child for child in self if not isinstance(child, DROPOUTS)]
        triples = zip(row, row[1:], row[2:], strict=False)
        if not any(_is_linear(a) and name_of(act) and _is_linear(b) for a, act, b in triples):
            raise ValueError(
                f"{owner}: recompute must be False where the two linears are not one call, got "
                "True; leave out the norm between them, and take an activation with a kernel"
            )
        self.recompute = True


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


def _fused(row: Row, activation: str, x: Tensor, recompute: bool) -> Tensor:
    w, b = row[0].weight, row[0].bias
    if len(row) == 2:
        return linear_act(x, w, b, activation=activation)  # type: ignore[arg-type]
    w_out, b_out = row[-1].weight, row[-1].bias
    return mlp(x, w, w_out, b, b_out, activation=activation, recompute=recompute)  # type: ignore[arg-type]


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is _LINEAR and bare(module)
