"""The rivals of moe_mlp.

Its cases have these arguments, for M tokens, E experts, width D and hidden width H:

    x (M, D), expert (M,) or (M, k) int64, each token's chosen experts, prob, their probabilities,
    w_gate (E, H, D), w_up (E, H, D), w_down (E, D, H),

of which our own call makes a Routing and calls the op (fusedmlp/testing/moe.py); and one result,
(M, D): for each token the sum over its experts e of
prob * (act(x w_gate[e]') * (x w_up[e]')) w_down[e]'.
Weights are repacked, and indices brought to the type that a rival wants, in
`arguments`; what depends on the routing, sorting above all, is part of the call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.activations import resolve
from ..work import Work
from .dense import Arguments, Compiled, Function, Rival, in_turn, recomputes

# Past this a copy of the weights for every token leaves no room for anyone else on the GPU.
GATHERED_BYTES = 1 << 34


class Experts(Rival):
    ops = ("moe_mlp",)
    biased = False  # whether its experts may have biases

    def skip(self, work: Work, phase: str) -> str | None:
        reason = self.unfit(work) if work.case.op in self.ops else None
        return reason or super().skip(work, phase)

    def unfit(self, work: Work) -> str | None:
        """Why it cannot run this work of its own op; None if it can."""
        shapes = work.case.shapes(1, 8, 8)
        if "w_up" not in shapes and "packed" not in work.case.options:
            return "has gated experts only"
        if "b_down" in shapes and not self.biased:
            return "has no biases"
        return "does not recompute" if recomputes(work) else None


def _gate_up(inputs: Arguments) -> Tensor:
    """(E, 2 H, D): each expert's gate rows, then its up rows."""
    return torch.cat((inputs["w_gate"], inputs["w_up"]), 1)


def _choices(t: Tensor) -> Tensor:
    """(M, k), of one choice too."""
    return t.unsqueeze(1) if t.dim() == 1 else t


def _unaligned(work: Work) -> str | None:
    row = work.torch_dtype.itemsize
    odd = work.D * row % 16 or work.H * row % 16
    return "needs rows that are multiples of 16 bytes" if odd else None


