"""Cases of hyper_attention and its decoding step. A size's M is T; D // 4 is the width of q and k,
H that of v, of one head. Of the sized cases M is all tokens of a batch, D the model's width and H
the number of heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .. import reference
from .._api import hyper_attention, hyper_attention_step
from ..kernels.launches.hyper import BATCH, DECODING, SCALES, core, of_layer
from .case import Case, Shapes

RANK1, RANK2 = 5, 3


def _shapes(T: int, D: int, H: int) -> Shapes:
    """One head of the "glu" kind; parameters for three lags more than there are tokens."""
    return core(T, T, T + 3, (2, 1), max(1, D // 4), H, (RANK1, RANK2))


def _step_shapes(N: int, D: int, H: int) -> Shapes:
    return core(0, N, N, (2, 1), max(1, D // 4), H, (RANK1, RANK2))


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


def sized() -> Iterator[Case]:
    """As a layer of published defaults calls them, "glu", queries and keys of D // 4 together: in
    training, and decoding from a full cache."""
    yield Case(
        "hyper_attention-layer", hyper_attention, reference.hyper_attention,
        of_layer(BATCH, False),
        out_shape=lambda M, D, heads: (BATCH, heads, max(1, M // BATCH), max(1, D // heads)),
        scales=SCALES,
    )  # fmt: skip
    yield Case(
        "hyper_attention_step-layer", hyper_attention_step, reference.hyper_attention_step,
        of_layer(DECODING, True),
        adapt=_full, forward_only=True, scales=SCALES,
    )  # fmt: skip
