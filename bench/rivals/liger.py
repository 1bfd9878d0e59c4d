"""linkedin/Liger-Kernel and flash-swiglu-mlp, which is built alike, as rivals."""

from __future__ import annotations

import importlib

import torch.nn.functional as F

from ..work import Work
from .dense import Function, Rival, recomputes

_OVERWRITES = "its backward overwrites what its forward saved, so it cannot be repeated alone"


class Liger(Rival):
    """Its Triton MLP, gate and up in one kernel. It wants (batch, tokens,
    D)."""

    name = "liger"
    ops = ("gated_linear", "gated_mlp")
    module = "liger_kernel.ops.mlp"
    activations = {"silu": "silu"}

    def skip(self, work: Work, phase: str) -> str | None:
        if recomputes(work):
            return "does not recompute"
        if work.case.op == "gated_linear" and phase != "forward":
            return "has gradients of the whole block only"
        return super().skip(work, phase) or (_OVERWRITES if phase == "backward" else None)

    def function(self, work: Work) -> Function:
        module = importlib.import_module("liger_kernel.ops.mlp")
        if work.case.op == "gated_linear":
            return lambda t: module.gemm_swiglu(
                t["x"].unsqueeze(0), t["w_gate"], t["w_up"], 1.0, False
            )[0].squeeze(0)
        block = module.LigerMLPFunction.apply
        return lambda t: block(t["x"].unsqueeze(0), t["w_gate"], t["w_up"], t["w_down"]).squeeze(0)


class FlashSwiGLU(Liger):
    """flash-swiglu-mlp, a twin of Liger's with TMA on Hopper and newer."""

    name = "flash-swiglu"
    module = "flash_swiglu_mlp.ops"

    def skip(self, work: Work, phase: str) -> str | None:
        row = work.torch_dtype.itemsize
        if work.D * row % 16 or work.H * row % 16:
            return "needs rows that are multiples of 16 bytes"
        return super().skip(work, phase)

    def function(self, work: Work) -> Function:
        module = importlib.import_module("flash_swiglu_mlp.ops")
        if work.case.op == "gated_linear":
            return lambda t: module.gemm_swiglu(
                t["x"].unsqueeze(0), t["w_gate"], t["w_up"], 1.0, False
            )[0].squeeze(0)
        block = module.flash_swiglu
        return lambda t: block(t["x"].unsqueeze(0), t["w_gate"], t["w_up"], t["w_down"]).squeeze(0)


class LigerElementwise(Rival):
    """Its act(g) * u kernel, behind cuBLAS."""

    name = "liger-elementwise"
    ops = ("gated_act", "gated_linear", "gated_mlp")
    module = "liger_kernel.ops"
    activations = {"silu": "LigerSiLUMulFunction", "gelu_tanh": "LigerGELUMulFunction"}

    def skip(self, work: Work, phase: str) -> str | None:
        if recomputes(work):
            return "does not recompute"
        reason = super().skip(work, phase)
        if reason is None and phase == "backward":
            return _OVERWRITES
        if reason is None and phase == "both" and work.case.op == "gated_act":
            return "its backward overwrites g and u, here the caller's own"
        return reason

    def function(self, work: Work) -> Function:
        act = getattr(importlib.import_module("liger_kernel.ops"), self.its(work.activation)).apply
        if work.case.op == "gated_act":
            return lambda t: act(t["g"], t["u"])
        hidden = lambda t: act(F.linear(t["x"], t["w_gate"]), F.linear(t["x"], t["w_up"]))  # noqa: E731
        if work.case.op == "gated_linear":
            return hidden
        return lambda t: F.linear(hidden(t), t["w_down"])


RIVALS = (Liger(), FlashSwiGLU(), LigerElementwise())
