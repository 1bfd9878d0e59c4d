"""Patched blocks over the ranks of gloo on CPU, 2 and 4 (all but tensor parallel over 4 is slow),
against one process: DDP, FSDP2, tensor, sequence and expert parallel."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from patch_blocks import MLP, GatedMLP, Model, Packed, Residual
from patch_models import KINDS, build
from ranks import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.pytorch_utils import Conv1D

import fusedmlp
from fusedmlp.distributed import (
    TensorParallelMLP,
    expert_parallel_plan,
    plans,
    shard_experts,
    tensor_parallel_plan,
)
from fusedmlp.layers import TopKMoE
from fusedmlp.patching.experts import Experts
from fusedmlp.patching.form import Form
from fusedmlp.patching.moe import Switch
from fusedmlp.patching.swap import Patched

ROWS, T, D = 8, 4, 8


def make():
    torch.manual_seed(0)
    return Model(GatedMLP(), Packed(), MLP(), Residual()).double()


def _nccl(rank, ranks):
    """The wrappers on GPUs, in float32 through the kernels, against the model in float64."""
    torch.cuda.set_device(rank)
    y, _, grads = expected()
    for wrap in (DistributedDataParallel, _fsdp):
        model = wrap(patched().float().cuda())
        out = model(tokens(rank, ranks).float().cuda())
        near = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(out.double().cpu(), y.chunk(ranks)[rank], **near)
        out.square().mean().backward()
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(
                grad.double().cpu(), grads[name.removeprefix("module.")], **near
            )


@pytest.mark.gpu
def test_nccl():
    spawn(min(2, torch.cuda.device_count()), _nccl, timeout=120, backend="nccl")


def tokens(rank, ranks):
    x = torch.randn(ROWS, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x if rank is None else x.chunk(ranks)[rank]


def expected():
    """Result and gradients of the whole batch in one process, unpatched."""
    model, x = make(), tokens(None, 1).requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), x.grad, {k: p.grad for k, p in model.named_parameters()}


def patched():
    model = make()
    assert len(fusedmlp.patch(model, dtype_check=False).patched) == 4
    return model


def assert_grads(model, grads):
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, grads[name.removeprefix("module.")], msg=name)


def _data_parallel(rank, ranks):
    y, _, grads = expected()
    for wrap in (DistributedDataParallel, _fsdp):
        model = wrap(patched())
        out = model(tokens(rank, ranks))
        torch.testing.assert_close(out, y.chunk(ranks)[rank])
        out.square().mean().backward()
        assert_grads(model, grads)
    with pytest.raises(ValueError, match=r"patch: model must be a plain model, got the model itself .*"
                                         r"wrapped by FSDP; in this order: patch\(model\), then"):  # fmt: skip
        fusedmlp.patch(model)
    with pytest.raises(ValueError, match="unpatch: model must be a plain model"):
        fusedmlp.unpatch(model)


def _fsdp(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def _tensor_parallel(rank, ranks, sequence):
    y, dx, grads = expected()
    mesh = init_device_mesh("cpu", (ranks,))
    model = patched()
    parallelize_module(model, mesh, tensor_parallel_plan(model, sequence_parallel=sequence))
    part = (lambda t: t.chunk(ranks, 1)[rank].contiguous()) if sequence else lambda t: t
    x = part(tokens(None, 1)).requires_grad_()
    out = model(x)
    torch.testing.assert_close(out, part(y))
    # A rank's share of the mean; with whole copies each rank has it all.
    (out.square().sum() / y.numel()).backward()
    torch.testing.assert_close(x.grad, part(dx))
    norm = model.blocks[3].norm
    if sequence:
        for p in norm.parameters():  # outside the block's style: each rank has its tokens' share
            dist.all_reduce(p.grad)
    assert_grads(model, grads)
    assert model.blocks[0].w1.weight.to_local().shape == (12 // ranks, D)
    assert model.blocks[1].gate_up.weight.full_tensor().equal(make().blocks[1].gate_up.weight)
    with pytest.raises(
        ValueError, match="blocks.0.w1 .*, distributed, with DTensors for parameters"
    ):
        fusedmlp.patch(model)


def _experts(rank, ranks):
    options = {"num_hidden_layers": 1, "interleave_moe_layer_step": 1}
    plain = build("llama4", **options).double()
    shape, generator = (ranks, 6, 64), torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    whole = plain.model.layers[0].feed_forward
    x_all = x.clone().requires_grad_()
    y = whole(x_all)[0].view_as(x)
    y.square().sum().backward()
    mesh = init_device_mesh("cpu", (ranks,))
    for plan_of, mine in ((tensor_parallel_plan, x), (expert_parallel_plan, x[rank : rank + 1])):
        model = copy.deepcopy(plain)
        model.zero_grad()
        fusedmlp.patch(model, dtype_check=False)
        parallelize_module(model, mesh, plan_of(model))
        block = model.model.layers[0].feed_forward
        mine = mine.clone().requires_grad_()
        out = block(mine)[0].view_as(mine)
        own = slice(None) if plan_of is tensor_parallel_plan else slice(rank, rank + 1)
        torch.testing.assert_close(out, y[own])
        out.square().sum().backward()
        torch.testing.assert_close(mine.grad, x_all.grad[own])
        for name in ("gate_up_proj", "down_proj"):
            grad = getattr(block.experts, name).grad.full_tensor()
            torch.testing.assert_close(grad, getattr(whole.experts, name).grad)
    with pytest.raises(ValueError, match="sequence_parallel must be False for mixtures of experts"):
        tensor_parallel_plan(model, sequence_parallel=True)


def _mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D, intermediate_size=12, num_local_experts=4)
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config)


def _topk(rank, ranks):
    """Experts of transformers' table, k a token, and the router beside them."""
    torch.manual_seed(0)
    whole = _mixtral().double()
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(ranks, 6, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_all = x.clone().requires_grad_()
    y = whole(x_all)
    y.square().sum().backward()
    mesh = init_device_mesh("cpu", (ranks,))
    for plan_of, mine in ((tensor_parallel_plan, x), (expert_parallel_plan, x[rank : rank + 1])):
        block = copy.deepcopy(whole)
        block.zero_grad()
        fusedmlp.patch(block, dtype_check=False)
        plan = plan_of(block)
        assert list(plan) == ["experts"]
        parallelize_module(block, mesh, plan)
        mine = mine.clone().requires_grad_()
        out = block(mine)
        own = slice(None) if plan_of is tensor_parallel_plan else slice(rank, rank + 1)
        torch.testing.assert_close(out, y[own])
        out.square().sum().backward()
        near = {"rtol": 1e-5, "atol": 1e-5}  # its router is in float32
        torch.testing.assert_close(mine.grad, x_all.grad[own], **near)
        for name in ("gate_up_proj", "down_proj"):
            grad = getattr(block.experts, name).grad.full_tensor()
            torch.testing.assert_close(grad, getattr(whole.experts, name).grad)


def _alone(rank, ranks):
    """A group beside the default one: each rank is all of its own, and has tokens of its own."""
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("all", "one"))["one"]
    torch.manual_seed(0)
    layer, block = TopKMoE(D, 12, 4, 2).double(), _mixtral().double()
    for p in (*layer.parameters(), *block.parameters()):
        torch.nn.init.normal_(p, std=0.5)
    x = tokens(rank, ranks)
    y, z = layer(x), block(x)
    torch.testing.assert_close(shard_experts(layer, mesh)(x), y)
    fusedmlp.patch(block, dtype_check=False)
    parallelize_module(block, mesh, expert_parallel_plan(block))
    torch.testing.assert_close(block(x), z, rtol=1e-5, atol=1e-5)  # its router is in float32


