"""The optional CUDA extension `fusedmlp._C`: imported once, when it is first asked for. Why it
cannot serve is remembered and said with the remedy.

A kernel here is a registered op (`gated_linear_fwd`), as in `_C.OPS`, which maps (kernel,
architecture) to its launcher.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.device import capability_of
from .. import driver
from ..op import KERNELS, OPS

# (kernel, architecture) that bench/results/ holds a passing check of, on such a GPU: these `auto`
# takes. The others are opt-in by backend("cuda").
PROVEN: frozenset[tuple[str, str]] = frozenset()
# As the extension calls them.
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

_REMEDY = "reinstall fusedmlp with nvcc on PATH and FUSEDMLP_CUDA=1"


class Unfit(ValueError):
    """Good arguments of the op that this kernel does not take: sizes, strides, addresses; or a
    driver that does not run it."""


def unfit(op: str, needed: str, got: str) -> Unfit:
    return Unfit(f"{op}: backend 'cuda' needs {needed}, got {got}; backend('triton') takes it")


@functools.cache
def load() -> tuple[Any, str]:
    """(the extension, ""), or (None, why there is none)."""
    if importlib.util.find_spec("fusedmlp._C") is None:
        return None, f"the CUDA extension is not built: {_REMEDY}"
    try:
        return importlib.import_module("fusedmlp._C"), ""
    except Exception as error:  # a broken file may raise anything
        return None, f"the CUDA extension cannot be loaded ({error}): {_REMEDY}"


def available() -> bool:
    """Is the extension there? It may still hold nothing for the GPU at hand."""
    return load()[0] is not None


def kernels_of(op: str) -> tuple[str, ...]:
    """The kernels of csrc/ that `op` launches, the forward's first; () where it has none."""
    return tuple(kernel.name for kernel in OPS[op].cuda) if op in OPS else ()


def ops_with_kernels(portable: bool) -> dict[str, tuple[str, ...]]:
    """op -> its kernels, of the ops whose kernels have an architecture's own instructions, or of
    those whose kernels have none."""
    return {
        name: kernels_of(name)
        for name, op in OPS.items()
        if op.cuda and op.cuda[0].cuda_row.portable == portable
    }


def decoded(op: str) -> bool:
    """Do its kernels of csrc/ serve inference of few rows alone?"""
    return any(kernel.cuda_row.decodes for kernel in OPS[op].cuda)


def dtypes_of(kernel: str) -> tuple[torch.dtype, ...]:
    """What the first tensor of a call may be."""
    return KERNELS[kernel].cuda_row.dtypes


def natively(arch: str, capability: int) -> bool:
    """Does machine code for `arch` run on such a GPU? That of sm_90a on 9.0 alone, that of sm_100f
    and of sm_80 on newer ones of the same major version too."""
    number = int(arch.strip("sm_af"))
    if arch.endswith("a"):
        return number == capability
    return number <= capability and number // 10 == capability // 10


def serves(arch: str, capability: int) -> bool:
    """Natively, or by PTX, which plain architectures have: sm_80 is for 8.0 and all that is
    newer."""
    number = arch.removeprefix("sm_")
    return natively(arch, capability) or (number.isdigit() and int(number) <= capability)


def _needed(extension: Any, capability: int) -> int:
    """The oldest driver, numbered as `driver.version` is, that runs the extension's code on such a
    GPU. One of the same major version runs machine code, but does not compile newer PTX."""
    major, minor = map(int, extension.CUDA.split(".")[:2])
    by_ptx = not any(natively(arch, capability) for arch in extension.ARCHS.split())
    return 1000 * major + (10 * minor if by_ptx else 0)


def too_old(extension: Any, capability: int) -> str:
    """What such a call needs of the driver and what is there, if it is older; else nothing."""
    have = driver.version()
    if not have or have >= (need := _needed(extension, capability)):
        return ""
    text = (
        f"needs an NVIDIA driver for CUDA {need // 1000}.{need % 1000 // 10} or newer, got one for"
    )
    return f"{text} CUDA {have // 1000}.{have % 1000 // 10}"


