"""Tensor parallelism of patched blocks: gate, up and first projections by rows, down by columns.

| block | sharded over R ranks | of the result |
|---|---|---|
| gated or plain MLP | H: w_gate, w_up, b (H / R, D), w_down (D, H / R) | one all_reduce (or reduce_scatter) |
| mixture of experts | the same in each expert | one all_reduce |

torch's ColwiseParallel and RowwiseParallel put hooks on the projections, which a fused call does not
call; these styles shard the same parameters the same way, with the exchange around the block. A
packed weight is sharded in both halves, so that a rank's part is packed too. The bias of `down` is
added once, after the sum.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from ..packing import Packed
from ..patching.dense import Dense
from ..patching.experts import Experts
from ..patching.lora import wraps_parameter
from ..patching.moe import Llama4, Switch
from ..patching.plan import Plan, child
from ..patching.projection import full_name, is_projection, transposed
from ..patching.router import Router
from ..patching.swap import Patched


def _put(
    module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, unit: int = 1
) -> None:
    """The parameter `name` of `module` as a DTensor; `unit` neighbours stay together."""
    p = getattr(module, name)
    if p is None:
        return
    if isinstance(placement, Shard | _StridedShard):
        parts = mesh.size() * getattr(placement, "split_factor", unit)
        if p.shape[placement.dim] % parts:
            raise ValueError(
                f"tensor_parallel_plan: dimension {placement.dim} of {name} {tuple(p.shape)} must "
                f"be a multiple of {parts}, for {mesh.size()} ranks"
            )
    sharded = distribute_tensor(p.detach(), mesh, [placement])
    setattr(module, name, nn.Parameter(sharded, p.requires_grad))


def _rows(dim: int, packed: Packed | None) -> Placement:
    """Rows of both halves where one lies behind the other; interleaved rows are pairs."""
    behind = packed in ("gate_up", "up_gate")
    return _StridedShard(dim, split_factor=2) if behind else Shard(dim)


def _shard_dense(module: nn.Module, plan: Dense, mesh: DeviceMesh) -> None:
    for path in plan.may_call():
        if not is_projection(inner := child(module, path)):
            raise ValueError(
                f"tensor_parallel_plan: {path} of {type(module).__name__} must be a plain "
                f"projection, got a {full_name(type(inner))}; merge adapters by merge_and_unload()"
            )
    for path in plan.first:
        linear = child(module, path)
        packed, unit = plan.packed, 2 if plan.packed == "interleaved" else 1
        _put(linear, "weight", mesh, _rows(1 if transposed(linear) else 0, packed), unit)
        _put(linear, "bias", mesh, _rows(0, packed), unit)
    down = child(module, plan.down)
    _put(down, "weight", mesh, Shard(0 if transposed(down) else 1))
    _put(down, "bias", mesh, Replicate())


def _shard_experts(module: Any, plan: Plan, mesh: DeviceMesh) -> None:
    if isinstance(plan, Llama4):
        _put(module.experts, "gate_up_proj", mesh, _rows(2, "gate_up"))
        _put(module.experts, "down_proj", mesh, Shard(1))
    elif isinstance(plan, Experts):
        assert plan.form is not None
        first, packed, turned = plan.form.first, plan.form.packed, plan.form.transposed
        if plan.form.bias:
            raise ValueError(
                f"tensor_parallel_plan: {type(module).__name__} must have no biases, which every "
                "rank would add; expert_parallel_plan(model) takes them"
            )
        unit = 2 if packed == "interleaved" else 1
        _put(module, first, mesh, _rows(2 if turned else 1, packed), unit)
        _put(module, "down_proj", mesh, Shard(1 if turned else 2))
    else:
        for expert in module.experts.values():
            _put(expert.wi, "weight", mesh, Shard(0))
            _put(expert.wo, "weight", mesh, Shard(1))


def _everywhere(t: Tensor, mesh: DeviceMesh, layout: Placement) -> Tensor:
    """All of `t` on every rank, whose gradients are summed over the ranks."""
    whole = t if isinstance(t, DTensor) else DTensor.from_local(t, mesh, [layout])
    return whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


@dataclass(frozen=True)
class DenseSplit:
    """The exchange around a dense block: what `_split` of a patched module holds."""

    mesh: DeviceMesh
    layout: Placement

    def __call__(self, plan: Dense, module: nn.Module, x: Tensor) -> Tensor:
        part = plan.block(module, _everywhere(x, self.mesh, self.layout), bias=False)
        y: Any = DTensor.from_local(part, self.mesh, [Partial()])
        y = y.redistribute(placements=[self.layout])
        bias = child(module, plan.down).bias
        y = y if bias is None else y + bias
        return y if isinstance(x, DTensor) else y.to_local()


@dataclass(frozen=True)
class ExpertsSplit:
    """moe_mlp of experts whose hidden width is spread over the ranks."""

    mesh: DeviceMesh

    def __call__(self, x: Tensor, routing: Any, *weights: Tensor | None, **options: Any) -> Tensor:
        from ..ops.moe_mlp import moe_mlp

        prob = _everywhere(routing.prob, self.mesh, Replicate())
        rows = _everywhere(x, self.mesh, Replicate())
        part = moe_mlp(rows, routing._replace(prob=prob), *weights, **options)  # type: ignore[arg-type]
        whole = DTensor.from_local(part, self.mesh, [Partial()])
        return whole.redistribute(placements=[Replicate()]).to_local()


class TensorParallelMLP(ParallelStyle):
    """A patched block's parallel style, for torch's parallelize_module.

    layout: of the block's input and result over the ranks: Replicate(), or Shard(1) of (B, T, D)
    where the sequence is sharded (sequence parallelism). DTensors stay DTensors.
    """

    def __init__(self, layout: Placement | None = None) -> None:
        super().__init__()
        self.layout = layout or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        plan = _plan_of(module)
        if isinstance(plan, Dense):
            _shard_dense(module, plan, device_mesh)
            split: Any = DenseSplit(device_mesh, self.layout)
        else:
            _shard_experts(module, plan, device_mesh)
            split = ExpertsSplit(device_mesh)
        module._split = split
        return module


class ExpertParallelMLP(ParallelStyle):
    """The experts of a patched block over the ranks; tokens, each rank's own, travel to them."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        import functools

        from .experts import parallel_moe_mlp

        form = getattr(_plan_of(module), "form", None)  # of experts that are patched themselves
        inside = module.experts if form is None else module
        names = ("gate_up_proj", "down_proj") if form is None else form.names()
        for name in names:
            _put(inside, name, device_mesh, Shard(0))  # type: ignore[arg-type]
        module._split = functools.partial(  # type: ignore[assignment]
            parallel_moe_mlp, group=device_mesh.get_group()
        )
        return module