def _all(rank, ranks):
    _alone(rank, ranks)
    _topk(rank, ranks)
    _data_parallel(rank, ranks)
    _tensor_parallel(rank, ranks, sequence=True)
    _experts(rank, ranks)


@pytest.mark.parametrize("ranks", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_every_way(ranks):
    spawn(ranks, _all, timeout=120)


def test_tensor_parallel_over_four_ranks():
    spawn(4, functools.partial(_tensor_parallel, sequence=False))


def test_the_layout_of_a_block_is_replicated_unless_the_sequence_is_sharded():
    model = patched()
    for split, layout in ((False, Replicate()), (True, Shard(1))):
        plan = tensor_parallel_plan(model, sequence_parallel=split)
        assert {style.layout for style in plan.values()} == {layout}
    assert TensorParallelMLP().layout == Replicate()


def test_a_plan_of_a_model_that_was_unpatched_since():
    model = patched()
    plan = tensor_parallel_plan(model)
    fusedmlp.unpatch(model)
    for name, style in plan.items():
        block = model.get_submodule(name)
        with pytest.raises(ValueError, match=f"_plan: {type(block).__name__} must be a block that"):
            style._apply(block, None)


def test_plans_of_unpatched_models():
    for plan_of in (tensor_parallel_plan, expert_parallel_plan):
        with pytest.raises(
            ValueError, match=r"model must hold patched blocks, got none; patch\(model\)"
        ):
            plan_of(make())
    with pytest.raises(ValueError, match="must hold experts with stacked weights, got none"):
        expert_parallel_plan(patched())


class Conv(nn.Module):
    """As GPT-2's, whose weights are (in, out)."""

    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj, self.act = Conv1D(12, D), Conv1D(D, 12), nn.GELU()

    def forward(self, t):
        return self.c_proj(self.act(self.c_fc(t)))


class Pairs(Packed):
    def __init__(self, hidden=12):
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * hidden), nn.Linear(hidden, D)

    def forward(self, t):
        gate_up = self.gate_up(t)
        return self.down(gate_up[..., 1::2] * nn.functional.silu(gate_up[..., ::2]))


