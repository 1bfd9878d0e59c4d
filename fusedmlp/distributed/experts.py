"""Expert parallelism over torch.distributed: each rank holds E / R of the E experts and its own
tokens; tokens travel to their experts and back.

| step | on each rank |
|---|---|
| route | its tokens to E experts; rows in expert order are in the order of ranks |
| exchange | how many rows each expert gets (E integers); then the rows themselves, one a choice |
| compute | what arrived, by moe_mlp on the rank's own experts |
| exchange | results back to the rows' ranks; there they are multiplied by prob, and a token's k summed in the order of its choices |

Both exchanges are all_to_all of variable sizes, which the host must know: it waits for the counts,
once a call. In several `chunks`, one part's rows travel while the one before is multiplied.
Gradients go the same ways back. Capacity is each rank's own: its routing drops.

Patched models: `tensor_parallel_plan` and `expert_parallel_plan`, in `plans.py`.
"""  # noqa: E501

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .. import check
from ..check import lora as adapters
from ..check.experts import (
    autocast_prob,
    check_adapters,
    check_experts,
    check_kind,
    check_routing,
)
from ..layers.moe import EXPERTS, TopKMoE
from ..ops.moe_mlp import moe_mlp
from ..ops.top1_route import route_to
from ..packing import Packed
from ..reference import Routing
from ..reference.lora import Adapter, Lora

OP = "parallel_moe_mlp"