def _grouped_mm() -> Callable[..., Tensor] | None:
    """Public since torch 2.10; the private one is the same kernel."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class GroupedMM(Experts):
    """torch's grouped GEMM over tokens sorted by expert, gate and up as one."""

    name = "grouped-mm"

    def unfit(self, work: Work) -> str | None:
        return super().unfit(work) or _unaligned(work)

    def missing(self) -> str | None:
        return None if _grouped_mm() else "this torch has no grouped GEMM"

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        kept = {name: inputs[name] for name in ("x", "expert", "prob", "w_down")}
        gate_up = _gate_up(inputs)
        numbers = torch.arange(len(gate_up), device=gate_up.device)
        return {**kept, "w_gate_up": gate_up, "numbers": numbers}

    def function(self, work: Work) -> Function:
        gemm, act = _grouped_mm(), resolve(work.activation)
        assert gemm is not None

        def call(t: Arguments) -> Tensor:
            expert, prob = _choices(t["expert"]), _choices(t["prob"])
            k = expert.shape[1]
            chosen, order = expert.flatten().sort()
            # Where each expert's rows end. bincount would wait for the GPU.
            ends = torch.searchsorted(chosen, t["numbers"], right=True, out_int32=True)
            rows = t["x"].index_select(0, order if k == 1 else order // k)
            gate, up = gemm(rows, t["w_gate_up"].mT, offs=ends).chunk(2, -1)
            y = gemm(act.phi(gate) * act.psi(up), t["w_down"].mT, offs=ends)
            back = torch.empty_like(y).index_copy_(0, order, y)
            scaled = back.view(-1, k, back.shape[1]) * prob.unsqueeze(2)
            return (scaled.squeeze(1) if k == 1 else scaled.sum(1)).to(t["x"].dtype)

        return call


class CompileGroupedMM(Compiled, GroupedMM):
    name = "compile-grouped-mm"

    def unfit(self, work: Work) -> str | None:
        # The grouped GEMM's shape function, which eager calls do not run, refuses all others.
        return "compiles in bfloat16 only" if work.dtype != "bfloat16" else super().unfit(work)


class HF(Experts):
    """One of transformers' implementations of experts, called as its models call it: through the
    dispatch of an experts module, here Mixtral's."""

    implementation = "eager"  # the module's own loop; any other is in ALL_EXPERTS_FUNCTIONS
    name = "hf-eager"
    module = "transformers.integrations.moe"
    activations = {
        "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu",
        "quick_gelu": "quick_gelu", "relu_sq": "relu2", "sigmoid": "sigmoid", "tanh": "tanh",
        "identity": "linear",
    }  # fmt: skip

    def waits(self, work: Work) -> bool:
        return self.implementation == "eager"  # it loops over the experts that were hit

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        return {
            "x": inputs["x"],
            "top_k_index": _choices(inputs["expert"]),
            "top_k_weights": _choices(inputs["prob"]),
            "gate_up_proj": _gate_up(inputs),
            "down_proj": inputs["w_down"],
        }

    def function(self, work: Work) -> Function:
        experts = self._module(work)

        def call(t: Arguments) -> Tensor:
            experts.gate_up_proj, experts.down_proj = t["gate_up_proj"], t["down_proj"]
            return experts(t["x"], t["top_k_index"], t["top_k_weights"])

        return call

    def _module(self, work: Work) -> Any:
        mixtral = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
        config = mixtral.MixtralConfig(
            hidden_size=work.D,
            intermediate_size=work.H,
            num_local_experts=work.case.shapes(work.M, work.D, work.H)["w_gate"][0],
            hidden_act=self.its(work.activation),
        )
        config._experts_implementation = self.implementation
        with torch.device("meta"):
            experts = mixtral.MixtralExperts(config)
        # Each call's weights take their place: gradients belong to those, not to a parameter here.
        del experts.gate_up_proj, experts.down_proj
        return experts


class HFGroupedMM(HF):
    implementation = "grouped_mm"
    name = "hf-grouped-mm"

    def unfit(self, work: Work) -> str | None:
        return super().unfit(work) or _unaligned(work)


class HFBatchedMM(HF):
    """It copies the chosen expert's weights for every token."""

    implementation = "batched_mm"
    name = "hf-batched-mm"

    def unfit(self, work: Work) -> str | None:
        gathered = 3 * work.rows * work.D * work.H * work.torch_dtype.itemsize
        if gathered > GATHERED_BYTES:
            return f"would copy {gathered / 1e9:.0f} GB of weights, an expert's for every token"
        return super().unfit(work)


class SonicMoE(Experts):
    """Dao-AILab/sonic-moe, from a routing that is given: its other entry chooses the experts too.
    Its packed weight has gate and up rows in turn, its weights have experts last."""

    name = "sonicmoe"
    module = "sonicmoe.functional"
    activations = {"silu": "SWIGLU", "relu": "REGLU", "gelu_tanh": "GEGLU"}

    def unfit(self, work: Work) -> str | None:
        if work.dtype == "float32":
            return "takes bfloat16 and float16 only"
        return super().unfit(work) or _unaligned(work)

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        x, expert = inputs["x"], _choices(inputs["expert"])
        token = torch.arange(len(x), dtype=torch.int32, device=x.device)
        return {
            "x": x,
            "prob": inputs["prob"].flatten(),
            "token": token.repeat_interleave(expert.shape[1]),
            "expert": expert.flatten().to(torch.int32),
            # Views: in memory experts stay outermost, as it wants them.
            "w1": in_turn(inputs["w_gate"], inputs["w_up"], 1).permute(1, 2, 0),
            "w2": inputs["w_down"].permute(1, 2, 0),
        }

    def function(self, work: Work) -> Function:
        run = importlib.import_module("sonicmoe.functional").moe_general_routing_inputs
        kinds = importlib.import_module("sonicmoe.enums").ActivationType
        activation = getattr(kinds, self.its(work.activation))

        def call(t: Arguments) -> Tensor:
            stream = torch.cuda.current_stream().cuda_stream if t["x"].is_cuda else 0
            return run(
                t["x"], t["prob"], t["token"], t["expert"], t["w1"], None, t["w2"], None,
                t["w1"].shape[-1], stream, activation,
                # Or a forward alone would write what only a backward reads.
                is_inference_mode_enabled=not torch.is_grad_enabled(),
            )[0]  # fmt: skip

        return call


class LigerMoE(Experts):
    """linkedin/Liger-Kernel's Triton experts."""

    name = "liger-moe"
    module = "liger_kernel.ops.fused_moe"
    activations = {"silu": "silu"}

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        return {
            "x": inputs["x"],
            "gate_up": _gate_up(inputs),
            "down": inputs["w_down"],
            "index": _choices(inputs["expert"]).to(torch.int32),
            "weight": _choices(inputs["prob"]),
        }

    def function(self, work: Work) -> Function:
        run = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction.apply
        return lambda t: run(t["x"], t["gate_up"], t["down"], t["index"], t["weight"])


RIVALS = (
    GroupedMM(), CompileGroupedMM(), HF(), HFGroupedMM(), HFBatchedMM(), SonicMoE(), LigerMoE(),
)  # fmt: skip
