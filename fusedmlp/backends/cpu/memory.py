"""Memory of large gradients. malloc gives what is freed at the end of its heap back to the system
and asks for it anew at the next step, whose pages of 4 KiB are then made one by one as they are
written: 16 ms for 32 MiB, of huge ones 0.8 ms. Here a gradient's memory is of huge pages, and is
kept for the next gradient of its size once every tensor that shares it is gone.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import weakref
from math import prod

import torch
from torch import Tensor

# What is kept at most, in all, as malloc keeps up to 64 MiB; more is given back to the system.
MOST = 64 << 20
_free: dict[int, list[mmap.mmap]] = {}  # by size
_lent: dict[int, weakref.ref[memoryview]] = {}  # by id of the pages


def _mapped(size: int) -> mmap.mmap:
    """Zeros of the system, which cost nothing until they are written to."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of the system. Their storage cannot be resized."""
    pages = _mapped(prod(shape) * like.element_size())
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def lent(like: Tensor, *shape: int) -> tuple[Tensor, bool]:
    """Memory that comes back here when its storage, which cannot be resized, is gone; and whether
    it is new, all zeros of the system."""
    size = prod(shape) * like.element_size()
    try:
        pages, new = _free[size].pop(), False  # one operation: no other thread gets it too
    except (KeyError, IndexError):
        pages, new = _mapped(size), True
    view = memoryview(pages)  # the storage holds it, and nobody else does
    _lent[id(pages)] = weakref.ref(view, functools.partial(_back, pages))
    return torch.frombuffer(view, dtype=like.dtype).view(shape), new


def _back(pages: mmap.mmap, _: weakref.ref[memoryview]) -> None:
    del _lent[id(pages)]
    size = len(pages)
    if size + sum(n * len(own) for n, own in list(_free.items())) > MOST:
        _free.clear()  # sizes of models that are gone would stay for ever
    _free.setdefault(size, []).append(pages)
