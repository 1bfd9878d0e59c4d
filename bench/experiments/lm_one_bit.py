"""One-bit weights in the `lm` bench: a trained model whose MLPs are packed, or rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...layers import BinaryGatedMLP
from ...weights.binary import quantize_binary
from .lm_models import LanguageModel

# What `binary` is at full precision, and its kin.
ROUNDED = ("swiglu", "geglu", "reglu")


@torch.no_grad()
def one_bit(
    mlp: str, model: LanguageModel, held_out_loss: Callable[[LanguageModel], float]
) -> dict[str, Any]:
    """What a record of this MLP says besides; `model` stays as it is.

    `packed_held_out_loss` of a one-bit MLP; of a gated one `rounded_held_out_loss`, with every
    matrix of its MLPs put into one bit after training, and `relative_weight_error`, the L2 norm of
    what that changed over that of the matrix, in their order.
    """
    model = copy.deepcopy(model)
    mlps = [cast(nn.Module, block.mlp) for block in model.blocks]
    if mlp in ROUNDED:
        linears = (m for owner in mlps for m in owner.modules() if isinstance(m, nn.Linear))
        errors = [_round(linear.weight) for linear in linears]
        return {
            "rounded_held_out_loss": held_out_loss(model),
            "relative_weight_error": errors,
        }
    one_bit_mlps = [owner for owner in mlps if isinstance(owner, BinaryGatedMLP)]
    for owner in one_bit_mlps:
        owner.pack()
    return {"packed_held_out_loss": held_out_loss(model)} if one_bit_mlps else {}


def _round(weight: Tensor) -> float:
    rounded = quantize_binary(weight, pad=True).dequantize(weight.dtype)
    error = ((rounded - weight).norm() / weight.norm()).item()
    weight.copy_(rounded)
    return error
