"""Whether a derivative is being taken that kernels have no formula for."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_NOTHING = type(None)


def transformed() -> bool:
    """Inside `torch.func.{grad, vjp, jvp, vmap, ..}`, or a level of forward-mode AD.

    Kernels see values alone, so a tangent or a batch of them would be lost there.
    """
    if forward_ad._current_level >= 0:
        return True
    # By type: torch.compile takes what stands here for something, even where it is None.
    return type(torch._C._functorch.peek_interpreter_stack()) is not _NOTHING


def batched(*grads: torch.Tensor | None) -> bool:
    """Whether `torch.autograd.grad(is_grads_batched=True)`, which is no transform of torch.func,
    stands behind gradients."""
    if torch.compiler.is_compiling():
        return False
    is_batch = torch._C._functorch.is_legacy_batchedtensor
    return any(g is not None and is_batch(g) for g in grads)
