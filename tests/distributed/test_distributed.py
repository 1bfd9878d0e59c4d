"""Expert parallelism by gloo on CPU, 2 and 4 ranks, against the layer in one process."""

import functools
import inspect
import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import join, spawn
from torch.distributed.device_mesh import init_device_mesh

from fusedmlp import Adapter, Lora, moe_mlp, top1_route, topk_route
from fusedmlp.distributed import experts, parallel_moe_mlp, shard_experts
from fusedmlp.layers import Top1MoE, TopKMoE

D, H, E = 8, 12, 4
TOKENS = (13, 0, 5, 8)  # of each rank


def weights():
    torch.manual_seed(0)
    t = lambda *shape: torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5  # noqa: E731
    return {"w_gate": t(E, H, D), "w_up": t(E, H, D), "w_down": t(E, D, H),
            "b_gate": t(E, H), "b_up": t(E, H), "b_down": t(E, D)}  # fmt: skip


def adapters(part=slice(None)):
    torch.manual_seed(1)
    t = lambda *shape: torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5  # noqa: E731
    sizes = ((H, D), (H, D), (D, H))
    pairs = [(t(E, 3, width)[part].clone(), t(E, out, 3)[part].clone()) for out, width in sizes]
    return Lora(*(Adapter(a, b, 0.5) for a, b in pairs))


def tokens(rank):
    generator = torch.Generator().manual_seed(rank)
    draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(TOKENS[rank], D), draw(TOKENS[rank], E), draw(TOKENS[rank], D)


def routed(logits, k, capacity):
    if k == 1:
        return top1_route(logits, capacity=capacity)
    return topk_route(logits, k, score="sigmoid", capacity=capacity)


def whole(ranks, k, capacity):
    """Each rank's y, dx, dlogits and the weights' gradients over all ranks, in one process."""
    parameters = {k: w.requires_grad_() for k, w in weights().items()}
    results, total = [], 0
    for rank in range(ranks):
        x, logits, dy = tokens(rank)
        x.requires_grad_(), logits.requires_grad_()
        y = moe_mlp(x, routed(logits, k, capacity), **parameters)
        total = total + (y * dy).sum()
        results.append((y.detach(), x, logits))
    total.backward()
    grads = {k: w.grad for k, w in parameters.items()}
    return [(y, x.grad, z.grad) for y, x, z in results], grads