def _experts_block(packed, turned):
    block = nn.Module()
    shapes = {"gate_up_proj": (4, 8, D), "down_proj": (4, D, 4)}
    for name, (n, rows, columns) in shapes.items():
        size = (n, columns, rows) if turned else (n, rows, columns)
        block.register_parameter(name, nn.Parameter(torch.zeros(size)))
    return block, Experts(form=Form("gate_up_proj", "silu", packed, turned, False))


def _switch():
    block = nn.Module()
    block.experts = nn.ModuleDict({"expert_0": nn.Module()})
    block.experts.expert_0.wi, block.experts.expert_0.wo = nn.Linear(D, 12), nn.Linear(12, D)
    return block, Switch()


HALVES = _StridedShard(0, split_factor=2)
PLACED = {
    "w1.weight": Shard(0), "w1.bias": Shard(0), "w3.weight": Shard(0), "w3.bias": Shard(0),
    "w2.weight": Shard(1), "w2.bias": Replicate(),
}  # fmt: skip
DENSE = [
    (GatedMLP, PLACED),
    (MLP, {"0.weight": Shard(0), "0.bias": Shard(0), "2.weight": Shard(1), "2.bias": Replicate()}),
    (Packed, {"gate_up.weight": HALVES, "gate_up.bias": HALVES, "down.weight": Shard(1),
              "down.bias": Replicate()}),
    (Pairs, {"gate_up.weight": Shard(0), "gate_up.bias": Shard(0), "down.weight": Shard(1),
             "down.bias": Replicate()}),
    (Conv, {"c_fc.weight": Shard(1), "c_fc.bias": Shard(0), "c_proj.weight": Shard(0),
            "c_proj.bias": Replicate()}),
]  # fmt: skip
STACKED = [
    (_experts_block("gate_up", False), _StridedShard(1, split_factor=2), Shard(2)),
    (_experts_block("interleaved", False), Shard(1), Shard(2)),
    (_experts_block("gate_up", True), _StridedShard(2, split_factor=2), Shard(1)),
    (_experts_block("interleaved", True), Shard(2), Shard(1)),
]


