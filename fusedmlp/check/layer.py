"""Checks of a layer's input, where what the layer calls first would raise PyTorch's own error, and
of its numbers: layer, argument, what was expected, what was got."""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import number


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


def coefficient(owner: str, name: str, value: float) -> None:
    """A weight of a loss."""
    number(owner, name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{owner}: {name} must be finite and at least 0, got {value}")


def fraction(owner: str, name: str, value: float) -> None:
    number(owner, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{owner}: {name} must be in [0, 1], got {value}")


def capacity_factor(owner: str, value: float | None) -> None:
    """What an expert takes of its equal share of the tokens; None is no limit."""
    if value is None:
        return
    number(owner, "capacity_factor", value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{owner}: capacity_factor must be positive or None, got {value}")
