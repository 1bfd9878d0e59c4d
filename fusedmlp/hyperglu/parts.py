"""What a layer's parameters are held by, under the names of published checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..reference.hyper import Mixing as Parameters


class Mix(nn.Module):
    """U (heads, L, r), Vt (heads, r, L) and d (heads, L) of one mixing."""

    def __init__(self, heads: int, length: int, rank: int, diag: bool, std: float) -> None:
        super().__init__()
        self.std = std
        self.U = nn.Parameter(torch.empty(heads, length, rank))
        self.Vt = nn.Parameter(torch.empty(heads, rank, length))
        self.d = nn.Parameter(torch.empty(heads, length)) if diag else None
        self.reset_parameters()

    def reset_low_rank(self) -> None:
        nn.init.normal_(self.U, std=self.std)
        nn.init.normal_(self.Vt, std=self.std)

    def reset_parameters(self) -> None:
        self.reset_low_rank()
        if self.d is not None:
            nn.init.zeros_(self.d)

    def forward(self) -> Parameters:
        return self.U, self.Vt, self.d


class Mixing(nn.Module):
    """Holds `mix`: published checkpoints have the parameters one level down."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.mix = Mix(*args)

    def forward(self) -> Parameters:
        return self.mix()


def parameters_of(op: Mixing | None) -> Parameters:
    """Called for, not read: a hook may bring them."""
    return (None, None, None) if op is None else op()


class CausalConv(nn.Module):
    """Depthwise convolution of x with its own past; tap K - 1 multiplies the current token."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, size, groups=channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.conv.weight, std=0.02)

    def forward(self, padded: Tensor) -> Tensor:
        """(B, K - 1 + T, D) with the past in front -> (B, T, D)."""
        if padded.shape[1] < self.conv.kernel_size[0]:
            return padded[:, :0]  # conv1d raises
        return self.conv(padded.transpose(1, 2)).transpose(1, 2)
