"""Sizes of real models' MLPs, once. D: model width, H: hidden width; each from the model's
published config."""

from __future__ import annotations

from dataclasses import dataclass

from ..testing.moe import sized

# Tokens in a call: one sequence decoding, small batches, a prompt, training.
TOKENS = (1, 16, 64, 256, 2048, 8192, 16384)
# What runs when nobody asks for more: a decoding step and a prompt.
DEFAULT_TOKENS = (16, 4096)
DEFAULT_MODEL = "llama3-8b"


@dataclass(frozen=True)
class Model:
    """One model's MLP. experts, top_k: of a mixture of experts, whose H is that of one expert.
    hyper: a layer of HyperGLU instead, whose H is its heads."""

    name: str
    D: int
    H: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    experts: int | None = None
    top_k: int | None = None
    hyper: bool = False


_MODELS = (
    Model("llama2-7b", 4096, 11008),
    Model("llama3-8b", 4096, 14336),
    Model("llama3-70b", 8192, 28672),
    Model("llama3.2-1b", 2048, 8192),
    Model("llama3.2-3b", 3072, 8192),
    Model("mistral-7b", 4096, 14336),
    Model("phi3-mini", 3072, 8192),
    Model("qwen2.5-0.5b", 896, 4864),
    Model("qwen2.5-7b", 3584, 18944),
    Model("qwen3-0.6b", 1024, 3072),
    Model("qwen3-8b", 4096, 12288),
    Model("smollm2-135m", 576, 1536),
    Model("gemma-2b", 2048, 16384, "gelu_tanh"),
    Model("gemma2-9b", 3584, 14336, "gelu_tanh"),
    Model("gpt2", 768, 3072, "gelu_tanh", gated=False, bias=True),
    Model("gpt2-xl", 1600, 6400, "gelu_tanh", gated=False, bias=True),
    Model("bert-base", 768, 3072, "gelu", gated=False, bias=True),
    Model("minilm", 384, 1536, "gelu", gated=False, bias=True),
    # No model's own: few columns, where an elementwise kernel costs most beside its GEMM.
    Model("narrow", 1536, 4096),
    # Mixtures of experts.
    Model("switch-2048", 2048, 2048, experts=64, top_k=1),
    Model("llama4-scout", 5120, 8192, experts=16, top_k=1),
    Model("fine-grained", 2048, 768, experts=128, top_k=1),
    Model("mixtral-8x7b", 4096, 14336, experts=8, top_k=2),
    Model("qwen3-30b-a3b", 2048, 768, experts=128, top_k=8),
    Model("gpt-oss-20b", 2880, 2880, "swiglu_oai", bias=True, experts=32, top_k=4),
    Model("deepseek-v3", 7168, 2048, experts=256, top_k=8),
    # HyperGLU with its published defaults, in few heads and in many.
    Model("hyperglu-2", 1024, 2, hyper=True),
    Model("hyperglu-16", 1024, 16, hyper=True),
)

MODELS: dict[str, Model] = {model.name: model for model in _MODELS}
DENSE: dict[str, Model] = {m.name: m for m in _MODELS if m.experts is None and not m.hyper}
HYPER: dict[str, Model] = {m.name: m for m in _MODELS if m.hyper}
MOE: dict[str, Model] = {m.name: m for m in _MODELS if m.experts is not None}
# Tokens at which their baselines are measured.
MOE_TOKENS = (8192, 32768)
# Four sequences of 1024 to 16384 tokens; in decoding, eight caches of half as many.
HYPER_TOKENS = (4096, 8192, 16384, 32768, 65536)
# Widths of the comparison with baselines: from where fusing pays most to where it hardly can.
CAMPAIGN = ("narrow", "llama3.2-1b", "llama2-7b", "llama3-8b", "llama3-70b")


def cases_of(model: Model) -> tuple[str, ...]:
    """The testing.CASES that such a model calls, its own weights' layout and biases first."""
    if model.hyper:
        return ("hyper_attention-layer", "hyper_attention_step-layer")
    if model.experts:
        return tuple(sized(model.experts, model.top_k or 1, model.bias))
    if model.gated:
        return ("gated_act", "gated_linear", "gated_mlp")
    suffix = "-bias" if model.bias else ""
    return (f"linear_act{suffix}", f"mlp{suffix}")
