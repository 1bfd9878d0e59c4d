"""The CUDA driver, asked directly where PyTorch does not tell: its version, and the context of a
thread."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any


@functools.cache
def _library() -> Any:
    """libcuda, or None on a machine without a driver."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@functools.cache
def version() -> int:
    """The newest CUDA that the driver runs, as 1000 * major + 10 * minor; 0 without a driver."""
    library, number = _library(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)):
        return 0
    return number.value


def _call(library: Any, name: str, *arguments: Any) -> None:
    error = getattr(library, name)(*arguments)
    if error:
        raise RuntimeError(f"fusedmlp: {name} of the CUDA driver failed with error {error}")


class _Thread(threading.local):
    def __init__(self) -> None:
        self.bound: set[int] = set()


_thread = _Thread()


def bind(device: int) -> None:
    """Give this thread the primary context of `device`, if it has none: once for each of both.

    A thread is born on device 0 and without a context. PyTorch's guards do nothing where the device
    is already right, and Triton encodes TMA descriptors before it looks for a context, so that an
    op which is a new thread's first CUDA call would fail.
    """
    if device in _thread.bound:
        return
    library, context, handle = _library(), ctypes.c_void_p(), ctypes.c_int()
    _call(library, "cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        _call(library, "cuDeviceGet", ctypes.byref(handle), device)
        _call(library, "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        _call(library, "cuCtxSetCurrent", context)
    _thread.bound.add(device)
