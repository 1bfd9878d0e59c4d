"""One small model of a model type of transformers, and patched blocks beside their own forwards."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import nn

from fusedmlp.patching.dense import Dense
from fusedmlp.patching.plan import child
from fusedmlp.patching.swap import Patched

LARGEST = 30_000_000  # parameters of a model with values
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size",
                     "word_embed_proj_dim", "projection_dim", "conv_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim",
                     "ffn_hidden_size", "hidden_dim", "moe_intermediate_size", "n_inner",
                     "shared_expert_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
                     "decoder_layers", "num_decoder_layers", "depth", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads",
                     "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_mel_bins": 8, "image_size": 32, "patch_size": 8,
    "max_source_positions": 16, "max_target_positions": 16,
}  # fmt: skip


def small(cls: Any, **changes: Any) -> Any:
    """A small configuration, and of it those of its parts."""
    takes = set(inspect.signature(cls.__init__).parameters) | set(vars(cls))
    with contextlib.suppress(Exception):
        takes |= set(vars(cls()))
    takes |= set(getattr(cls, "attribute_map", {}))
    own = {k: v for k, v in (_SMALL | changes).items() if k in takes}
    for name, kind in (getattr(cls, "sub_configs", None) or {}).items():
        if inspect.isclass(kind) and hasattr(kind, "model_type") and kind.model_type:
            own[name] = small(kind).to_dict()
    return cls(**own)


def built(cls: Any, model_class: Any) -> nn.Module | None:
    """Small on the CPU; else, of its own sizes and perhaps two layers, on meta."""
    layers = {k: 2 for k, v in _SMALL.items() if v == 2 and "layer" in k}
    for config in (
        lambda: small(cls),
        lambda: small(cls, num_key_value_heads=2),
        lambda: cls(**{k: v for k, v in layers.items() if hasattr(cls(), k)}),
        cls,
    ):
        with contextlib.suppress(Exception):
            with torch.device("meta"):
                model: nn.Module = model_class._from_config(config())
            if sum(p.numel() for p in model.parameters()) > LARGEST:
                return model
            with contextlib.suppress(Exception):
                return model_class._from_config(config())
            return model
    return None


def difference(model: nn.Module) -> float | None:
    """The largest difference between a dense block and its own forward, in eval and in training
    with the same seed, of outputs of about 1; of each kind of block once."""
    found: list[float] = []
    seen: set[object] = set()
    for block in model.modules():
        plan = getattr(type(block), "_plan", None)
        if not isinstance(block, Patched) or not isinstance(plan, Dense):
            continue
        if next(block.parameters()).is_meta:
            return None
        first = child(block, plan.first[0])
        width: Any = getattr(first, "in_features", None) or getattr(first, "nx", 0)
        if (type(block), width) not in seen:
            seen.add((type(block), width))
            found += _differences(block, plan, torch.randn(2, 5, width))
    return max(found, default=None)


def _differences(block: Any, plan: Dense, x: torch.Tensor) -> list[float]:
    own: Any = plan.original(block._own_class)
    args = [x] if plan.cut is None else [x] * len(plan.cut.names)
    ours = getattr(block, plan.method if plan.cut is None else "_fused_run")
    was = {m: m.training for m in block.modules()}
    found = []
    for training in (False, True):
        block.train(training)
        outs = []
        for run in (lambda: own(block, *args), lambda: ours(*args)):
            torch.manual_seed(0)
            with torch.no_grad():
                outs.append(run())
        found.append(float((outs[0] - outs[1]).abs().max() / outs[0].abs().max().clamp(1)))
    for m, mode in was.items():
        m.training = mode
    return found
