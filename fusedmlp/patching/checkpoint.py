"""A checkpoint's model without its weights: as from_pretrained would build it, on the meta device.

Dtypes and quantisation are by transformers' own rules, asked of transformers: which parameters stay
in float32, which modules a quantiser skips, where a configuration may hold its settings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Lists of what stays as it is, by the names that quantisers have for them.
_SKIPS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "exclude")


class _Quantised(nn.Module):
    """Stands where a quantiser will put a projection of its own."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.in_features = getattr(linear, "in_features", None) or getattr(linear, "nx", None)
        self.out_features = getattr(linear, "out_features", None) or getattr(linear, "nf", None)


def empty_model(folder: Path) -> nn.Module:
    """The model that a folder's config.json describes, as patch() would find it loaded."""
    import transformers

    # Never code that lies beside the configuration.
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = getattr(config, "architectures", None) or []
    cls = next((c for n in names if (c := getattr(transformers, n, None))), None)
    with torch.device("meta"):
        model: Any = (
            cls(config)
            if cls
            else transformers.AutoModel.from_config(config, trust_remote_code=False)
        )
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        model = _in_dtype(model, dtype)
    settings = _quantization(config)
    if settings.get("quant_method") == "fusedmlp":
        from .pretrained import OneBitConfig, OneBitQuantizer

        OneBitQuantizer(OneBitConfig(**settings)).preprocess_model(model)
    elif settings and not settings.get("dequantize"):
        _quantise(model, settings)
    return model


def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    model = model.to(dtype)
    if not hasattr(model, "_get_dtype_plan"):  # a release of transformers before it
        return model
    for pattern, other in model._get_dtype_plan(dtype).items():
        for name, p in model.named_parameters():
            if re.search(rf"(?:^|\.){pattern}(?:\.|$)", name):
                p.data = p.data.to(other)
    return model


def _quantization(config: Any) -> dict[str, Any]:
    """What the configuration holds, or its text model's, where transformers looks next."""
    found = getattr(config, "quantization_config", None)
    if not found and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if found and not isinstance(found, dict):
        found = found.to_dict()
    return found or {}


def _quantise(model: Any, settings: dict[str, Any]) -> None:
    method = settings.get("quant_method", "quantization_config")
    method = str(getattr(method, "value", method))
    skipped = [name for key in _SKIPS for name in settings.get(key) or ()]
    stays = _rule(model, skipped or None)
    only = [n for block in settings.get("modules_in_block_to_quantize") or () for n in block]
    kind = type("Linear", (_Quantised,), {"__module__": method})
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        if stays(name) or (only and not any(name.endswith(n) for n in only)):
            continue
        model.set_submodule(name, kind(module))


def _rule(model: Any, skipped: list[str] | None) -> Any:
    """name -> whether the module stays as it is."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    plain = None if skipped is None else [n for n in skipped if not n.startswith("re:")]
    regular = [re.compile(n[3:]) for n in skipped or () if n.startswith("re:")]
    kept = getattr(model, "_keep_in_fp32_modules", None)
    patterns = HfQuantizer.get_modules_to_not_convert(model, plain, kept)

    def stays(name: str) -> bool:
        if any(pattern.match(name) for pattern in regular):
            return True
        return not should_convert_module(name, patterns)

    return stays
