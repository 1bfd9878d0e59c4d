"""Expert parallelism over torch.distributed: each rank holds E / R of the E experts and its own
tokens; tokens travel to their experts and back.

| step | on each rank |
|---|---|
| route | its tokens to E experts; rows in expert order are in the order of ranks |
| exchange | how many rows each expert gets (E integers); then the rows themselves |
| compute | what arrived, by moe_mlp on the rank's own experts |
| exchange | results back to the rows' ranks; there they are multiplied by prob |

Both exchanges are all_to_all of variable sizes, which the host must know: it waits for the counts,
once a call. Gradients go the same ways back. Capacity is each rank's own: its routing drops.

Patched models: `tensor_parallel_plan` and `expert_parallel_plan`, in `_tensor_parallel.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ._tensor_parallel import (
    ExpertParallelMLP,
    TensorParallelMLP,
    expert_parallel_plan,
    tensor_parallel_plan,
)
from .ops.moe_mlp import moe_mlp
from .ops.top1_route import route_to
from .reference import Packed, Routing

OP = "parallel_moe_mlp"
__all__ = [
    "ExpertParallelMLP",
    "TensorParallelMLP",
    "expert_parallel_plan",
    "parallel_moe_mlp",
    "shard_experts",
    "tensor_parallel_plan",
]


class _Exchange(Function):
    """Rows to other ranks: `sent` rows to each, `received` from each; backward the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _all_to_all(d, received, sent, ctx.group), None, None, None


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _local(name: str, w: Tensor | None, E: int, ranks: int) -> Tensor | None:
    """This rank's experts of `w`: a plain tensor holds just them, a DTensor is sharded by them."""
    if isinstance(w, DTensor):
        if tuple(w.placements) != (Shard(0),):
            raise ValueError(
                f"{OP}: {name} must be sharded by experts, Shard(0), got {w.placements}"
            )
        w = w.to_local()
    if w is not None and w.shape[0] * ranks != E:
        raise ValueError(
            f"{OP}: {name} must hold {E // ranks} of {E} experts on each of {ranks} ranks, got "
            f"{w.shape[0]}"
        )
    return w


def parallel_moe_mlp(
    x: Tensor,
    routing: Routing,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "silu",
    packed: Packed | None = None,
    recompute: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """moe_mlp with the experts spread over the ranks of `group`.

    Args:
        x: (..., D), this rank's tokens; ranks may have different numbers, 0 too.
        routing: of them to all E experts, E a multiple of the number of ranks.
        w_gate, ..., b_down: as in moe_mlp, of this rank's E / R experts: rank r has those from
            r E / R on. Or DTensors of all E, sharded by `Shard(0)`.
        group: the default group if None. Every rank of it must make the call, forward and backward.

    Returns y (..., D_out) of this rank's tokens. A weight's gradient is that of all ranks' tokens.

    Raises what moe_mlp does; ValueError for experts that do not fit the group; and
    torch.distributed's own error if a rank is lost, at the latest after the group's timeout.
    """
    own = group if group is not None else dist.group.WORLD
    assert own is not None
    ranks, E = dist.get_world_size(own), routing.num_experts
    if E % ranks:
        raise ValueError(f"{OP}: the {E} experts of routing must be a multiple of {ranks} ranks")
    named = {
        "w_gate": w_gate, "w_up": w_up, "w_down": w_down,
        "b_gate": b_gate, "b_up": b_up, "b_down": b_down,
    }  # fmt: skip
    experts = {name: _local(name, w, E, ranks) for name, w in named.items()}
    flat = x.reshape(-1, x.shape[-1])
    kept = routing.offsets[: E + 1].diff()
    counts = torch.empty_like(kept)
    dist.all_to_all_single(counts, kept, group=own)
    # The one wait for the device: both directions' sizes at once.
    sizes = torch.stack([kept.view(ranks, -1).sum(1), counts.view(ranks, -1).sum(1)]).tolist()
    sent, received = sizes
    tokens = routing.tokens[: sum(sent)].long()
    arrived = _Exchange.apply(flat.index_select(0, tokens), sent, received, own)
    number = torch.arange(E // ranks, device=x.device).repeat(ranks)
    expert = number.repeat_interleave(counts, output_size=sum(received))
    ones = torch.ones(expert.shape, dtype=torch.float32, device=x.device)
    y = moe_mlp(
        arrived, route_to(expert, ones, E // ranks), **experts,  # type: ignore[arg-type]
        activation=activation, packed=packed, recompute=recompute,
    )  # fmt: skip
    back = _Exchange.apply(y, received, sent, own)
    scaled = (back * routing.prob.index_select(0, tokens).unsqueeze(1)).to(back.dtype)
    out = scaled.new_zeros(flat.shape[0], y.shape[1]).index_copy(0, tokens, scaled)
    return out.view(*x.shape[:-1], y.shape[1])


def shard_experts(layer: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Put the stacked expert weights of every `Top1MoE` in `layer` on `mesh`, a one-dimensional
    device mesh, as DTensors sharded by experts; each then exchanges tokens over the mesh's group.

    Every other parameter stays as it is: the same on every rank, whose gradients are the caller's
    to average. Returns `layer`. Raises ValueError where the number of experts is no multiple of the
    mesh's size, or nothing in `layer` is a Top1MoE.
    """
    from .layers.moe import Top1MoE

    found = [module for module in layer.modules() if isinstance(module, Top1MoE)]
    if not found:
        raise ValueError("shard_experts: layer must hold a Top1MoE, got none")
    for moe in found:
        E = moe.w_gate.shape[0]
        if E % mesh.size():
            raise ValueError(
                f"shard_experts: {E} experts must be a multiple of the mesh's {mesh.size()} ranks"
            )
        for name in ("w_gate", "w_up", "w_down"):
            sharded = distribute_tensor(getattr(moe, name).detach(), mesh, [Shard(0)])
            setattr(moe, name, nn.Parameter(sharded))
        moe.group = mesh.get_group()
    return layer
