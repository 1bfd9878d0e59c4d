"""Whole tiny models of families whose configuration is made of the sizes below."""

from __future__ import annotations

import functools
import inspect

import torch
from families_build import SETTINGS, kinds
from families_scan import modeling
from torch import Tensor, nn

VOCABULARY = 99
SIZES = {
    "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "mlp_only_layers": [],
    "num_dense_layers": 0, "n_shared_experts": 1, "num_shared_experts": 1,
    "dense_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "share_expert_dim": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "router_jitter_noise": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
# One of each kind of gate, layout, router and block.
WHOLE = (
    "afmoe", "aria", "cohere2_moe", "deepseek_v3", "deepseek_v4", "glm4_moe", "gpt_oss",
    "granitemoe", "hy_v3", "hy_v4", "minimax_m3_vl", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe",
)  # fmt: skip


@functools.cache
def model(family: str) -> nn.Module:
    """Its ForCausalLM in float64, weights of variance 1 / width, of gate and up 16 times that."""
    (kind,) = (
        (cls, config)
        for config in kinds(family)
        for name, cls in vars(modeling(family)).items()
        if name.endswith("ForCausalLM") and inspect.isclass(cls) and cls.config_class is config
    )
    cls, config = kind
    every = SETTINGS | SIZES
    own = config(**{k: v for k, v in every.items() if k in config.__dataclass_fields__})
    own._experts_implementation = own._attn_implementation = "eager"
    torch.manual_seed(0)
    made = cls(own).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() > 1:
                scale = 4 if "gate_up" in name or "gate_proj" in name else 1
                p.copy_(scale * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return made


def results(made: nn.Module) -> dict[str, Tensor]:
    """Logits, loss and every gradient."""
    made.zero_grad()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=generator)
    out = made(ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = {f"d{k}": p.grad.clone() for k, p in made.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}
