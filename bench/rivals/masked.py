"""The rivals of masked_gated_linear: on fixed masks what computes it, and the gated linear of the
same widths with two weights, which it is to replace.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...ops.gated_linear import gated_linear
from ...reference.activations import resolve
from ..work import Work
from .dense import Arguments, Function, Rival
from .kernels.flash_mglu import flash_mglu_sums


def _masks(inputs: Arguments) -> Tensor:
    return reference.unpack_masks(inputs["masks"], inputs["w"].shape[1])


class FixedMasks(Rival):
    ops = ("masked_gated_linear",)

    def skip(self, work: Work, phase: str) -> str | None:
        if work.case.op in self.ops:
            if "masks" not in work.case.draws:
                return "is timed on fixed masks"
            if phase != "forward":
                return "has no gradient"
        return super().skip(work, phase)


class NaiveMasked(FixedMasks):
    """Two full products a mask, on weights masked in every call: the paper's Torch MGLU."""

    name = "naive-masked"

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        return {**inputs, "masks": _masks(inputs)}

    def function(self, work: Work) -> Function:
        gate = resolve(work.activation)

        def call(t: Arguments) -> Tensor:
            x, w = t["x"], t["w"]
            terms = [
                gate.phi(F.linear(x, w * m)) * gate.psi(F.linear(x, w * ~m)) for m in t["masks"]
            ]
            return torch.stack(terms).sum(0)

        return call


class FlashMGLU(FixedMasks):
    """The paper's kernel for one row: a byte of masks a weight, split sums by atomics."""

    name = "flash-mglu"

    def skip(self, work: Work, phase: str) -> str | None:
        reason = super().skip(work, phase)
        if reason is None and work.M != 1:
            return "takes one row"
        if reason is None and work.case.shapes(1, 8, 8)["masks"][2] > 8:
            return "has a byte for the masks of a weight"
        return reason

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        masks = _masks(inputs)
        bit = 2 ** torch.arange(len(masks), device=masks.device).view(-1, 1, 1)
        return {**inputs, "masks": (masks * bit).sum(0).to(torch.uint8)}

    def function(self, work: Work) -> Function:
        gate = resolve(work.activation)
        n_m = work.case.shapes(1, 8, 8)["masks"][2]

        def call(t: Arguments) -> Tensor:
            gates, values = flash_mglu_sums(t["x"], t["w"], t["masks"], n_m)
            return (gate.phi(gates) * gate.psi(values)).sum(0, keepdim=True).to(t["x"].dtype)

        return call


class TwoMatrixGLU(Rival):
    """gated_linear, whatever backend auto takes for it: a measure."""

    name = "two-matrix-glu"
    ops = ("masked_gated_linear",)
    trusted = True

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        x, w = inputs["x"], inputs["w"]
        generator = torch.Generator(w.device).manual_seed(0)
        up = torch.randn(w.shape, device=w.device, dtype=w.dtype, generator=generator)
        return {"x": x, "w_gate": w, "w_up": up / w.shape[1] ** 0.5}

    def function(self, work: Work) -> Function:
        return lambda t: gated_linear(t["x"], t["w_gate"], t["w_up"], activation=work.activation)


RIVALS = (NaiveMasked(), FlashMGLU(), TwoMatrixGLU())
