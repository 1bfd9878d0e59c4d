"""The device that tensors lie on, as launches see it: its row of kernels/arch, its size, and
whether Triton interprets."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton

from . import interpreter
from .arch import INTERPRETER, Arch, arch_for

# Triton decides at import whether @triton.jit makes interpreted functions; so it is read once,
# here.
INTERPRETED: bool = triton.knobs.runtime.interpret
if INTERPRETED:
    interpreter.mend()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _arch_of_gpu(index: int) -> Arch:
    try:
        return arch_for(_capability(index))
    except LookupError as error:
        raise RuntimeError(
            f"fusedmlp: Triton kernels cannot run on {torch.cuda.get_device_name(index)}: {error}; "
            "use backend('reference')"
        ) from None


# What `pretend` put in place of the real device: (row, multiprocessors).
_pretended: tuple[Arch, int] | None = None


class _Here(threading.local):
    """What holds in the thread of a dry run (fusedmlp/dry) and in no other: the GPU that it
    pretends, the backend that it chose."""

    gpu: tuple[Arch, int] | None = None
    backend: str | None = None


HERE = _Here()


@contextmanager
def pretend(arch: Arch, multiprocessors: int) -> Iterator[None]:
    """Inside, every tensor is taken to lie on such a GPU: how launches are planned for a GPU that
    is not there, or with another table of tiles. In every thread, since autograd's launch too; in a
    dry run in its own alone."""
    global _pretended
    if HERE.gpu:
        with pretend_here(arch, multiprocessors):
            yield
        return
    previous, _pretended = _pretended, (arch, multiprocessors)
    try:
        yield
    finally:
        _pretended = previous


@contextmanager
def pretend_here(arch: Arch, multiprocessors: int) -> Iterator[None]:
    """`pretend` in this thread alone: autograd runs what is on a CPU in the thread that asks."""
    previous, HERE.gpu = HERE.gpu, (arch, multiprocessors)
    try:
        yield
    finally:
        HERE.gpu = previous


def pretended() -> bool:
    """Is a GPU pretended, so that launches may take CPU tensors?"""
    return (HERE.gpu or _pretended) is not None


def arch_of(device: torch.device) -> Arch:
    """The row that serves `device`: the newest not newer than it; CPU tensors get INTERPRETER."""
    if gpu := HERE.gpu or _pretended:
        return gpu[0]
    if device.type == "cpu":
        return INTERPRETER
    return _arch_of_gpu(_index(device))


def capability_of(device: torch.device) -> int:
    """10 * major + minor of the GPU itself, which may be newer than its row; 0 for a CPU."""
    if gpu := HERE.gpu or _pretended:
        return gpu[0].capability
    return 0 if device.type == "cpu" else _capability(_index(device))


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side; 3 in the interpreter, so that persistent loops do loop."""
    if gpu := HERE.gpu or _pretended:
        return gpu[1]
    if device.type == "cpu":
        return 3
    return _multiprocessors(_index(device))
