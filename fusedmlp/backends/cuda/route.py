"""The routing kernels of csrc/, launched, with the arguments of their Triton launchers
(kernels/moe/top1_route.py) behind `enqueue`, the extension's. Any strides; more experts than their
shared memory counts are `Unfit`.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ...kernels.moe import top1_route as _triton
from ...kernels.moe.top1_route import Groups, RouteCall, Routed, chunk_of
from . import loader
from .gated_linear import Enqueue, stream
from .loader import unfit

_BLOCK = 32  # tokens that a warp ranks at a time


def _chunk(op: str, like: Tensor, T: int, E: int) -> int:
    extension, _ = loader.load()
    if E > extension.MAX_EXPERTS:
        raise unfit(op, f"{extension.MAX_EXPERTS} experts or fewer", str(E))
    return min(chunk_of(like, T, E, _BLOCK), extension.MAX_CHUNK)


def _launch(enqueue: Enqueue, call: RouteCall) -> None:
    logits, expert = call.logits, call.expert
    dtype = 0 if logits is None else loader.load()[0].DTYPES[loader.DTYPES[logits.dtype]]
    # The tensors in the order of RouteCall, whose first five may be missing.
    order = (
        logits, expert, call.prob, call.lse, call.mean, call.tokens, call.rows, call.offsets,
        call.counts, call.rank, call.histograms, call.sums,
    )  # fmt: skip
    enqueue(
        *(0 if t is None else t.data_ptr() for t in order), expert.shape[0], call.E,
        *((0, 0) if logits is None else logits.stride()), call.chunk, call.capacity,
        dtype, expert.get_device(), stream(expert.device),
    )  # fmt: skip


def top1_route_fwd(enqueue: Enqueue, logits: Tensor, capacity: int | None) -> Routed:
    chunk = _chunk("top1_route_fwd", logits, *logits.shape)
    launch = functools.partial(_launch, enqueue)
    return _triton.route_logits(logits, capacity, chunk, launch)


def route_to_fwd(
    enqueue: Enqueue, expert: Tensor, num_experts: int, capacity: int | None
) -> Groups:
    chunk = _chunk("route_to_fwd", expert, expert.shape[0], num_experts)
    launch = functools.partial(_launch, enqueue)
    return _triton.route_experts(expert, num_experts, capacity, chunk, launch)
