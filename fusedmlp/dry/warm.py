"""warmup(): the kernels of a model, compiled before its first batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.op import TRITON_DTYPES
from ..kernels.device import INTERPRETED
from ..layers.parts.block import positive_int
from ..progress import Progress
from .blocks import Block, backward, blocks_of, drawing_nothing, forward, stand_ins
from .driver import compiling, listening
from .lines import GPUS, named_gpu

_APART = 512  # bytes: PyTorch's allocator for CUDA rounds sizes up to it


@dataclass(frozen=True)
class Warmup:
    """What warmup() did. blocks: how many fused blocks the model has. compiled, cached: kernels
    that were compiled, and that Triton's cache on the disk had; what this process had loaded before
    is in neither. left: blocks that could not be run, and why.

    Examples:
        >>> from fusedmlp import Warmup
        >>> print(Warmup(blocks=2, compiled=4, cached=1))
        2 blocks: 4 kernels compiled, 1 taken from Triton's cache
    """

    blocks: int
    compiled: int
    cached: int
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        kernels = f"{self.compiled} kernels compiled, {self.cached} taken from Triton's cache"
        head = f"{self.blocks} blocks: {kernels}"
        return "\n".join([head, *(f"not warm: {line}" for line in self.left)])


def warmup(model: nn.Module, tokens: int | Iterable[int], *, gpu: str | None = None) -> Warmup:
    """Compile what a model will launch, so that its first step, or the capture of a CUDA graph,
    does not wait for it.

    Each fused block of `model` (a layer of this package, or a module that patch() patched) runs by
    itself on zeros: in train() forward and backward, where a parameter requires a gradient; in
    eval() forward, as under torch.no_grad(). For training with evaluation between, call it in both
    modes. The kernels depend on the dtype, on strides, and on the number of rows: name each that
    will come, such as batch times sequence length, and the batch alone for decoding. Call it under
    the autocast that will be in force, and after patch(), quantisation and `.to()`.

    Args:
        model: on the GPU that will run it; with `gpu` on any device, meta too.
        tokens: the number of rows, or several.
        gpu: None: run on the GPU. "H100", "H200" or "B200": compile for one that is not here, into
            Triton's cache (TRITON_CACHE_DIR), which that machine then has to be given. Weights of
            one block are taken to lie in either order. Without a GPU PyTorch has no autocast of
            CUDA: torch.autocast("cpu", dtype) is in its place.

    Nothing changes: no gradient, buffer, mode or random state, no attribute that is a tensor, list,
    dict, set or deque. No hook is called but PyTorch's own, which make weights (pruning). Other
    threads may compute meanwhile, the model itself too; numbers that they draw then from PyTorch's
    own generators, they draw again after it. Calls that plan or warm up wait for one another. A bar
    on a terminal shows how far it is, by rich where that is installed.

    Returns a `Warmup`; its str() names the blocks that could not be run, with the reason.

    Raises RuntimeError without a GPU and without `gpu`, for a model that is not on one, and under
    TRITON_INTERPRET; ValueError for a model without fused blocks, and for another gpu or number of
    tokens.

    Examples:
        >>> import torch, fusedmlp
        >>> from fusedmlp.layers import FeedForward
        >>> block = FeedForward(64, glu_variant="swiglu", bias=False).bfloat16()
        >>> if torch.cuda.is_available():
        ...     print(fusedmlp.warmup(block.cuda(), tokens=[16, 4096]))
    """
    sizes = _sizes(tokens)
    if not isinstance(model, nn.Module):
        raise TypeError(f"warmup: model must be an nn.Module, got {type(model).__name__}")
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(
            "warmup: model must hold a layer of fusedmlp or a patched module, got "
            f"{type(model).__name__} without; call fusedmlp.patch(model) first"
        )
    if INTERPRETED:
        raise RuntimeError(
            "warmup: kernels that Triton interprets are not compiled, got TRITON_INTERPRET=1; unset"
            " it before Python starts"
        )
    if gpu is not None:
        return _without_gpu(blocks, sizes, gpu)
    if not torch.cuda.is_available():
        raise RuntimeError(
            "warmup: needs a GPU, torch finds none here; give gpu=, one of "
            f"{', '.join(GPUS)}, to fill Triton's cache for it"
        )
    for block in blocks:
        if not block.like.is_cuda:
            raise RuntimeError(
                f"warmup: model must be on the GPU, got {block.kind} on {block.like.device}"
            )
    return _on_gpu(blocks, sizes)


def _sizes(tokens: int | Iterable[int]) -> list[int]:
    sizes = list(tokens) if isinstance(tokens, Iterable) else [tokens]
    if not sizes:
        raise ValueError("warmup: tokens must hold a number of rows, got none")
    for size in sizes:
        positive_int("warmup", "tokens", size)
    return sizes


def _on_gpu(blocks: Sequence[Block], sizes: Sequence[int]) -> Warmup:
    jobs = [(block, rows, _views) for block in blocks for rows in sizes]
    with listening() as hits:
        left = _run_all(jobs)
        torch.cuda.synchronize()
    return _told(blocks, hits, left)


def _without_gpu(blocks: Sequence[Block], sizes: Sequence[int], name: str) -> Warmup:
    gpu = named_gpu("warmup", name)
    # Blocks alike compile alike, since nobody knows where their weights will lie.
    own = {block.alike(): block for block in blocks}.values()
    jobs = [(block, rows, way) for block in own for rows in sizes for way in (_ordered, _reversed)]
    with _autocast(), compiling(gpu.arch, gpu.multiprocessors) as hits:
        left = _run_all(jobs)
    return _told(blocks, hits, left)


def _told(blocks: Sequence[Block], hits: dict[str, bool], left: list[str]) -> Warmup:
    cached = sum(hits.values())
    return Warmup(len(blocks), len(hits) - cached, cached, tuple(dict.fromkeys(left)))


def _run_all(jobs: Sequence[tuple[Block, int, Any]]) -> list[str]:
    """Run every job; what could not be run."""
    left = []
    with Progress("warmup", len(jobs)) as bar:
        for block, rows, tensors_of in jobs:
            try:
                _run(block, rows, tensors_of(block))
            except Exception as error:  # the others are still to be compiled
                first = f"{type(error).__name__}: {error}".partition("\n")[0]
                left.append(f"{block.kind}, {rows} tokens: {first}")
            bar.step(block.name)
    return left


def _run(block: Block, rows: int, tensors: dict[str, Tensor]) -> None:
    training = block.module.training and any(t.requires_grad for t in tensors.values())
    like = next((t for t in tensors.values() if t.is_floating_point()), block.like)
    with drawing_nothing(block.module), torch.set_grad_enabled(training):
        inputs = block.inputs(rows, like)
        inputs = tuple(t.requires_grad_(training and t.is_floating_point()) for t in inputs)
        out = forward(block, tensors, inputs)
        if training:
            backward(out, tensors, inputs)


def _views(block: Block) -> dict[str, Tensor]:
    """Parameters where they lie, so that weights are apart as they will be; copies of buffers."""
    buffers = {id(b) for b in block.module.buffers()}
    return stand_ins(block, lambda t: t.clone() if id(t) in buffers else t.detach())


def _ordered(block: Block) -> dict[str, Tensor]:
    return _placed(block, 1)


def _reversed(block: Block) -> dict[str, Tensor]:
    return _placed(block, -1)


def _placed(block: Block, step: int) -> dict[str, Tensor]:
    """Stand-ins on the CPU, one behind the other as the GPU's allocator would have them, or in the
    opposite order, in memory that nobody touches; in autocast's dtype, whose copies kernels see."""
    own = [*block.module.parameters(), *block.module.buffers()][::step]
    spans = [1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in own]
    starts, end = [], 0
    for t, span in zip(own, spans, strict=True):
        starts.append(end)
        end += -(-max(span, 1) * _dtype(t).itemsize // _APART) * _APART
    memory = torch.empty(end + _APART, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % _APART :]
    at = {id(t): start for t, start in zip(own, starts, strict=True)}

    def place(t: Tensor) -> Tensor:
        # Whole elements of any dtype: PyTorch's allocator for the CPU aligns to 64 bytes.
        return memory[at[id(t)] :].view(_dtype(t)).as_strided(t.shape, t.stride())

    return stand_ins(block, place)


def _dtype(t: Tensor) -> torch.dtype:
    cast = torch.is_autocast_enabled("cpu") and t.dtype in TRITON_DTYPES
    return torch.get_autocast_dtype("cpu") if cast else t.dtype


def _autocast() -> AbstractContextManager[Any]:
    """CPU tensors are cast as CUDA's would be; that of the CPU, if it is in force, stays."""
    if not torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=torch.get_autocast_dtype("cuda"))
