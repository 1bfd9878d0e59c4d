"""The toy task of mlp_utils' README table: fit an elementwise function of noise.

| | |
|---|---|
| x | (32, 64, 64): batch, sequence, features, from N(0, 1), a fresh batch every step |
| y | sin(x) + 0.5 cos(2 x) + 0.01 N(0, 1) |
| training | 501 steps of Adam, learning rate 1e-3, mean squared error |

A layer with `needs_normalized_target` gets y with unit L2 norm over features; one with
`has_aux_loss` has its auxiliary loss added in training. Every layer sees the same batches for the
same seed. The eval loss is the mean squared error alone, in eval mode, on batches of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .toy_rows import DIM, SEQ_LEN, Build

BATCH, STEPS, LEARNING_RATE = 32, 501, 1e-3
EVAL_BATCHES = 8


@dataclass(frozen=True)
class ToyRun:
    """One training. `mean_loss` is what predicting the eval targets' mean would cost."""

    seed: int
    train_loss: float
    eval_loss: float
    mean_loss: float
    seconds: float


def batch(generator: torch.Generator, normalized: bool, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, SEQ_LEN, DIM, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    y = x.sin() + 0.5 * (2 * x).cos() + 0.01 * noise
    if normalized:
        y = F.normalize(y, dim=-1)
    return x.to(device), y.to(device)


def train(build: Build, seed: int, steps: int, compiled: bool, device: str) -> ToyRun:
    """Build a layer and train it; seconds include compiling."""
    torch.manual_seed(seed)
    layer = build.make().to(device)
    start = time.perf_counter()
    if compiled:
        # Each layer is new code to the compiler, which stops compiling after a few.
        torch._dynamo.reset()
    model = torch.compile(layer) if compiled else layer
    normalized = getattr(model, "needs_normalized_target", False)
    optimizer = torch.optim.Adam(layer.parameters(), LEARNING_RATE)
    batches = torch.Generator().manual_seed(seed)
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        x, y = batch(batches, normalized, device)
        loss = _loss(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train_loss = loss.item()
    seconds = time.perf_counter() - start
    eval_loss, mean_loss = evaluate(layer, seed, normalized, device)
    return ToyRun(seed, train_loss, eval_loss, mean_loss, seconds)


def _loss(model: Callable[[Tensor], Any], x: Tensor, y: Tensor) -> Tensor:
    if getattr(model, "has_aux_loss", False):
        out, aux = model(x)
        return F.mse_loss(out, y) + aux
    return F.mse_loss(model(x), y)


@torch.no_grad()
def evaluate(layer: nn.Module, seed: int, normalized: bool, device: str) -> tuple[float, float]:
    """The layer's mean squared error in eval mode, and that of the targets' mean."""
    layer.eval()
    # Far from any seed of training.
    batches = torch.Generator().manual_seed(2**32 + seed)
    losses, targets = [], []
    for _ in range(EVAL_BATCHES):
        x, y = batch(batches, normalized, device)
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        losses.append(F.mse_loss(out, y))
        targets.append(y)
    return torch.stack(losses).mean().item(), torch.stack(targets).var(correction=0).item()