def _refusing(kernel: str, why: str) -> Callable[..., None]:
    def refuse(*numbers: Any) -> None:
        raise Unfit(f"{kernel}: backend 'cuda' {why}; backend('triton') runs")

    return refuse


@functools.cache
def find(kernel: str, capability: int) -> tuple[Callable[..., None] | None, str]:
    """(launcher, its architecture) of `kernel` for such a GPU, or (None, why there is none). With a
    driver that is too old the launcher raises Unfit."""
    extension, why = load()
    if extension is None:
        return None, why
    archs = [arch for name, arch in extension.OPS if name == kernel]
    for arch in archs:
        if serves(arch, capability):
            lack = too_old(extension, capability)
            return _refusing(kernel, lack) if lack else extension.OPS[kernel, arch], arch
    if archs:
        own = any(not arch.removeprefix("sm_").isdigit() for arch in archs)
        note = (
            ", but code for sm_NNa runs on that very capability alone, and for sm_NNf on it and "
            "newer ones of its major version"
        )
        note = note if own else ""
        return None, (
            f"the CUDA extension holds {kernel} for {', '.join(archs)}, and this GPU is "
            f"sm_{capability}{note}"
        )
    return None, (
        f"the CUDA extension holds no {kernel}: it was built for {extension.ARCHS}; "
        f"{_REMEDY}, and with FUSEDMLP_CUDA_ARCHS if it must serve another GPU"
    )


def require(op: str, kernel: str | None, x: Tensor) -> Callable[..., None]:
    """The launcher of `kernel` for tensors like x; RuntimeError or TypeError says what `op` lacks.

    kernel: None where no CUDA kernel of the op was ever written.
    """
    capability = capability_of(x.device)
    if kernel is None:
        launcher, why = None, "it has no CUDA kernel"
    elif not capability:
        launcher, why = None, f"it needs CUDA tensors, got {x.device.type}"
    else:
        launcher, why = find(kernel, capability)
    if launcher is None or kernel is None:
        raise RuntimeError(
            f"{op}: backend 'cuda' was asked for, but {why}; or use backend('auto')"
            + (" or backend('triton')" if x.is_cuda else "")
        )
    taken = dtypes_of(kernel)
    if x.dtype not in taken:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in taken)
        raise TypeError(
            f"{op}: x must be {names} on backend 'cuda', got {x.dtype}; backend('triton') takes "
            "float32 too, backend('reference') any floating dtype"
        )
    return launcher


def proven(kernel: str, x: Tensor) -> Callable[..., None] | None:
    """The launcher of `kernel` for tensors like x if `auto` may take it."""
    if not PROVEN or x.dtype not in dtypes_of(kernel):
        return None
    launcher, arch = find(kernel, capability_of(x.device))
    return launcher if (kernel, arch) in PROVEN else None


def describe(capability: int) -> list[str]:
    """For explain(): what the extension holds, and for whom; capability: of the GPU at hand, or
    0."""
    extension, why = load()
    if extension is None:
        return [f"cuda backend: none: {why}"]
    lines = [f"cuda backend: built with CUDA {extension.CUDA} for {extension.ARCHS}"]
    groups: dict[str, list[str]] = {}
    for kernel, arch in sorted(extension.OPS):
        if not capability:
            use = "needs such a GPU"
        elif not serves(arch, capability):
            use = f"not for this GPU, sm_{capability}"
        elif lack := too_old(extension, capability):
            use = lack
        elif (kernel, arch) in PROVEN:
            use = "taken by auto where it takes the tensors"
        else:
            use = "opt-in by backend('cuda'): no device record has passed yet"
        groups.setdefault(f"{arch}, {use}", []).append(kernel)
    return lines + [f"  {group}: {', '.join(kernels)}" for group, kernels in groups.items()]
