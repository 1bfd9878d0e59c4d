"""The check of a layer's input, where what the layer calls first would raise PyTorch's own error:
layer, argument, what was expected, what was got."""

from __future__ import annotations

import torch
from torch import Tensor


def check_x(owner: str, x: Tensor, dim: int, dtype: torch.dtype) -> None:
    """x is (..., dim) in the parameters' `dtype`, or under autocast in any floating one.

    Raises TypeError (no tensor, dtype) or ValueError (shape).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: x must be a tensor, got {type(x).__name__}")
    # A slice, so that a scalar's empty shape compares unequal instead of raising.
    if x.shape[-1:] != (dim,):
        raise ValueError(f"{owner}: x must have last dimension {dim}, got shape {tuple(x.shape)}")
    if x.dtype is dtype:
        return
    cast = torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
    if not (cast and x.dtype.is_floating_point):
        expected = "floating" if cast else dtype
        raise TypeError(f"{owner}: x must be {expected}, got {x.dtype}")