def _plan_of(module: nn.Module) -> Plan:
    kinds = (Dense, Experts, Llama4, Switch)
    if not isinstance(module, Patched) or not isinstance(module._plan, kinds):
        raise ValueError(
            f"tensor_parallel_plan: {type(module).__name__} must be a block that patch() patched"
        )
    plan: Plan = module._plan
    for path in plan.wrapped():
        if wraps_parameter(child(module, path)):
            raise ValueError(
                f"tensor_parallel_plan: {path} of {type(module).__name__} must be without "
                "adapters, got PEFT's ParamWrapper around them; merge them by merge_and_unload()"
            )
    return plan


def _patched(op: str, model: nn.Module) -> dict[str, Plan]:
    found = {n: m._plan for n, m in model.named_modules() if isinstance(m, Patched)}
    # A router stays whole on every rank.
    found = {name: plan for name, plan in found.items() if not isinstance(plan, Router)}
    if not found:
        raise ValueError(f"{op}: model must hold patched blocks, got none; patch(model) first")
    return found


def tensor_parallel_plan(
    model: nn.Module, *, sequence_parallel: bool = False
) -> dict[str, ParallelStyle]:
    """{name: style} of every patched block, for `parallelize_module(model, mesh, plan)`.

    Args:
        model: after patch(). Other modules (attention) are the caller's to add to the plan.
        sequence_parallel: inputs and results of dense blocks are sharded along the sequence,
            (B, T / R, D) on each rank: an all_gather before and a reduce_scatter after the block.

    Each rank keeps H / R of every hidden width. Raises ValueError for a model without a patched
    block, and with sequence_parallel for mixtures of experts; parallelize_module does where a width
    is no multiple of the mesh's size.

    Examples:
        >>> from torch import nn
        >>> import fusedmlp
        >>> from fusedmlp.distributed import tensor_parallel_plan
        >>> ffn = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> model = nn.ModuleDict({"ffn": ffn})
        >>> report = fusedmlp.patch(model)
        >>> list(tensor_parallel_plan(model))  # for parallelize_module(model, mesh, plan)
        ['ffn']
    """
    found = _patched("tensor_parallel_plan", model)
    experts = [name for name, plan in found.items() if not isinstance(plan, Dense)]
    if sequence_parallel and experts:
        raise ValueError(
            "tensor_parallel_plan: sequence_parallel must be False for mixtures of experts, got "
            f"{', '.join(experts)}; expert_parallel_plan(model) takes each rank's own tokens"
        )
    layout = Shard(1) if sequence_parallel else Replicate()
    return {name: TensorParallelMLP(layout) for name in found}


def expert_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """{name: style} of every patched mixture of experts, for `parallelize_module`.

    Rank r keeps the experts from r E / R on; each rank has tokens of its own, and every rank must
    call the block. Other parameters stay the same on every rank: their gradients are the caller's
    to average. Raises ValueError where there is no such block, or experts are modules of their own
    (Switch), which a rank cannot do without.
    """
    found = _patched("expert_parallel_plan", model)
    plans = {name: plan for name, plan in found.items() if not isinstance(plan, Dense)}
    if not plans or any(not isinstance(plan, Experts | Llama4) for plan in plans.values()):
        raise ValueError(
            "expert_parallel_plan: model must hold experts with stacked weights, got "
            f"{', '.join(type(p).__name__ for p in plans.values()) or 'none'}"
        )
    return {name: ExpertParallelMLP() for name in plans}
