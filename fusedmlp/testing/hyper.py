"""Cases of hyper_attention. A size's M is T; D // 4 is the width of q and k, H that of v."""

from __future__ import annotations

from collections.abc import Iterator

from .. import reference
from .._api import hyper_attention
from .case import Case, Shapes

RANK1, RANK2 = 5, 3


def _shapes(T: int, D: int, H: int) -> Shapes:
    """One head of the "glu" kind; parameters for three lags more than there are tokens."""
    dq, L = max(1, D // 4), T + 3
    return {
        "q": (2, T, dq), "k": (2, T, dq), "v": (1, T, H),
        "c1": (2, T, RANK1), "u1": (2, L, RANK1), "vt1": (2, RANK1, L), "d1": (2, L),
        "c2": (1, T, RANK2), "u2": (1, L, RANK2), "vt2": (1, RANK2, L), "d2": (1, L),
    }  # fmt: skip


def _flops(T: int, D: int, H: int) -> int:
    pairs = T * (T + 1) // 2
    return 2 * pairs * (2 * max(1, D // 4) + 4 * RANK1 + 2 * RANK2 + H)


def cases() -> Iterator[Case]:
    yield Case("hyper_attention", hyper_attention, reference.hyper_attention, _shapes, _flops)
