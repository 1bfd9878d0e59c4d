"""hyper_attention for the ahead-of-time gate: training calls at 4 x 4096 tokens of width 1024, and
decoding from caches of as many."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from ...kernels.arch import Arch
from ...kernels.hyper import gradients as hyper_gradients, hyper_attention, hyper_attention_step
from .jobs import THOROUGH, Job

B, T, D, RANK = 4, 4096, 1024, 16
OPTIONS = (True, True, True, 1e-12)


def _jobs(arch: Arch, dtype: torch.dtype, variant: str, H: int, Q: int) -> Iterator[Job]:
    def empty(*shape: int, wide: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32 if wide else dtype)  # never touched

    def heads(n: int, width: int) -> torch.Tensor:
        return empty(B, T, n, width).transpose(1, 2)

    q, v = heads(Q, D // 4 // Q), heads(H, D // H)
    first = (heads(Q, RANK), empty(Q, T, RANK), empty(Q, RANK, T), empty(Q, T))
    second = (heads(H, RANK), empty(H, T, RANK), empty(H, RANK, T), empty(H, T))
    if variant == "bare":
        first = second = (None,) * 4  # type: ignore[assignment]
    tensors = (q, q, v, *first, *second)
    rank = 0 if variant == "bare" else RANK
    h1, h2 = empty(B, Q, T, rank, wide=True), empty(B, H, T, rank, wide=True)
    left = (h1, h2, empty(B, H, T, wide=True))
    fwd = functools.partial(hyper_attention.hyper_attention_fwd, *tensors, *OPTIONS)
    arguments: tuple[Any, ...] = (v, v, *tensors, *left, *OPTIONS, [True] * 11)
    bwd = functools.partial(hyper_gradients.hyper_attention_bwd, *arguments)
    yield Job(arch, dtype, variant, fwd)
    yield Job(arch, dtype, variant, bwd)
    q, c1, c2 = (None if t is None else t[:, :, 0] for t in (q, first[0], second[0]))
    position = torch.empty(1, dtype=torch.int64)
    arguments = (q, *tensors[1:3], position, c1, *first[1:], c2, *second[1:], *OPTIONS)
    yield Job(
        arch,
        dtype,
        variant,
        functools.partial(hyper_attention_step.hyper_attention_step, *arguments),
    )


def jobs_of(arch: Arch, activations: list[str]) -> Iterator[Job]:
    yield from _jobs(arch, torch.bfloat16, "glu, H 2", 2, 4)
    if arch.name != THOROUGH:
        return
    yield from _jobs(arch, torch.bfloat16, "glu, H 16", 16, 32)
    yield from _jobs(arch, torch.bfloat16, "relu, H 2", 2, 2)
    yield from _jobs(arch, torch.bfloat16, "bare", 2, 4)
    yield from _jobs(arch, torch.float32, "glu, H 2", 2, 4)
