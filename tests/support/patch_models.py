"""Tiny models of the architectures that patch() is for: two layers of width 64, random weights, built
from their configurations; nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as hf
from torch import nn

import fusedmlp
from fusedmlp.patching.swap import Patched

VOCABULARY = 99
_BASE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "attention_dropout": 0.0,
}  # fmt: skip
_GROUPED = _BASE | {"num_key_value_heads": 2, "head_dim": 16}
_SWITCH = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "num_heads": 4, "num_experts": 4,
    "vocab_size": VOCABULARY, "dropout_rate": 0.0, "router_jitter_noise": 0.0,
    "expert_capacity": 3, "eos_token_id": None, "decoder_start_token_id": 0,
}  # fmt: skip
_LLAMA4 = _GROUPED | {
    "intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 2,
    "attn_temperature_tuning": False,
}  # fmt: skip

# name -> class, configuration, its arguments, and the ops and activation of its layers
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _GROUPED | {"mlp_bias": True}, {"gated_mlp"}, "silu"),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, _GROUPED, {"gated_mlp"}, "silu"),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, _BASE | {"num_key_value_heads": 2}, {"gated_mlp"}, "silu"),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, _GROUPED, {"gated_mlp"}, "silu"),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, _GROUPED, {"gated_mlp"}, "gelu_tanh"),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, _GROUPED, {"gated_mlp"}, "gelu_tanh"),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, _GROUPED, {"gated_mlp"}, "gelu_tanh"),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, _BASE | {"num_key_value_heads": 2}, {"gated_mlp"}, "silu"),
    "olmo": (hf.OlmoForCausalLM, hf.OlmoConfig, _BASE, {"gated_mlp"}, "silu"),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, _BASE, {"mlp"}, "gelu"),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config,
             {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1,
              "eos_token_id": None, "pad_token_id": 0}, {"mlp"}, "gelu_tanh"),
    "bert": (hf.BertForMaskedLM, hf.BertConfig,
             _BASE | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, {"mlp"}, "gelu"),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig,
            {k: v for k, v in _BASE.items() if k.startswith(("hidden", "inter", "num"))}
            | {"image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0,
               "attention_probs_dropout_prob": 0.0}, {"mlp"}, "gelu"),
    "switch": (hf.SwitchTransformersForConditionalGeneration, hf.SwitchTransformersConfig, _SWITCH,
               {"mlp", "moe_mlp"}, "relu"),
    "llama4": (hf.Llama4ForCausalLM, hf.Llama4TextConfig, _LLAMA4, {"gated_mlp", "moe_mlp"}, "silu"),
}  # fmt: skip

# One model of each kind of block: gated, packed, plain, Conv1D, spread, experts.
_ONE = {"num_hidden_layers": 1}
KINDS = {
    "llama": _ONE, "phi3": _ONE, "gpt2": {"n_layer": 1}, "bert": _ONE,
    "switch": {"num_layers": 1, "num_decoder_layers": 1, "num_experts": 2, "d_ff": 32},
    "llama4": _ONE
    | {"interleave_moe_layer_step": 1, "num_local_experts": 2, "intermediate_size": 32},
}  # fmt: skip


def build(name: str, **changes) -> nn.Module:
    """The model, weights of variance 1 / width instead of the library's 0.02: gradients count."""
    cls, config, arguments, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = cls(config(**{**arguments, **changes}))
    model.config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
            elif key.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator) / 8)
    return model


def batch(name: str, rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randint(2, VOCABULARY, s, generator=generator)  # noqa: E731
    if name == "vit":
        pixels = torch.randn(rows, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % 2}
    ids = draw(rows, length)
    return {"input_ids": ids, "labels": draw(rows, length) if name in ("bert", "switch") else ids}


def first_block(name):
    """The first patched block, the most complex of the model's kinds, and its method."""
    model = build(name, **KINDS[name]).eval()
    fusedmlp.patch(model)
    blocks = [m for m in model.modules() if isinstance(m, Patched)]
    block = max(blocks, key=lambda m: m._plan.op == "moe_mlp")
    return block, getattr(block, block._plan.method)


def values(y):
    return y[0] if isinstance(y, tuple) else y


def decode(run, model, ids, new):
    """Prefill, then token by token into a static cache; the logits of every step."""
    cache = hf.StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
    logits, length = [], ids.shape[1]
    position = torch.arange(length)
    for _ in range(new):
        out = run(ids, past_key_values=cache, use_cache=True, position_ids=position.unsqueeze(0))
        logits.append(out.logits[:, -1])
        ids, position = logits[-1].argmax(-1, keepdim=True), position[-1:] + 1
    return torch.stack(logits)
