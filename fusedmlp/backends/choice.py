"""Which implementation runs, and why: "triton", "cuda", "cutlass" or "reference".

`auto`, the default, takes the PyTorch reference for CPU tensors; for CUDA tensors the CUDA kernels
that `loader.PROVEN` names, where they take the tensors, and else Triton. On a CUDA tensor the
reference runs only when asked for, and a backend that cannot run the tensors at hand raises. The
choice is process-wide, like torch.backends: autograd's worker threads must see it too. That of a
dry run holds in its thread alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..invariance import invariant
from ..kernels.arch.tile import SKINNY_M
from ..kernels.device import HERE, INTERPRETED, pretended
from ..transforms import transformed
from .cuda import loader
from .cutlass import loader as cutlass
from .op import TRITON_DTYPES, Kernel

_F = TypeVar("_F", bound=Callable[..., Any])
BACKENDS = ("auto", "triton", "cuda", "cutlass", "reference")


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_chosen: str = _known(os.environ.get("FUSEDMLP_BACKEND", "auto"), "FUSEDMLP_BACKEND")


def _choose(name: str) -> str:
    """Put `name` in force; returns what was."""
    global _chosen
    previous = chosen()
    if HERE.backend:
        HERE.backend = name
    else:
        _chosen = name
    return previous


@contextmanager
def choose_here(name: str) -> Iterator[None]:
    """Inside, `name` is in force in this thread alone, and so is what `backend` chooses."""
    previous, HERE.backend = HERE.backend, name
    try:
        yield
    finally:
        HERE.backend = previous


class backend(ContextDecorator):  # noqa: N801 - it is used like a function
    """Run on one backend from here on: "auto", "triton", "cuda", "cutlass" or "reference". In a
    `with`, or as a decorator, until its end.

    Process-wide while it is in force. A backend that cannot run the given tensors raises; it never
    falls back. Raises ValueError for an unknown name. "cuda" and "cutlass" hold some of an op's
    kernels, and Triton runs its others: "cutlass" the forward products of `linear_act`,
    `gated_linear` and the MLPs made of them.

    Examples:
        >>> import torch, fusedmlp
        >>> g, u = torch.randn(2, 4, 64)
        >>> with fusedmlp.backend("reference"):  # plain PyTorch, to compare with
        ...     fusedmlp.gated_act(g, u).shape
        torch.Size([4, 64])
        >>> fusedmlp.backend("auto")  # for the rest of the program
        backend('auto')
        >>> with fusedmlp.backend("fast"):
        ...     pass
        Traceback (most recent call last):
        ValueError: ...
    """

    def __init__(self, name: str) -> None:
        self._previous = _choose(_known(name, "backend"))
        self._name = name

    def __enter__(self) -> None:
        """It is in force since it was made."""

    def __exit__(self, *_: object) -> None:
        _choose(self._previous)

    def __call__(self, function: _F) -> _F:
        self.__exit__()  # a decorator is in force during calls alone
        return super().__call__(function)

    def _recreate_cm(self) -> backend:
        return type(self)(self._name)

    def __repr__(self) -> str:
        return f"backend({self._name!r})"


def always_reference(x: Tensor) -> bool:
    """Whether every op runs its reference on `x`. Inside transforms of torch.func and forward-mode
    AD it does, whatever was chosen: kernels have no tangents."""
    name = HERE.backend or _chosen
    return name == "reference" or (name == "auto" and not x.is_cuda) or transformed()


def for_cpu(x: Tensor) -> bool:
    """Whether an op that runs its reference on `x` may take what backends/cpu has in its place. A
    reference that was asked for is the formula itself, and so is one inside batch_invariant()."""
    if (HERE.backend or _chosen) != "auto" or not (x.is_cpu or x.is_meta):
        return False
    return not (invariant() or transformed())


def pick(op: str, x: Tensor, name: str = "x") -> str:
    """Return the backend for `op`: "triton", "cuda", "cutlass" or "reference". `x` is a sample
    tensor, and `name` is what errors call it.

    Between triton and cuda each kernel chooses again at its launch (`launcher`), which compiled
    code and autograd reach without coming through here.
    """
    if always_reference(x):
        if invariant():
            _promised(op, x, name)
        return "reference"
    chosen = HERE.backend or _chosen
    if chosen == "cuda":
        if not torch.compiler.is_compiling():
            for kernel in loader.kernels_of(op) or (None,):
                loader.require(op, kernel, x)
        return "cuda"
    if chosen == "cutlass":
        if not torch.compiler.is_compiling():
            for kernel in cutlass.kernels_of(op) or (None,):
                cutlass.require(op, kernel, x)
        return "cutlass"
    if not x.is_cuda and not INTERPRETED and not pretended():
        raise RuntimeError(
            f"{op}: backend 'triton' needs CUDA tensors, got {x.device.type}; for Triton's "
            "interpreter on CPU tensors set TRITON_INTERPRET=1 before Python starts"
        )
    if x.dtype not in TRITON_DTYPES:
        raise TypeError(
            f"{op}: {name} must be bfloat16, float16 or float32 on backend 'triton', got "
            f"{x.dtype}; backend('reference') takes any floating dtype"
        )
    if chosen == "auto" and loader.PROVEN and not torch.compiler.is_compiling():
        kernels = loader.kernels_of(op)
        if kernels and all(loader.proven(kernel, x) for kernel in kernels):
            return "cuda"
    return "triton"


def _promised(op: str, x: Tensor, name: str) -> None:
    """Raise RuntimeError where batch_invariant() asks the reference for what it cannot promise."""
    want, got = f"{name} must be", f"a tensor on {x.device.type}"
    if transformed():
        want, got = "it must run", "a transform of torch.func or forward-mode AD"
    elif torch.compiler.is_compiling():
        want, got = "it must run", "torch.compile on CPU tensors"
    elif x.device.type in ("cpu", "meta"):
        return
    raise RuntimeError(
        f"{op}: inside batch_invariant() {want} "
        + ("outside of transforms and uncompiled" if want == "it must run" else "on the CPU")
        + f" for backend 'reference', got {got}; leave batch_invariant(), or use backend('triton')"
    )


# kernel -> which of its launchers ran last, and where it was not the one preferred, why.
SERVED: dict[str, str] = {}


def launcher(row: Kernel, triton: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's launchers of csrc/ and `triton`, its other one, as one, which chooses when it is
    called. Those of csrc/ raise `loader.Unfit` before anything is enqueued."""
    kernel = row.name
    cuda, few_rows = row.cuda_row.launch, row.cuda_row.few_rows

    @functools.wraps(triton)
    def launch(x: Tensor, *args: Any) -> Any:
        SERVED[kernel], chosen = "triton", HERE.backend or _chosen
        by_cutlass = chosen == "cutlass" and row.cutlass is not None
        if (chosen == "cuda" or by_cutlass) and invariant():
            raise loader.Unfit(
                f"{kernel}: backend must be 'auto' or 'triton' inside batch_invariant(), got "
                f"{chosen!r}, whose schedule goes by the number of rows; use backend('triton')"
            )
        if chosen == "cuda":
            result = cuda(loader.require(kernel, kernel, x), x, *args)
            SERVED[kernel] = "cuda"
            return result
        if by_cutlass:
            assert row.cutlass is not None
            result = row.cutlass(x, *args)
            SERVED[kernel] = "cutlass"
            return result
        proven = loader.proven(kernel, x) if chosen == "auto" and not invariant() else None
        if proven is not None:
            try:
                if not few_rows and x.shape[0] <= SKINNY_M:
                    raise loader.Unfit(
                        f"{kernel}: at {SKINNY_M} rows or fewer Triton cuts K as well"
                    )
                result = cuda(proven, x, *args)
            except loader.Unfit as unfit:
                SERVED[kernel] = f"triton, not cuda: {unfit}"
            else:
                SERVED[kernel] = "cuda"
                return result
        return triton(x, *args)

    return launch


def elsewhere(here: str) -> str | None:
    """What CUDA tensors would take, where `here`, on a CPU, is the reference for want of a GPU."""
    return "triton" if here == "reference" and chosen() == "auto" else None


def chosen() -> str:
    """The name in force: what `backend()` or FUSEDMLP_BACKEND asked for."""
    return HERE.backend or _chosen
