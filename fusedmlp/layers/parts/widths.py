"""The width between a layer's two projections, and which widths and strides no fast load takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ...check.numbers import number
from .block import positive_int

UNIT = 8  # elements of 16 bits in the 16 bytes that a fast load moves
MATRICES = ("weight", "original", "w_gate", "w_up", "w_down", "w1s", "w2s")


class Default(float):
    """A factor that nobody gave, and that steps aside for a `hidden`."""

    def __init__(self, value: float) -> None:
        self._given = value

    def __repr__(self) -> str:
        return repr(self._given)

    def __reduce__(self) -> tuple[type[Default], tuple[float]]:
        return Default, (self._given,)


def scaled_width(owner: str, dim: int, factor_name: str, factor: float) -> int:
    """floor(dim * factor), the hidden width; at least 1."""
    number(owner, factor_name, factor)
    if not 1 <= dim * factor < float("inf"):
        raise ValueError(
            f"{owner}: {factor_name} must be finite and give a hidden width of at least 1, "
            f"got {factor} * {dim}"
        )
    return int(dim * factor)


def hidden_width(
    owner: str,
    dim: int,
    factor_name: str,
    factor: float,
    hidden: int | None = None,
    multiple_of: int | None = None,
    scaled: Callable[[str, int, str, float], int] = scaled_width,
) -> int:
    """`hidden` where it is given, else `scaled(...)`, rounded up to a multiple of `multiple_of`."""
    for name, value in (("hidden", hidden), ("multiple_of", multiple_of)):
        if value is not None:
            positive_int(owner, name, value)
    if hidden is not None:
        others = {} if isinstance(factor, Default) else {factor_name: factor}
        others |= {} if multiple_of is None else {"multiple_of": multiple_of}
        for name, other in others.items():
            raise ValueError(
                f"{owner}: hidden and {name} must not be given together, since either sets the "
                f"hidden width, got hidden={hidden!r} and {name}={other!r}; leave one out"
            )
        return hidden
    width = scaled(owner, dim, factor_name, factor)
    return width if multiple_of is None else -(-width // multiple_of) * multiple_of


class Off(NamedTuple):
    """What keeps kernels off fast loads, and what would not."""

    what: str
    why: str
    instead: str


def _off(size: Tensor | int) -> Off | None:
    """What is off in a matrix, or in a width alone; None for nothing."""
    if isinstance(size, int):
        width, step = size, 0
    else:
        # Along either dimension contiguous: fast loads run along that one.
        *_, outer, inner = size.stride()
        if 1 not in (outer, inner):
            return Off("layout", "has no contiguous dimension", "a contiguous copy")
        rows, columns = size.shape[-2:] if inner == 1 else size.shape[:-3:-1]
        width, step = columns, max(outer, inner) if rows > 1 else 0
    for what, number_ in (("width", width), ("stride", step)):
        if number_ % UNIT:
            why = f"is no multiple of {UNIT}"
            return Off(f"{what} {number_}", why, str(-(-number_ // UNIT) * UNIT))
    return None


def off_fast_loads(sizes: Iterable[tuple[str, Tensor | int]]) -> list[str]:
    """A sentence for each width or stride among `sizes`, matrices or widths by their names, that
    fast loads in 16 bits do not take: rows must begin at multiples of 16 bytes."""
    found: dict[Off, dict[str, None]] = {}
    for name, size in sizes:
        if off := _off(size):
            found.setdefault(off, {})[name] = None
    return [
        f"{off.what} of {next(iter(names))}"
        + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        + f" {off.why}: in 16 bits kernels take element loads and small tiles; "
        f"{off.instead} would have vector or TMA loads"
        for off, names in found.items()
    ]


class Reader(nn.Module):
    """A layer whose matrices a kernel reads as they lie."""

    def _reads(self) -> Iterator[tuple[str, Tensor | int]]:
        """Those matrices, and widths of its results, by their names."""
        for name, t in self.named_parameters():
            if name.endswith(MATRICES) and t.dim() in (2, 3):
                yield name, t

    def _check_recompute(self, recompute: bool) -> None:
        """Raises ValueError where no call could save less."""
        if recompute and next(self._reads(), None) is None:
            raise ValueError(
                f"{type(self).__name__}: recompute must be False where PyTorch calls the block's "
                "modules one by one, got True; a fused block has an activation with a kernel"
            )

    def _noted(self, *words: str) -> str:
        """For the layer's repr: `words`, and what keeps it off fast loads."""
        return ", ".join(filter(None, (*words, *off_fast_loads(self._reads()))))
