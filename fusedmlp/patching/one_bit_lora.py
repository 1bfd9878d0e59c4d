"""PEFT's LoRA around one-bit layers: y = x w' + b + s B (A x), the bits of w frozen.

PEFT has no layer for a BinaryLinear, and takes one from its configuration. That one is its own
Linear, which calls what it stands around and lets a BinaryGatedMLP read both; a one-bit weight has
no room for a merged adapter.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, TypeVar

from torch import Tensor

from ..layers.binary import BinaryLinear, Projection
from ..layers.parts.around import hooked
from .lora import adapter_of, beside
from .projection import full_name

_Config = TypeVar("_Config")


def one_bit_lora(config: _Config) -> _Config:
    """Let a LoraConfig of PEFT adapt one-bit layers, packed ones too; gives `config` itself.

    The projections of a model that `quantize_model` put into one bit then take adapters like
    others: get_peft_model(model, one_bit_lora(LoraConfig(target_modules=["up_proj"]))). A and B are
    trained, bits and scales stay. Such a block is one binary_gated_mlp(lora=); where an adapter
    must be called (dropout at work, several at once, a hook) its projections are, with gated_act
    between. Merging an adapter raises TypeError. A configuration that was saved has to come through
    here again: PeftModel.from_pretrained(model, folder, config=one_bit_lora(...)).

    Raises TypeError for anything else than a peft.LoraConfig, ValueError for an init_lora_weights
    that begins from the weight, and PEFT ValueError for DoRA and kin, which need it.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from peft import LoraConfig, get_peft_model
        >>> from fusedmlp import one_bit_lora
        >>> from fusedmlp.layers import BinaryGatedMLP
        >>> mlp = BinaryGatedMLP(128, 256).pack()
        >>> model = nn.ModuleDict({"norm": nn.LayerNorm(128), "mlp": mlp})
        >>> config = one_bit_lora(LoraConfig(r=4, target_modules=["up_proj", "down_proj"]))
        >>> peft_model = get_peft_model(model, config)
        >>> mlp(torch.randn(3, 128)).sum().backward()
        >>> [len(list(layer.parameters())) for layer in (mlp.gate_proj, mlp.up_proj)]
        [0, 2]
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(config, peft.LoraConfig):
        raise TypeError(
            f"one_bit_lora: config must be a peft.LoraConfig, got {type(config).__name__}"
        )
    if (first := config.init_lora_weights) not in (True, False, "gaussian"):
        raise ValueError(
            f"one_bit_lora: config.init_lora_weights must be True, False or 'gaussian', got "
            f"{first!r}, which begins from a weight in full; bits have none"
        )
    config._register_custom_module({BinaryLinear: _layer()})
    return config


@functools.cache
def _layer() -> type:
    from peft.tuners.lora import Linear

    class OneBitLora(Linear):
        lora_variants = {(): None}  # noqa: RUF012

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        def refusal(self) -> str | None:
            """Why the block around it must call it; None where `read` takes its place."""
            base = self.base_layer
            if type(base) is not BinaryLinear:
                return f"is around a {full_name(type(base))}"
            if around := hooked(base):
                return f"is around a BinaryLinear that {around}"
            why = beside(self)
            return why and f"is a layer of PEFT's {why}"

        def read(self, x: Tensor) -> Projection:
            base: Any = self.base_layer
            return Projection(base, *adapter_of(self, base.bias, x))

        def merge(self, *_: Any, **__: Any) -> None:
            raise TypeError(
                "one_bit_lora: an adapter must stay beside its one-bit layer, got merge(): bits "
                "have no room for it; model.unload() takes it off"
            )

    OneBitLora.__qualname__ = "OneBitLora"  # by which pickle finds it, through __getattr__
    return OneBitLora


def __getattr__(name: str) -> Any:
    if name == "OneBitLora":
        return _layer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
