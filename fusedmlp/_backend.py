"""Which implementation runs, and why: "triton", "cuda" or "reference".

`auto`, the default, takes Triton for CUDA tensors and the PyTorch reference for CPU tensors. On a
CUDA tensor the reference runs only when asked for, and a backend that cannot run the tensors at
hand raises. The choice is process-wide, like torch.backends: autograd's worker threads must see it
too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

BACKENDS = ("auto", "triton", "cuda", "reference")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Triton decides at import whether @triton.jit makes interpreted functions; so it is read once,
# here.
INTERPRETED: bool = triton.knobs.runtime.interpret


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_chosen: str = _known(os.environ.get("FUSEDMLP_BACKEND", "auto"), "FUSEDMLP_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run everything inside on one backend: "auto", "triton", "cuda" or "reference".

    Process-wide while it is open. A backend that cannot run the given tensors raises; it never
    falls back. Raises ValueError for an unknown name.
    """
    global _chosen
    previous, _chosen = _chosen, _known(name, "backend")
    try:
        yield
    finally:
        _chosen = previous


def pick(op: str, x: Tensor) -> str:
    """The backend that runs `op` on tensors like `x`: "triton" or "reference"."""
    on_gpu = x.is_cuda
    if _chosen == "reference" or (_chosen == "auto" and not on_gpu):
        return "reference"
    if _chosen == "cuda":
        raise RuntimeError(
            f"{op}: backend 'cuda' was asked for, but this build holds no CUDA kernel of {op}; "
            "use backend('auto') or backend('triton')"
        )
    if not on_gpu and not INTERPRETED:
        raise RuntimeError(
            f"{op}: backend 'triton' needs CUDA tensors, got {x.device.type}; for Triton's "
            "interpreter on CPU tensors set TRITON_INTERPRET=1 before Python starts"
        )
    if x.dtype not in TRITON_DTYPES:
        raise TypeError(
            f"{op}: x must be bfloat16, float16 or float32 on backend 'triton', got {x.dtype}; "
            "backend('reference') takes any floating dtype"
        )
    return "triton"


def chosen() -> str:
    """The name in force: what `backend()` or FUSEDMLP_BACKEND asked for."""
    return _chosen
