"""One-bit models by save_pretrained and from_pretrained: the quantiser "fusedmlp" of transformers.

    fusedmlp.quantize_model(model)
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)

| in config.json | |
|---|---|
| quantization_config.quant_method | "fusedmlp" |
| quantization_config.format | "q1_0" |
| quantization_config.modules | names of the MLPs that are in one bit |

| in the file | in the model | |
|---|---|---|
| gate_proj.weight | gate_proj.packed.qweight | (H, D / 32) int32 |
| gate_proj.weight_scale | gate_proj.packed.scales | (H, D / 128) float16 |

A file has the name that the dense weight has, in another shape. transformers only warns of a
quantiser that it does not know and goes on as if the model were dense: the shapes make it raise,
where other names would leave the MLPs at random values.

This module imports transformers, and is imported when that is there (fusedmlp/__init__.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .one_bit import FORMATS, PROJECTIONS, Blocks, one_bit_blocks

NAME = "fusedmlp"
# In the file -> in a projection. Longer names first: each is looked for in what the last one left.
_TENSORS = {"weight_scale": "packed.scales", "weight": "packed.qweight"}


class OneBitConfig(QuantizationConfigMixin):
    """Which modules are in one bit a weight."""

    def __init__(self, modules: Iterable[str] = (), format: str = FORMATS[0], **_: Any) -> None:
        if format not in FORMATS:
            raise ValueError(
                f"{NAME}: quantization_config.format must be one of {', '.join(FORMATS)}, got "
                f"{format!r}; a newer fusedmlp may know it"
            )
        self.quant_method: Any = NAME
        self.format, self.modules = format, list(modules)


class OneBitQuantizer(HfQuantizer):
    """Loads and saves; quantize_model quantises."""

    # transformers' word for: it takes no dense checkpoint.
    requires_calibration = True
    quantization_config: OneBitConfig

    def __init__(self, quantization_config: OneBitConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._projections: list[str] = []

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        with torch.device("cpu"):  # transformers builds on meta, where activations have no values
            blocks = Blocks(model)
        found = {n: here for n in self.quantization_config.modules if (here := _in(model, n))}
        if self.quantization_config.modules and not found:
            raise ValueError(
                f"{NAME}: a model must have the modules of its quantization_config, and "
                f"{type(model).__name__} has no {self.quantization_config.modules[0]}; load it by "
                "the class that saved it"
            )
        for name, here in found.items():
            if here not in blocks.found:
                left = next((str(e) for e in blocks.left if e.name == here), f"{here} is no MLP")
                raise ValueError(f"{NAME}: quantization_config has {here} in one bit, and {left}")
            model.set_submodule(here, blocks.block(here))
            # The file may lack the prefix that this model has, and has it where this lacks it.
            shared = min(name, here, key=len)
            self._projections += [f"{shared}.{projection}" for projection in PROJECTIONS]

    def get_weight_conversions(self) -> list[Any]:
        from transformers.core_model_loading import WeightRenaming

        one_of = "|".join(self._projections)
        names = _TENSORS.items() if one_of else ()
        return [WeightRenaming(f"({one_of}).{file}", rf"\1.{own}") for file, own in names]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        mark(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        modules = [name for name, _ in one_bit_blocks(model)]
        self.quantization_config.modules = modules
        model.config.quantization_config = self.quantization_config
        paths = [f"{name}.{projection}" for name in modules for projection in PROJECTIONS]
        named = {f"{p}.{own}": f"{p}.{file}" for p in paths for file, own in _TENSORS.items()}
        return {named.get(key, key): t for key, t in model.state_dict().items()}, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """By adapters: a packed block gives its input a gradient and has no weight to train."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _in(model: Any, name: str) -> str | None:
    """What `model` calls the module `name`: a model and the one that has a head differ by a
    prefix."""
    prefix = f"{model.base_model_prefix}."
    names = {n for n, _ in model.named_modules()}
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)


def mark(model: nn.Module) -> None:
    """Have every model of transformers in `model` saved as what it is: one that holds others, and
    those."""
    from transformers.modeling_utils import PreTrainedModel

    # The outermost last: it shares its configuration with the model inside it.
    for inner in reversed(list(model.modules())):
        if isinstance(inner, PreTrainedModel):
            modules = [name for name, _ in one_bit_blocks(inner)]
            if modules:
                of: Any = inner
                of.is_quantized, of.quantization_method = True, NAME
                of.config.quantization_config = OneBitConfig(modules)
                of.hf_quantizer = OneBitQuantizer(of.config.quantization_config)


# Not twice in a program that has a copy of this package from Hugging Face's Hub too.
if NAME not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(NAME)(OneBitConfig)
    register_quantizer(NAME)(OneBitQuantizer)
