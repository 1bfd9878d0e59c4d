"""Our epilogues on CUTLASS's main loops, as a yardstick in the same run: `cutlass`. It is
forward alone: its backward is what `fusedmlp` has.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ... import backend
from ...backends.cuda.loader import DTYPES
from ...backends.cutlass import loader
from ...backends.op import OPS, SIXTEEN_BITS
from ..work import Work
from .dense import Fusedmlp, capability_here


class Cutlass(Fusedmlp):
    name = "cutlass"
    ops = tuple(op for op in OPS if OPS[op].public and loader.kernels_of(op))
    phases = ("forward",)

    def skip(self, work: Work, phase: str) -> str | None:
        if reason := super().skip(work, phase):
            return reason
        taken = [DTYPES[dtype] for dtype in SIXTEEN_BITS]
        if work.dtype not in taken:
            return f"takes {' and '.join(taken)} only"
        if (extension := loader.load()[0]) is None:
            return loader.load()[1]
        capability = capability_here()
        if not capability:
            return "needs a GPU"
        (kernel,) = loader.kernels_of(work.case.op)
        launcher, why = loader.find(kernel, capability)
        if launcher is None:
            return why
        group = extension.GROUP if kernel.startswith("gated") else 8
        if work.D % 8 or work.H % group:
            return f"needs D to be a multiple of 8 and H one of {group}"
        if work.activation not in extension.ACTIVATIONS:
            return f"has no functor for {work.activation}"
        return None

    def in_force(self) -> AbstractContextManager[None]:
        return backend("cutlass")


RIVALS = (Cutlass(),)