def placed(block):
    return {name: p.placements[0] for name, p in block.named_parameters() if isinstance(p, DTensor)}


@pytest.fixture
def two_ranks():
    """One of them, the other is not there: what is exchanged is whatever lies there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("make, expected", DENSE, ids=lambda made: getattr(made, "__name__", ""))
def test_how_projections_are_sharded(make, expected, two_ranks):
    block = make()
    fusedmlp.patch(block)
    parallelize_module(block, two_ranks, {"": tensor_parallel_plan(block)[""]})
    assert placed(block) == expected


@pytest.mark.parametrize("made, first, last", STACKED)
def test_how_stacked_experts_are_sharded(made, first, last, two_ranks):
    block, plan = copy.deepcopy(made)
    plans._shard_experts(block, plan, two_ranks)
    assert placed(block) == {"gate_up_proj": first, "down_proj": last}


def test_how_modules_of_experts_are_sharded(two_ranks):
    block, plan = _switch()
    plans._shard_experts(block, plan, two_ranks)
    names = {"wi.weight": Shard(0), "wo.weight": Shard(1)}
    assert placed(block) == {f"experts.expert_0.{name}": kind for name, kind in names.items()}


def test_a_width_that_parts_cannot_share_is_refused(two_ranks):
    """A pair stays together; either half is shared out."""
    block = Pairs(3)
    fusedmlp.patch(block)
    with pytest.raises(
        ValueError, match=r"dimension 0 of weight \(6, 8\) must be a multiple of 4, f"
    ):
        tensor_parallel_plan(block)[""]._apply(block, two_ranks)
    even, plan = _experts_block("interleaved", False)
    even.gate_up_proj = nn.Parameter(torch.zeros(4, 6, D))
    with pytest.raises(
        ValueError, match="dimension 1 of gate_up_proj .* must be a multiple of 4, "
    ):
        plans._shard_experts(even, plan, two_ranks)
    plain, plan = _experts_block(None, False)
    plain.gate_up_proj = nn.Parameter(torch.zeros(4, 6, D))
    plans._shard_experts(plain, plan, two_ranks)
    assert placed(plain)["gate_up_proj"] == Shard(1)


def test_experts_that_a_rank_cannot_do_without():
    model = build("switch", **KINDS["switch"])
    fusedmlp.patch(model)
    with pytest.raises(ValueError, match="hold experts with stacked weights, got .*Switch"):
        expert_parallel_plan(model)
    with pytest.raises(ValueError, match="sequence_parallel must be False for mixtures of experts"):
        tensor_parallel_plan(model, sequence_parallel=True)

    beside = nn.ModuleDict({"whole": model, "stacked": _mixtral()})
    fusedmlp.patch(beside["stacked"], dtype_check=False)
    with pytest.raises(ValueError, match="hold experts with stacked weights, got .*Switch"):
        expert_parallel_plan(beside)


def test_what_a_rank_would_add_again_or_leave_out_is_refused(two_ranks):
    """Biases of experts, and adapters inside a block."""
    block, plan = _experts_block("gate_up", False)
    biased = Experts(form=plan.form._replace(bias=True))
    with pytest.raises(ValueError, match="Module must have no biases, which every rank would add"):
        plans._shard_experts(block, biased, two_ranks)
    block = MLP()
    fusedmlp.patch(block)
    style = tensor_parallel_plan(block)[""]
    block[0] = nn.Sequential(block[0])
    with pytest.raises(
        ValueError, match="0 of .*MLP must be a plain projection, got a .*Sequential; merge"
    ):
        style._apply(block, two_ranks)


def test_a_router_is_no_block_of_a_plan():
    """It stays whole on every rank."""
    block = _mixtral()
    fusedmlp.patch(block, dtype_check=False)
    router = next(m for m in block.modules() if isinstance(m, Patched) and m is not block.experts)
    with pytest.raises(ValueError, match="must be a block that patch"):
        TensorParallelMLP()._apply(router, None)
