"""Our own CUDA kernels as providers beside `fusedmlp`, which is what auto takes: `fusedmlp-cuda` by
their own choice of variant, and one for each variant of bench/variants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ... import backend
from ...backends.cuda import loader
from ...backends.cuda.gated_linear import variant, variants
from ...kernels.arch.tile import SKINNY_M
from ...kernels.device import capability_of
from ..variants import CUDA, VARIANTS, provider
from ..work import Work
from .dense import Fusedmlp


@contextmanager
def cuda(name: str | None) -> Iterator[None]:
    """Inside, ops run on their CUDA kernels, in the variant `name` or as these choose."""
    with backend("cuda"), variant(name):
        yield


class Cuda(Fusedmlp):
    """variant: the one forced, or None."""

    ops = (*loader.ops_with_kernels(False), *loader.ops_with_kernels(True))

    def __init__(self, variant: str | None = None) -> None:
        self.name = CUDA if variant is None else provider(variant)
        self.variant, self.by_name = variant, variant is not None

    def skip(self, work: Work, phase: str) -> str | None:
        if reason := super().skip(work, phase):
            return reason
        kernels = loader.kernels_of(work.case.op)
        taken = [loader.DTYPES[d] for d in loader.dtypes_of(kernels[0]) if d in loader.DTYPES]
        if work.dtype not in taken:
            return f"takes {' and '.join(taken)} only"
        if loader.decoded(work.case.op) and (phase != "forward" or work.M > SKINNY_M):
            return f"serves inference of {SKINNY_M} rows or fewer"
        if work.D % 8 or work.H % 8:
            return "needs widths that are multiples of 8"
        capability = capability_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not capability:
            return "needs a GPU"
        for kernel in kernels:
            launcher, why = loader.find(kernel, capability)
            if launcher is None:
                return why
            if self.variant is not None:
                names = variants(kernel, capability)
                if self.variant not in names:
                    return f"{kernel} on {why} has variants {', '.join(names)}"
        if work.activation not in loader.load()[0].ACTIVATIONS:
            return f"has no functor for {work.activation}"
        return None

    def in_force(self) -> AbstractContextManager[None]:
        return cuda(self.variant)


RIVALS = (Cuda(), *map(Cuda, VARIANTS))
