"""Whether the host may read values and choose by them: nobody traces, and nothing is fake.

Constants of this room are made with device="cpu": a caller's torch.device(...) would put them
elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def readable(t: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and type(t) is Tensor
        and t.is_cpu
        and not torch._C._len_torch_dispatch_stack()
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:  # any() of a generator costs more
            if t is not None and t.requires_grad:
                return True
    return False
