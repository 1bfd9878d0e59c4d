"""How many tokens an expert takes."""

from __future__ import annotations

import torch


def capacity_of(tokens: int, experts: int, factor: float | None) -> int | None:
    """max(1, floor(tokens / experts * factor)); None is no limit.

    By functions that take a symbolic number of tokens too: int() and max() would fix it.
    """
    if factor is None:
        return None
    return torch.sym_max(1, torch.sym_int(tokens / experts * factor))
