"""What autograd keeps between a forward and its backward, beyond the call's own arguments: computed
from the memory plans of the ops, on tensors that have shapes and no memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import backend
from ..backends.library import serve_cpu
from ..kernels.arch import Arch
from ..kernels.device import pretend
from ..testing.memory import kept_bytes
from .work import Work


def saved_bytes(work: Work, phase: str, arch: Arch) -> int | None:
    """Bytes of one call by the kernels on a GPU of `arch`; None in a phase that saves nothing."""
    if phase not in ("backward", "both"):
        return None
    serve_cpu()
    with FakeTensorMode(), pretend(arch, 1), backend("triton"):
        inputs = {n: _fake(work, n, s) for n, s in work.shapes("both").items()}
        return kept_bytes(lambda: work.case.run(inputs, **work.options), inputs.values())


def _fake(work: Work, name: str, shape: tuple[int, ...]) -> Tensor:
    if name in work.case.draws:
        return work.case.draws[name](shape, torch.Generator())
    return torch.empty(shape, dtype=work.torch_dtype, requires_grad=True)