def _compare(rank, ranks, capacity, chunks, k=1, device="cpu", dtype=torch.float64, **near):
    """`near`: how near, of float64 in one process on a CPU."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    results, grads = whole(ranks, k, capacity)
    part = slice(rank * E // ranks, (rank + 1) * E // ranks)
    leaf = lambda t: t.clone().to(device, dtype).requires_grad_()  # noqa: E731
    close = lambda ours, t: torch.testing.assert_close(ours.double().cpu(), t, **near)  # noqa: E731
    local = {name: leaf(w[part]) for name, w in weights().items()}
    x, logits, dy = map(leaf, tokens(rank))
    y = parallel_moe_mlp(x, routed(logits, k, capacity), **local, chunks=chunks)
    (y * dy).sum().backward()
    for ours, expected in zip((y.detach(), x.grad, logits.grad), results[rank], strict=True):
        close(ours, expected)
    for name, w in local.items():
        close(w.grad, grads[name][part])


@pytest.mark.parametrize("ranks, capacity, chunks", [(2, None, 1), (2, 3, 3), (4, 2, 2)])
def test_equal_to_one_process(ranks, capacity, chunks):
    spawn(ranks, functools.partial(_compare, capacity=capacity, chunks=chunks))


@pytest.mark.parametrize("k, capacity, chunks", [(3, None, 1), (2, 4, 3)])
def test_several_experts_a_token_equal_to_one_process(k, capacity, chunks):
    spawn(2, functools.partial(_compare, k=k, capacity=capacity, chunks=chunks))


def _compare_adapted(rank, ranks):
    part = slice(rank * E // ranks, (rank + 1) * E // ranks)
    every, local = adapters(), adapters(part)
    for lora in (every, local):
        for t in (t for p in lora for t in p[:2]):
            t.requires_grad_()
    own = {name: w[part] for name, w in weights().items()}
    total = 0
    for r in range(ranks):
        x, logits, dy = tokens(r)
        y = moe_mlp(x, topk_route(logits, 2), **weights(), lora=every)
        total = total + (y * dy).sum()
        if r == rank:
            expected = y.detach()
    total.backward()
    x, logits, dy = tokens(rank)
    y = parallel_moe_mlp(x.requires_grad_(), topk_route(logits, 2), **own, lora=local, chunks=2)
    torch.testing.assert_close(y.detach(), expected)
    (y * dy).sum().backward()
    for ours, all_of_it in zip(local, every, strict=True):
        for a, b in zip(ours[:2], all_of_it[:2], strict=True):
            torch.testing.assert_close(a.grad, b.grad[part])


def test_adapters_are_those_of_the_ranks_experts():
    spawn(2, _compare_adapted)


@pytest.mark.gpu
@pytest.mark.parametrize("k", (1, 2))
@pytest.mark.parametrize("capacity, chunks", [(None, 1), (3, 3)])
def test_nccl(capacity, chunks, k):
    """Through the kernels; on one GPU a rank exchanges with itself."""
    body = functools.partial(
        _compare, capacity=capacity, chunks=chunks, k=k, device="cuda", dtype=torch.float32,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    spawn(min(2, torch.cuda.device_count()), body, timeout=120, backend="nccl")


def _refuse(rank, ranks):
    """In one process, since nothing is exchanged."""
    x, logits, _ = tokens(rank)
    good = {"x": x, "routing": top1_route(logits), **weights()}
    bad = [
        ({"x": x[:-3]}, ValueError, r"routing.expert must have shape \(10,\) .*, got \(13,\)"),
        ({"x": torch.cat([x, x])}, ValueError, r"routing.expert must have shape \(26,\) .*, got"),
        ({"x": None}, TypeError, "x must be a Tensor, got NoneType"),
        ({"x": x[:, 1:]}, ValueError, r"x must be \(\.\.\., 8\): D of w_gate; got \(13, 7\)"),
        ({"x": x.float()}, TypeError, "w_gate must have x's dtype torch.float32, got"),
        ({"routing": "foo"}, TypeError, "routing must be a Routing, got str"),
        ({"w_gate": None}, TypeError, "w_gate must be a Tensor, got NoneType"),
        ({"w_gate": x[0, 0]}, ValueError, r"w_gate must be \(E, rows, columns\), got \(\)"),
        ({"w_down": None}, TypeError, "w_down must be a Tensor, got NoneType"),
        ({"b_up": "foo"}, TypeError, "b_up must be a Tensor, got str"),
        ({"activation": "foo"}, ValueError, "activation must be one of"),
        ({"lora": {}}, TypeError, "lora must be None or a fusedmlp.Lora, got dict"),
        ({"lora": adapters(slice(2))}, ValueError, r"lora.gate.a must hold 4 of 4 .*, got 2"),
        ({"chunks": 1.5}, TypeError, "chunks must be an int, got 1.5"),
        ({"chunks": True}, TypeError, "chunks must be an int, got True"),
        ({"group": dist.GroupMember.NON_GROUP_MEMBER}, TypeError, "group must be a ProcessGroup"),
    ]
    for changed, error, message in bad:
        with pytest.raises(error, match=f"^parallel_moe_mlp: {message}"):
            parallel_moe_mlp(**{**good, **changed})
    with torch.autocast("cpu", torch.bfloat16):
        small = {k: v.float() for k, v in good.items() if k != "routing"}
        y = parallel_moe_mlp(**small, routing=top1_route(logits.float()), chunks=2)
        adapted = {
            n: Adapter(p.a.float(), p.b.float(), p.scale) for n, p in adapters()._asdict().items()
        }
        z = parallel_moe_mlp(**small, routing=top1_route(logits.float()), lora=Lora(**adapted))
    assert y.dtype == z.dtype == torch.bfloat16
    for layer, mesh, message in (
        (Top1MoE(D, H, E), None, "mesh must be a DeviceMesh, got NoneType"),
        (None, None, "layer must be a Module, got NoneType"),
    ):
        with pytest.raises(TypeError, match=f"shard_experts: {message}"):
            shard_experts(layer, mesh)
    with pytest.raises(ValueError, match="shard_experts: mesh must have one dimension, got 2"):
        shard_experts(Top1MoE(D, H, E), init_device_mesh("cpu", (1, 1)))


def _options(rank, ranks):
    """In one process: each option that moe_mlp has reaches its call of a chunk, as it is."""
    mine = {"activation": "gelu", "packed": "up_gate", "recompute": True, "lora": adapters()}
    known = inspect.signature(parallel_moe_mlp).parameters.keys() - {"chunks", "group"}
    assert known == inspect.signature(moe_mlp).parameters.keys()
    assert known - weights().keys() == {"x", "routing", *mine}
    x, logits, _ = tokens(0)
    w = weights()
    both = {name: torch.cat([w[f"{name}_up"], w[f"{name}_gate"]], 1) for name in "wb"}
    given = {"w_gate": both["w"], "w_up": None, "w_down": w["w_down"], "b_gate": both["b"]}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "moe_mlp", lambda *a, **k: seen.append(k) or moe_mlp(*a, **k))
        with torch.device("meta"):  # the default, which is not asked
            y = parallel_moe_mlp(x, top1_route(logits), **given, **mine, chunks=2)
    assert seen == [mine, mine]
    torch.testing.assert_close(y, moe_mlp(x, top1_route(logits), **given, **mine))
    z = parallel_moe_mlp(x[:, None], top1_route(logits[:, None]), **given, **mine, chunks=2)
    assert z[:, 0].equal(y)


@pytest.mark.parametrize("body", (_refuse, _options))
def test_in_one_process(body, tmp_path):
    try:
        join(0, 1, tmp_path / "store", body, 60, "gloo")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_without_a_group():
    x, logits, _ = tokens(0)
    with pytest.raises(RuntimeError, match="parallel_moe_mlp: torch.distributed must be initial"):
        parallel_moe_mlp(x, top1_route(logits), **weights())


def _same_sharded(rank, ranks, mesh, make):
    torch.manual_seed(1)
    layer, plain = make().double(), make().double()
    plain.load_state_dict(layer.state_dict())
    assert shard_experts(layer, mesh) is layer
    assert layer.w_gate.to_local().shape == (E // ranks, *plain.w_gate.shape[1:])
    x, _, dy = tokens(rank)
    total = sum((plain(tokens(r)[0]) * tokens(r)[2]).sum() for r in range(ranks))
    total.backward()
    y = layer(x)
    torch.testing.assert_close(y, plain(x))
    (y * dy).sum().backward()
    for name, p in plain.named_parameters():
        if name.startswith(("w_", "b_")):
            grad = layer.get_parameter(name).grad.full_tensor()
            torch.testing.assert_close(grad, p.grad)


def _layer(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    _same_sharded(rank, ranks, mesh, lambda: Top1MoE(D, H, E, shared_hidden=6))
    options = {"activation": "situ", "shared_hidden": 6, "score": "sigmoid", "correction": True}
    _same_sharded(rank, ranks, mesh, lambda: TopKMoE(D, H, E, 2, packed="interleaved", bias=True))
    _same_sharded(rank, ranks, mesh, lambda: TopKMoE(D, H, E, 3, **options))
    x = tokens(rank)[0]
    with pytest.raises(ValueError, match="3 experts must be a multiple of the mesh's 2 ranks"):
        shard_experts(Top1MoE(D, H, 3), mesh)
    with pytest.raises(ValueError, match="layer must hold a TopKMoE or Top1MoE, got none"):
        shard_experts(torch.nn.Linear(2, 2), mesh)
    routing = top1_route(tokens(rank)[1])
    with pytest.raises(
        ValueError, match="w_gate must hold 2 of 4 experts on each of 2 ranks, got 4"
    ):
        parallel_moe_mlp(x, routing, **weights())
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        parallel_moe_mlp(x, routing, **weights(), chunks=0)
    with pytest.raises(ValueError, match="the 3 experts of routing must be a multiple of 2 ranks"):
        parallel_moe_mlp(x, top1_route(tokens(rank)[1][:, :3]), **weights())


def test_a_sharded_layer_is_the_whole_layer():
    spawn(2, _layer)


def _lose_a_rank(rank, ranks):
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    x, logits, _ = tokens(0)
    with pytest.raises(RuntimeError):
        parallel_moe_mlp(x, top1_route(logits), **{k: w[:2] for k, w in weights().items()})
    assert time.monotonic() - start < 30
    os._exit(0)


def test_a_lost_rank_ends_in_an_error_not_in_a_hang():
    spawn(2, _lose_a_rank, timeout=5)
