"""Cases of hyper_attention and its decoding step. A size's M is T; D // 4 is the width of q and k,
H that of v, of one head. Of the sized cases M is all tokens of a batch, D the model's width and H
the number of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import reference
from .._api import hyper_attention, hyper_attention_step
from .case import Case, Shapes

RANK1, RANK2 = 5, 3
# Of the sized cases: the published default rank, sequences in training, sequences in decoding.
RANK, BATCH, DECODING = 16, 4, 8
# Random scores of real widths overflow float16 unless queries and parameters are small.
SCALES = {"q": 0.125, "u1": 0.02, "vt1": 0.02, "d1": 0.1, "u2": 0.02, "vt2": 0.02, "d2": 0.1}


def _shapes(T: int, D: int, H: int) -> Shapes:
    """One head of the "glu" kind; parameters for three lags more than there are tokens."""
    return _core(T, T, T + 3, (2, 1), max(1, D // 4), H, (RANK1, RANK2))


def _core(
    rows: int, N: int, L: int, heads: tuple[int, int], dq: int, dv: int, ranks: tuple[int, int]
) -> Shapes:
    """Of `rows` queries and N sources; 0 rows: of a step."""
    (Q, H), (r1, r2), T = heads, ranks, (rows,) if rows else ()
    return {
        "q": (Q, *T, dq), "k": (Q, N, dq), "v": (H, N, dv),
        "c1": (Q, *T, r1), "u1": (Q, L, r1), "vt1": (Q, r1, L), "d1": (Q, L),
        "c2": (H, *T, r2), "u2": (H, L, r2), "vt2": (H, r2, L), "d2": (H, L),
    }  # fmt: skip


def _step_shapes(N: int, D: int, H: int) -> Shapes:
    return _core(0, N, N, (2, 1), max(1, D // 4), H, (RANK1, RANK2))


def _full(arguments: dict[str, Any], functions: Any) -> dict[str, Any]:
    """The newest token is the last that the cache holds."""
    k = arguments["k"]
    return {**arguments, "position": torch.full((1,), k.shape[-2] - 1, device=k.device)}


def cases() -> Iterator[Case]:
    yield Case("hyper_attention", hyper_attention, reference.hyper_attention, _shapes)
    yield Case(
        "hyper_attention_step", hyper_attention_step, reference.hyper_attention_step, _step_shapes,
        adapt=_full, forward_only=True,
    )  # fmt: skip


def _batched(batch: int, step: bool) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, heads: int) -> Shapes:
        T = max(1, M // batch)
        widths = max(1, D // 8 // heads), max(1, D // heads)
        one = _core(0 if step else T, T, T, (2 * heads, heads), *widths, (RANK, RANK))
        shared = ("u1", "vt1", "d1", "u2", "vt2", "d2")
        return {name: s if name in shared else (batch, *s) for name, s in one.items()}

    return shapes


def sized() -> Iterator[Case]:
    """As a layer of published defaults calls them, "glu", queries and keys of D // 4 together: in
    training, and decoding from a full cache."""
    yield Case(
        "hyper_attention-layer", hyper_attention, reference.hyper_attention,
        _batched(BATCH, False),
        out_shape=lambda M, D, heads: (BATCH, heads, max(1, M // BATCH), max(1, D // heads)),
        scales=SCALES,
    )  # fmt: skip
    yield Case(
        "hyper_attention_step-layer", hyper_attention_step, reference.hyper_attention_step,
        _batched(DECODING, True),
        adapt=_full, forward_only=True, scales=SCALES,
    )  # fmt: skip