class _Exchange:
    """Rows to other ranks, `sent` to each and `received` from each, and gradients the other way.

    `start` enqueues the exchange and `finish` waits for it, on the device where the group is
    NCCL's; backward starts in `finish` and waits in `start`. What is called between the two runs
    meanwhile. Autograd's link between the two has the shape of the rows that leave.
    """

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group
        self.out: Tensor

    def enqueue(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        rows = rows.contiguous()
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        work = dist.all_to_all_single(out, rows, received, sent, group=self.group, async_op=True)
        self.pending = work, rows  # which must live until it has been read
        return out

    def wait(self) -> None:
        self.pending[0].wait()
        del self.pending

    def start(self, rows: Tensor) -> Tensor:
        return _Start.apply(rows, self)

    def finish(self, link: Tensor) -> Tensor:
        return _Finish.apply(link, self)


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.out = exchange.enqueue(rows, exchange.sent, exchange.received)
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.wait()
        return d, None


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        out = exchange.out
        del exchange.out
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        return exchange.enqueue(d, exchange.received, exchange.sent), None


def _local(name: str, w: Tensor | None, E: int, ranks: int) -> Tensor | None:
    """This rank's experts of `w`: a plain tensor holds just them, a DTensor is sharded by them."""
    if isinstance(w, DTensor):
        if tuple(w.placements) != (Shard(0),):
            raise ValueError(
                f"{OP}: {name} must be sharded by experts, Shard(0), got {w.placements}"
            )
        w = w.to_local()
    # check_experts speaks of what is no stack of matrices or biases.
    if isinstance(w, Tensor) and w.dim() and w.shape[0] * ranks != E:
        raise ValueError(
            f"{OP}: {name} must hold {E // ranks} of {E} experts on each of {ranks} ranks, got "
            f"{w.shape[0]}"
        )
    return w


def _local_lora(lora: Lora, E: int, ranks: int) -> Lora:
    """This rank's adapters; what is none stays for `check_adapters` to refuse."""

    def local(name: str, p: Any) -> Any:
        if not isinstance(p, Adapter):
            return p
        a: Any = _local(f"lora.{name}.a", p.a, E, ranks)
        b: Any = _local(f"lora.{name}.b", p.b, E, ranks)
        return Adapter(a, b, p.scale)

    return Lora(*map(local, Lora._fields, lora)) if isinstance(lora, Lora) else lora


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
    lora: Lora | None = None,
    chunks: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """moe_mlp with the experts spread over the ranks of `group`.

    Args:
        x: (..., D), this rank's tokens; ranks may have different numbers, 0 too.
        routing: of them to all E experts, k a token, E a multiple of the number of ranks.
        w_gate, ..., b_down: as in moe_mlp, of this rank's E / R experts: rank r has those from
            r E / R on. Or DTensors of all E, sharded by `Shard(0)`; adapters of `lora` likewise.
        chunks: exchange the tokens in so many parts, the next while the experts compute this one,
            forward and backward. Worth it where a part's product takes longer than its way; it
            makes more and smaller GEMMs. The same on every rank.
        group: the default group if None. Every rank of it must make the call, forward and backward.

    Returns y (..., D_out) of this rank's tokens. A weight's gradient is that of all ranks' tokens.

    Raises, before the first exchange, what moe_mlp does; ValueError for experts that do not fit the
    group; TypeError for chunks or a group of another kind, also of a group without this rank;
    RuntimeError without a default group. Ranks whose arguments are good then wait for this one.
    And torch.distributed's own error if a rank is lost, at the latest after the group's timeout.

    Examples:
        >>> import torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> from fusedmlp import top1_route
        >>> from fusedmlp.distributed import parallel_moe_mlp
        >>> x, router = torch.randn(8, 64), torch.randn(4, 64)
        >>> w_gate, w_up = torch.randn(2, 4, 128, 64)  # this rank's experts: here all 4
        >>> w_down = torch.randn(4, 64, 128)
        >>> parallel_moe_mlp(x, top1_route(x @ router.T), w_gate, w_up, w_down).shape
        torch.Size([8, 64])
        >>> dist.destroy_process_group()
    """
    own = _group(group)
    ranks = dist.get_world_size(own)
    if not isinstance(chunks, int) or isinstance(chunks, bool):
        raise TypeError(f"{OP}: chunks must be an int, got {chunks!r}")
    if chunks < 1:
        raise ValueError(f"{OP}: chunks must be at least 1, got {chunks}")
    # All of moe_mlp's checks and casts before the first exchange, at which other ranks would wait.
    dtype = check.autocast_dtype(OP, x)
    check_kind(OP, routing)
    E = routing.num_experts
    if E % ranks:
        raise ValueError(f"{OP}: the {E} experts of routing must be a multiple of {ranks} ranks")
    named = {
        "w_gate": w_gate, "w_up": w_up, "w_down": w_down,
        "b_gate": b_gate, "b_up": b_up, "b_down": b_down,
    }  # fmt: skip
    local: Any = tuple(_local(name, w, E, ranks) for name, w in named.items())
    if dtype:
        x, *local = check.cast(dtype, x, *local)  # type: ignore[assignment]
        routing = autocast_prob(routing, dtype)
    check_experts(OP, x, local, activation, packed)
    if lora is not None:
        lora = _local_lora(lora, E, ranks)
        lora = adapters.cast(dtype, lora) if dtype else lora
        check_adapters(OP, x, lora, local, packed)
    check_routing(OP, x, routing, E)
    flat = x.reshape(-1, x.shape[-1])
    k = routing.k
    rows, kept = _rows_of_chunks(routing, chunks)
    # (chunks, E) here, (ranks, chunks, E / R) on the way.
    there = kept.view(chunks, ranks, -1).transpose(0, 1).contiguous()
    here = torch.empty_like(there)
    dist.all_to_all_single(here, there, group=own)
    counts = here.transpose(0, 1)
    # The one wait for the device: both directions' sizes at once.
    sizes = torch.stack([kept.view(chunks, ranks, -1).sum(2), counts.sum(2)]).tolist()
    exchanges = [_Exchange(sent, received, own) for sent, received in zip(*sizes, strict=True)]
    parts = rows[: sum(map(sum, sizes[0]))].split([sum(sent) for sent in sizes[0]])
    leaving = [e.start(_taken(flat, t, k)) for e, t in zip(exchanges, parts, strict=True)]
    returning = []
    for exchange, count, link in zip(exchanges, counts, leaving, strict=True):
        arrived = exchange.finish(link)
        number = torch.arange(E // ranks, device=x.device).repeat(ranks)
        expert = number.repeat_interleave(count.flatten(), output_size=arrived.shape[0])
        ones = torch.ones(expert.shape, dtype=torch.float32, device=x.device)
        y = moe_mlp(
            arrived, route_to(expert, ones, E // ranks), *local,
            activation=activation, packed=packed, recompute=recompute, lora=lora,
        )  # fmt: skip
        back = _Exchange(exchange.received, exchange.sent, own)
        returning.append((back, back.start(y)))
    y = torch.cat([back.finish(link) for back, link in returning])
    number = torch.cat(parts)
    scaled = y * routing.prob.reshape(-1).index_select(0, number).unsqueeze(1)
    if k == 1:
        scaled = scaled.to(y.dtype)
    out = scaled.new_zeros(k * flat.shape[0], y.shape[1]).index_copy(0, number, scaled)
    if k > 1:
        out = out.unflatten(0, routing.expert.shape).sum(1).to(y.dtype)
    return out.view(*x.shape[:-1], y.shape[1])


def _taken(x: Tensor, number: Tensor, k: int) -> Tensor:
    """The row of x of each choice. Its gradient adds k rows a token in the order of its choices,
    not by index_add's atomics."""
    if k == 1:
        return x.index_select(0, number)
    return x.unsqueeze(1).expand(-1, k, -1)[number // k, number % k]


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if group is None:
        if not dist.is_initialized():
            raise RuntimeError(
                f"{OP}: torch.distributed must be initialised, got no default group: call "
                "init_process_group first"
            )
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{OP}: group must be a ProcessGroup that this rank is in, got {type(group).__name__}"
        )
    return group


def _rows_of_chunks(routing: Routing, chunks: int) -> tuple[Tensor, Tensor]:
    """(numbers of the choices in the order of chunk, then expert, dropped ones last; rows of each
    (chunk, expert)).

    A chunk is so many neighbouring tokens."""
    number, E, k = routing.tokens.long(), routing.num_experts, routing.k
    if chunks == 1:
        return number, routing.offsets[: E + 1].diff()
    R = number.shape[0]
    key = number // k * chunks // max(R // k, 1) * E
    key = key + routing.expert.reshape(-1).index_select(0, number)
    place = torch.arange(R, device=key.device)
    key = torch.where(place < routing.offsets[E], key, chunks * E)
    kept = routing.offsets.new_zeros(chunks * E + 1)
    kept.scatter_add_(0, key, torch.ones_like(routing.tokens))
    return number.index_select(0, key.argsort(stable=True)), kept[:-1]


def shard_experts(layer: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Put the stacked expert parameters of every `TopKMoE` and `Top1MoE` in `layer` on `mesh`, a
    one-dimensional device mesh, as DTensors sharded by experts; each then exchanges tokens over the
    mesh's group.

    Every other parameter stays as it is: the same on every rank, whose gradients are the caller's
    to average. Returns `layer`. Raises TypeError for a layer or a mesh of another kind, ValueError
    where the mesh has more dimensions, the number of experts is no multiple of its size, or nothing
    in `layer` is a TopKMoE.

    Examples:
        >>> import torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> from fusedmlp.distributed import shard_experts
        >>> from fusedmlp.layers import Top1MoE
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> moe = shard_experts(Top1MoE(64, 128, num_experts=4), mesh)
        >>> moe.w_gate.to_local().shape  # E / R experts
        torch.Size([4, 128, 64])
        >>> dist.destroy_process_group()
    """
    for name, value, kind in (("layer", layer, nn.Module), ("mesh", mesh, DeviceMesh)):
        if not isinstance(value, kind):
            raise TypeError(
                f"shard_experts: {name} must be a {kind.__name__}, got {type(value).__name__}"
            )
    if mesh.ndim != 1:
        raise ValueError(f"shard_experts: mesh must have one dimension, got {mesh.ndim}")
    found = [module for module in layer.modules() if isinstance(module, TopKMoE)]
    if not found:
        raise ValueError("shard_experts: layer must hold a TopKMoE or Top1MoE, got none")
    for moe in found:
        E = moe.w_gate.shape[0]
        if E % mesh.size():
            raise ValueError(
                f"shard_experts: {E} experts must be a multiple of the mesh's {mesh.size()} ranks"
            )
        for name in EXPERTS:
            if (whole := getattr(moe, name)) is not None:
                sharded = distribute_tensor(whole.detach(), mesh, [Shard(0)])
                setattr(moe, name, nn.Parameter(sharded))
        moe.parallel_mlp = functools.partial(parallel_moe_mlp, group=mesh.get_group())
    return layer
