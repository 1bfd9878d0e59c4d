"""NVIDIA/cudnn-frontend's gated MLP as a rival: gate, up and activation in one kernel of cuDNN, for
Blackwell (nvidia-cudnn-frontend 1.32, read in its wheel). PyTorch's FlexGEMM fuses gates there too,
but has no gradients yet (torch 2.14.1), hence is no rival.
"""

from __future__ import annotations

import importlib

from ..work import Work
from .dense import Function, Rival, capability_here, recomputes


class Cudnn(Rival):
    """It keeps h, g and u, and tries plans in its first call of a shape."""

    name = "cudnn"
    ops = ("gated_mlp",)
    module = "cudnn.gemm"
    activations = {"silu": "swiglu_mlp", "situ": "situ_mlp"}

    def skip(self, work: Work, phase: str) -> str | None:
        if recomputes(work):
            return "does not recompute"
        if reason := super().skip(work, phase):
            return reason
        if work.dtype != "bfloat16":
            return "takes bfloat16 only"
        if not 100 <= capability_here() < 120:
            return "needs a GPU of compute capability 10 or 11"
        return None

    def function(self, work: Work) -> Function:
        block = getattr(importlib.import_module("cudnn.gemm"), self.its(work.activation))
        return lambda t: block(t["x"], t["w_gate"], t["w_up"], t["w_down"])


RIVALS = (Cudnn(),)
