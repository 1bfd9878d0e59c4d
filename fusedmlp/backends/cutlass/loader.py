"""The optional extension `fusedmlp._cutlass`, built from csrc/cutlass/ where the package
nvidia-cutlass is: imported once, when it is first asked for.

It is a yardstick beside our own kernels, and what to fall back on where one of them fails: `auto`
never takes it. Where it cannot serve a call of an op that has such a kernel, the error is `Unfit`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...kernels.device import capability_of
from ..cuda.loader import Unfit, serves, too_old
from ..op import OPS, SIXTEEN_BITS

_REMEDY = (
    "reinstall fusedmlp with nvcc on PATH, FUSEDMLP_CUDA=1 and FUSEDMLP_CUTLASS=1, which takes "
    "the headers of nvidia-cutlass 4.2"
)


@functools.cache
def load() -> tuple[Any, str]:
    """(the extension, ""), or (None, why there is none)."""
    if importlib.util.find_spec("fusedmlp._cutlass") is None:
        return None, f"the extension by CUTLASS is not built: {_REMEDY}"
    try:
        return importlib.import_module("fusedmlp._cutlass"), ""
    except Exception as error:  # a broken file may raise anything
        return None, f"the extension by CUTLASS cannot be loaded ({error}): {_REMEDY}"


def kernels_of(op: str) -> tuple[str, ...]:
    """The kernels of csrc/cutlass/ that `op` launches; () where it has none."""
    return tuple(k.name for k in OPS[op].kernels if k.cutlass) if op in OPS else ()


def find(kernel: str, capability: int) -> tuple[Callable[..., None] | None, str]:
    """(launcher, its architecture) of `kernel` for such a GPU, or (None, why there is none)."""
    extension, why = load()
    if extension is None:
        return None, why
    for name, arch in extension.OPS:
        if name == kernel and serves(arch, capability):
            lack = too_old(extension, capability)
            return (None, f"it {lack}") if lack else (extension.OPS[kernel, arch], arch)
    return None, (
        f"the extension by CUTLASS holds {kernel} for {extension.ARCHS}, and this GPU is "
        f"sm_{capability}; it serves sm_90a (H100, H200) and sm_100f (B200, B300)"
    )


def unfit(op: str, needed: str, got: str) -> Unfit:
    return Unfit(f"{op}: backend 'cutlass' needs {needed}, got {got}; backend('triton') takes it")


def require(op: str, kernel: str | None, x: Tensor) -> tuple[Callable[..., None], str]:
    """The launcher of `kernel` for tensors like x, and its architecture; Unfit or TypeError says
    what `op` lacks. kernel: None where the op has none by CUTLASS."""
    capability = capability_of(x.device)
    launcher, found = None, "it has no kernel by CUTLASS"
    if kernel is not None and not capability:
        found = f"it needs CUDA tensors, got {x.device.type}"
    elif kernel is not None:
        launcher, found = find(kernel, capability)
    if launcher is None:
        raise Unfit(
            f"{op}: backend 'cutlass' was asked for, but {found}; or use backend('auto')"
            + (" or backend('triton')" if x.is_cuda else "")
        )
    if x.dtype not in SIXTEEN_BITS:
        raise TypeError(
            f"{op}: x must be bfloat16 or float16 on backend 'cutlass', got {x.dtype}; "
            "backend('triton') takes float32 too, backend('reference') any floating dtype"
        )
    return launcher, found


def describe(capability: int) -> str:
    """For explain(): whether it was built, and for whom; capability: of the GPU at hand, or 0."""
    extension, why = load()
    if extension is None:
        return f"cutlass backend: none: {why}"
    text = f"cutlass backend: built with CUTLASS {extension.CUTLASS}, CUDA {extension.CUDA} for "
    text += " ".join(sorted({arch for _, arch in extension.OPS}))
    kernels = sorted({kernel for kernel, _ in extension.OPS})
    if capability and find(kernels[0], capability)[0] is None:
        return f"{text}; {find(kernels[0], capability)[1]}"
    return f"{text}, opt-in by backend('cutlass'): {', '.join(kernels)}"
