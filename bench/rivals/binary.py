"""The rivals of one-bit weights in inference: the same numbers in 16
bits through cuBLAS, and GemLite, which reads one bit. llama.cpp's kernels round x to 8 bits: they
compute something else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...reference.activations import resolve
from ...reference.binary import GROUP
from ..work import Work
from .dense import Arguments, Function, Rival

OPS = ("binary_linear", "binary_gated_linear", "binary_gated_mlp")
Product = Callable[[Tensor], Tensor]


class Binary(Rival):
    """Made of one product a weight, with the activation by PyTorch."""

    ops = OPS

    def skip(self, work: Work, phase: str) -> str | None:
        if work.case.op in self.ops and phase != "forward":
            return "has no gradient of scales"
        return super().skip(work, phase)

    def product(self, qweight: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Product:
        raise NotImplementedError

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Any]:
        x = inputs["x"]
        made: dict[str, Any] = {"x": x}
        for name in inputs:
            if name.startswith("q_"):
                short = name[2:]
                width = work.H if short == "down" else work.D
                made[short] = self.product(inputs[name], inputs[f"s_{short}"], width, x.dtype)
        return made

    def function(self, work: Work) -> Function:
        gate = resolve(work.activation)

        def call(t: Any) -> Tensor:
            if work.case.op == "binary_linear":
                out: Tensor = t["weight"](t["x"])
                return out
            h = gate.phi(t["gate"](t["x"])) * gate.psi(t["up"](t["x"]))
            return h if work.case.op == "binary_gated_linear" else t["down"](h)

        return call


class Dequantised(Binary):
    """Weights of x's dtype, made beforehand: cuBLAS on 14 times the bytes."""

    name = "dequantised"

    def product(self, qweight: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Product:
        w = reference.dequantize_binary(qweight, scales, width).to(dtype)
        return lambda x: F.linear(x, w)


class GemLite(Binary):
    """Triton kernels over words of b, with w = 2 s (b - 1 / 2)."""

    name = "gemlite"
    module = "gemlite.core"

    def skip(self, work: Work, phase: str) -> str | None:
        if work.case.op in self.ops and work.dtype == "float32":
            return "takes bfloat16 and float16 only"
        if work.case.op in self.ops and (work.D % GROUP or work.H % GROUP):
            return f"needs widths that are multiples of {GROUP}"
        return super().skip(work, phase)

    def product(self, qweight: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Product:
        core = importlib.import_module("gemlite.core")
        kind = core.TORCH_TO_DTYPE[dtype]
        layer = core.GemLiteLinearTriton(
            1, group_size=GROUP, in_features=width, out_features=qweight.shape[0],
            input_dtype=kind, output_dtype=kind,
        )  # fmt: skip
        bits = reference.unpack_signs(qweight, width).to(torch.uint8)
        doubled = (2 * scales.to(dtype)).view(-1, 1)
        layer.pack(bits, doubled, torch.full_like(doubled, 0.5), None)
        return lambda x: layer(x)


RIVALS = (Dequantised(), GemLite())
