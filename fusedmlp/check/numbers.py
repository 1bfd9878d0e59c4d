"""Checks of plain numbers given to layers: owner, argument, what was expected, what was got."""

from __future__ import annotations

import math


def number(owner: str, name: str, value: object) -> None:
    """Raises TypeError unless it is an int or a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")


def finite(owner: str, name: str, value: float) -> None:
    """Raises TypeError unless it is a number, ValueError for NaN and infinities."""
    number(owner, name, value)
    if not abs(value) < math.inf:  # math.isfinite is not traced by torch.compile(dynamic=True)
        raise ValueError(f"{owner}: {name} must be finite, got {value}")
