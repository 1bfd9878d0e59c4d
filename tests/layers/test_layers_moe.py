"""SwitchFFN, FastFeedForward, PathWeightedFFF and Top1MoE against formulas in plain PyTorch, token by
token; their parameters' names, losses, and what the seeds' tests ask of them."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from layer_checks import (
    Stranger,
    assert_compiles,
    assert_initialises_from_meta,
    assert_matches,
    draw,
    one,
    randomise_,
)
from torch import nn

import fusedmlp
from fusedmlp.layers import (
    FastFeedForward,
    FeedForward,
    PathWeightedFFF,
    SwitchFFN,
    Top1MoE,
    TopKMoE,
    fff,
    moe,
)
from fusedmlp.layers.per_expert import per_expert_state_dict

DIM = 16
VARIANTS = ("none", "swiglu", "geglu", "reglu", "mswiglu")
# Which experts, and whether x is projected for them: what another gate changes, moe_mlp's tests see.
EXPERTS = (("none", 8), ("swiglu", None), ("mswiglu", 8))


def settle(layer, scale=1.0):
    """Random parameters; routers made decisive enough that no rounding changes a choice."""
    randomise_(layer)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if p.dim() == 3:
                p.mul_(p.shape[-1] ** -0.5)
            if "router" in name or name in ("w1s", "b1s"):
                p.mul_(scale)
    return layer


def switch(**kwargs):
    return settle(SwitchFFN(DIM, 3, ff_kwargs={"mult": 1.5, "glu_variant": "swiglu"}, **kwargs))


def tree(variant="swiglu", **kwargs):
    return settle(FastFeedForward(DIM, 2, mult=1.5, glu_variant=variant, **kwargs))


def own(experts, i, x):
    """x through expert i, by its own module."""
    return experts[i](x)


# --- SwitchFFN


@pytest.mark.parametrize(
    "factor, dropped", ((None, "zero"), (1.25, "identity"), (0.4, "identity"), (0.4, "zero"))
)
def test_switch_token_by_token(factor, dropped, each_backend):
    layer = switch(capacity_factor=factor, dropped=dropped)
    x = draw(2, 11, DIM)
    y, aux = layer(x)
    flat = x.view(-1, DIM)
    p = (flat @ layer.router.weight.t()).softmax(-1)
    chosen, taken = p.argmax(-1), [0, 0, 0]
    capacity = 22 if factor is None else max(1, int(22 / 3 * factor))
    for t, e in enumerate(chosen.tolist()):
        taken[e] += 1
        late = taken[e] > capacity
        expected = p[t, e] * own(layer.experts, e, flat[t : t + 1])[0]
        if late:
            expected = flat[t] if dropped == "identity" else torch.zeros(DIM)
        torch.testing.assert_close(y.view(-1, DIM)[t], expected, rtol=1e-4, atol=1e-5)
    f = torch.tensor([(chosen == e).float().mean() for e in range(3)])
    torch.testing.assert_close(aux, 1e-2 * 3 * (f * p.mean(0)).sum())
    assert aux.dtype == torch.float32 and layer.has_aux_loss


def test_switch_aux_before_and_after_dropping():
    """The router all zeros, E = 2, N = 20, capacity 1: 0.01 as in the paper, 0.0005 as mlp_utils."""
    for legacy, expected in ((False, 0.01), (True, 0.0005)):
        layer = SwitchFFN(DIM, 2, capacity_factor=0.1, legacy_aux=legacy)
        nn.init.zeros_(layer.router.weight)
        assert layer(draw(1, 20, DIM))[1].item() == pytest.approx(expected)


def test_switch_router_learns_and_jitter_acts_in_training_alone(each_backend):
    layer = switch(jitter=0.5, z_loss_coef=1.0)
    x = draw(1, 12, DIM)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    y, aux = layer(x)
    assert not torch.equal(layer(x)[1], aux)
    (y.sum() + aux).backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_switch_expert_parameters_have_the_seeds_names():
    layer = switch()
    keys = set(per_expert_state_dict(layer))
    expected = {"router.weight"} | {
        f"experts.{i}.{name}" for i in range(3) for name, _ in layer.experts[0].named_parameters()
    }
    assert keys == expected
    assert per_expert_state_dict(layer)["experts.1.net.0.proj.weight"].shape == (48, DIM)


@pytest.mark.parametrize(
    "make", (switch, tree, functools.partial(tree, has_master_leaf=True, expert_dim=8)),
    ids=("switch", "tree", "all of a tree"),
)  # fmt: skip
def test_state_goes_round(make):
    layer, fresh = make().eval(), make().eval()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1)
    x = draw(2, 5, DIM)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    y = one(layer(x))
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(one(other(x)), y)
    state = per_expert_state_dict(layer)
    missing = next(k for k in state if k.startswith("experts.1."))
    del state[missing]
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(state)


def test_an_expert_is_a_view():
    layer = switch()
    with torch.no_grad():
        layer.experts[1].net[0].proj.weight.fill_(3)
    assert (layer.experts[1].net[0].proj.weight == 3).all()
    assert (per_expert_state_dict(layer)["experts.1.net.0.proj.weight"] == 3).all()
    assert not (layer.experts[0].net[0].proj.weight == 3).any()
    assert len(list(layer.experts)) == len(layer.experts) == 3
    assert (
        layer.experts[-1].net[0].proj.weight.data_ptr() == layer.experts[2].proj.weight.data_ptr()
    )
    with pytest.raises(IndexError):
        layer.experts[3]


@pytest.mark.parametrize(
    "kwargs", ({"pre_norm": True}, {"dropout": 0.5}, {"activation": Stranger, "glu_variant": "none"},
               {"glu_variant": "mgeglu"}, {"glu_variant": "mreglu", "mask_mode": "element"}),
    ids=("norm", "dropout", "activation", "channel-masks", "element-masks"),
)  # fmt: skip
def test_experts_that_cannot_be_fused(kwargs):
    """They run one by one; in eval, dropout is no reason to."""
    layer = settle(SwitchFFN(DIM, 3, None, ff_kwargs={"glu_variant": "swiglu", **kwargs})).eval()
    x = draw(1, 9, DIM)
    p = (x[0] @ layer.router.weight.t()).softmax(-1)
    expected = [
        p[t, e] * own(layer.experts, e, x[0, t : t + 1])[0] for t, e in enumerate(p.argmax(-1))
    ]
    torch.testing.assert_close(layer(x)[0][0], torch.stack(expected), rtol=1e-4, atol=1e-5)
    how = "in one call, fused as 'silu'" if "dropout" in kwargs else "one by one in PyTorch"
    assert f"experts (StackedExperts): 3 experts {how}" in fusedmlp.explain(layer)
    y, _ = layer.train()(x)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# --- FastFeedForward


def walk(layer, x):
    """The leaf of one token, by its routers one at a time."""
    state, node = per_expert_state_dict(layer), 0
    for _ in range(layer.depth):
        logit = x @ state[f"routers.{node}.weight"][0] + state[f"routers.{node}.bias"][0]
        node = 2 * node + (2 if logit > 0 else 1)
    return node - (layer.num_experts - 1)


@pytest.mark.parametrize("variant, expert_dim", EXPERTS)
def test_hard_path_token_by_token(variant, expert_dim, each_backend):
    layer = tree(variant, expert_dim=expert_dim).eval()
    x = draw(2, 7, DIM)
    flat = x.view(-1, DIM)
    expected = [
        layer.project_out(own(layer.experts, walk(layer, t), layer.project_in(t.unsqueeze(0))))[0]
        for t in flat
    ]
    out = layer(x)
    torch.testing.assert_close(out.view(-1, DIM), torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(flat), out.view(-1, DIM))


@pytest.mark.parametrize("variant", VARIANTS)
def test_soft_path(variant):
    layer = tree(variant).train()
    x = draw(5, DIM)
    right = layer.routers(x).sigmoid()
    leaves = [(1 - right[:, 0]) * (1 - right[:, 1]), (1 - right[:, 0]) * right[:, 1],
              right[:, 0] * (1 - right[:, 2]), right[:, 0] * right[:, 2]]  # fmt: skip
    expected = sum(p.unsqueeze(1) * own(layer.experts, i, x) for i, p in enumerate(leaves))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("master", (False, True))
@pytest.mark.parametrize("variant, expert_dim", EXPERTS)
def test_train_and_eval_agree_for_saturated_routers(variant, expert_dim, master, each_backend):
    layer = tree(variant, expert_dim=expert_dim, has_master_leaf=master)
    with torch.no_grad():
        layer.routers.weight.mul_(1e4)
    x = draw(3, 4, DIM)
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=1e-4, atol=1e-5)


def test_hard_training_reaches_visited_leaves_alone(each_backend):
    layer = tree(soft_routing_during_train=False).train()
    x = draw(1, 1, DIM)
    layer(x).sum().backward()
    seen = [
        i
        for i, e in enumerate(layer.experts)
        if any(p.grad.abs().sum() > 0 for p in e.parameters())
    ]
    assert seen == [walk(layer, x[0, 0])]
    assert layer.routers.weight.grad is None


def test_a_tie_goes_left(each_backend):
    layer = tree().eval()
    with torch.no_grad():
        layer.routers.weight.zero_()
        layer.routers.bias.zero_()
    x = draw(3, DIM)
    torch.testing.assert_close(layer(x), own(layer.experts, 0, x), rtol=1e-4, atol=1e-5)


def test_tree_losses_by_hand():
    """Decided routers: no entropy. Undecided: ln 2, and all hard paths in leaf 0, each P a quarter."""
    layer = tree(hardening_coef=2.0, load_balancing_alpha=3.0, return_aux=True).train()
    assert layer.has_aux_loss and not tree().has_aux_loss
    with torch.no_grad():
        layer.routers.weight.zero_()
        layer.routers.bias.zero_()
    x = draw(6, DIM)
    _, aux = layer(x)
    assert aux.item() == pytest.approx(2 * torch.tensor(2.0).log().item() + 3 * 4 * 0.25)
    with torch.no_grad():
        layer.routers.bias.fill_(-50)
    _, aux = layer(x)
    assert aux.item() == pytest.approx(3 * 4, rel=1e-4)
    assert layer.eval()(x)[1].item() == 0


@pytest.mark.parametrize("return_aux", (False, True))
def test_the_tree_keeps_its_last_loss(return_aux):
    layer = tree(hardening_coef=2.0, return_aux=return_aux).train()
    assert layer.aux_loss is None
    out = layer(draw(6, DIM))
    assert layer.aux_loss.item() > 0 and (not return_aux or layer.aux_loss is out[1])
    layer.aux_loss.backward()
    assert layer.routers.weight.grad.any()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.aux_loss is None and layer.aux_loss is not None
    plain = tree().train()
    plain(draw(6, DIM))
    assert plain.aux_loss is None


def test_the_last_loss_of_a_compiled_tree():
    layer, x = tree(hardening_coef=2.0).train(), draw(6, DIM)
    layer(x)
    expected = torch.autograd.grad(layer.aux_loss, layer.routers.weight)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        layer.aux_loss = None
        compiled(x)
        grad = torch.autograd.grad(compiled.aux_loss, layer.routers.weight)[0]
        torch.testing.assert_close(grad, expected)


def test_region_leak_turns_decisions_round():
    layer = tree(region_leak=1.0).train()
    with torch.no_grad():
        layer.routers.weight.zero_()
        layer.routers.bias.fill_(-50)
    x = draw(4, DIM)
    torch.testing.assert_close(layer(x), own(layer.experts, 3, x), rtol=1e-4, atol=1e-5)


def test_master_leaf_mixes():
    layer = tree(has_master_leaf=True).eval()
    with torch.no_grad():
        layer.master_mix.fill_(0.5)
    x = draw(4, DIM)
    k = torch.tensor(0.5).sigmoid()
    plain = tree().eval()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "master" not in k})
    expected = k * plain(x) + (1 - k) * layer.master(x)
    torch.testing.assert_close(layer(x), expected)
    assert layer.master.proj.weight.shape == (16, DIM)  # 8 values, 8 gates


def test_tree_parameters_have_the_seeds_names():
    layer = tree(expert_dim=8)
    state = per_expert_state_dict(layer)
    assert state["routers.0.weight"].shape == (1, DIM) and state["routers.2.bias"].shape == (1,)
    assert "experts.3.net.0.proj.weight" in state and "project_in.weight" in state
    assert layer.experts[0].proj.weight.shape == (24, 8)


# --- PathWeightedFFF


def weigh(p, x, depth=2, act=F.gelu):
    """Formula of PathWeightedFFF, a token at a time; the way is chosen in float64."""
    rows = []
    for t in x:
        node, total = 0, 0
        for _ in range(depth + 1):
            z = p["w1s"][node] @ t + p["b1s"][node]
            total = total + act(z.abs()) * (t @ p["w2s"][node] + p["b2s"][node])
            node = 2 * node + (2 if z > 0 else 1)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_path_weighted_matches_its_formula(dtype, each_backend):
    layer = settle(PathWeightedFFF(DIM, 2, 12)).to(dtype)
    assert_matches(layer, weigh, draw(7, DIM, dtype=dtype))


def test_path_weighted_routes_each_level_to_its_own_nodes(monkeypatch):
    seen = []
    moe_linear = fff.moe_linear
    monkeypatch.setattr(
        fff, "moe_linear", lambda x, r, w, b: seen.append(len(w)) or moe_linear(x, r, w, b)
    )
    with fusedmlp.backend("reference"):
        PathWeightedFFF(DIM, 2, 5)(draw(3, DIM))
    assert seen == [1, 2, 4]
    PathWeightedFFF(DIM, 2, 5)(draw(3, DIM))
    assert seen == [1, 2, 4]  # one product of all nodes in use


def test_path_weighted_shapes_and_counts():
    for depth, count in ((3, 63_375), (5, 266_175)):
        layer = PathWeightedFFF(64, depth, 64)
        assert sum(p.numel() for p in layer.parameters()) == count
    layer = PathWeightedFFF(DIM, 0, 5, activation=torch.tanh)
    assert layer(draw(2, 3, DIM)).shape == (2, 3, 5)
    for bad in (draw(DIM), draw(1, 2, 3, DIM), draw(4, 5)):
        with pytest.raises(ValueError, match=r"x must be \(N, 16\) or \(B, S, 16\)"):
            layer(bad)
    assert not layer.b2s.any() and layer.w2s.abs().max() <= DIM**-0.5


# --- Top1MoE


@pytest.mark.parametrize(
    "score, scaled, shared",
    (("softmax", "output", None), ("sigmoid", "input", 12), ("softmax", "input", None)),
)
def test_top1_moe_matches_its_formula(score, scaled, shared, each_backend):
    layer = settle(Top1MoE(DIM, 20, 3, score=score, scaled=scaled, shared_hidden=shared), scale=3.0)

    def formula(p, x):
        z = x @ p["router.weight"].t()
        rows = []
        for t, e in enumerate(z.argmax(-1).tolist()):
            s = z[t].softmax(-1)[e] if score == "softmax" else z[t, e].sigmoid()
            own = s * x[t] if scaled == "input" else x[t]
            y = (F.silu(p["w_gate"][e] @ own) * (p["w_up"][e] @ own)) @ p["w_down"][e].t()
            rows.append(y if scaled == "input" else s * y)
        y = torch.stack(rows)
        if shared:
            gate, up, down = (p[f"shared.{n}.weight"] for n in ("gate", "up", "down"))
            y = y + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return y

    assert_matches(layer, formula, draw(9, DIM))


def test_options_of_top1_moe_reach_the_op(monkeypatch):
    seen = []
    record = lambda x, *a, **options: seen.append(options) or x  # noqa: E731
    options = {"activation": "gelu", "recompute": True}
    layer = Top1MoE(DIM, 20, 3, **options)
    monkeypatch.setattr(moe, "moe_mlp", record)
    layer(draw(4, DIM))
    layer.parallel_mlp = record
    layer(draw(4, DIM))
    assert seen == [{**options, "packed": None}] * 2
    assert layer.router_options["norm"] is False  # one weight, by its sum, would be 1


def test_top1_moe_gives_its_routing():
    layer = Top1MoE(DIM, 20, 4, capacity_factor=0.5)
    y, routing = layer(draw(2, 8, DIM), return_routing=True)
    assert routing.offsets[1:5].diff().max() <= 2 and y.shape == (2, 8, DIM)
    assert not y.view(16, DIM)[~routing.kept].any()
    fusedmlp.load_balancing_loss(routing).backward()
    assert layer.router.weight.grad.abs().sum() > 0


# --- all


ALL = {
    "switch": switch,
    "tree": tree,
    "all of a tree": functools.partial(
        tree, expert_dim=8, has_master_leaf=True, hardening_coef=1.0, load_balancing_alpha=1.0,
        return_aux=True,
    ),
    "path": lambda: settle(PathWeightedFFF(DIM, 2, DIM)),
    "top1": lambda: settle(Top1MoE(DIM, 20, 3, capacity_factor=1.0, shared_hidden=8)),
    "topk": lambda: settle(TopKMoE(DIM, 20, 3, 2, capacity_factor=1.0, correction=True, bias=True)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ("switch", "all of a tree", "top1", "topk"))
def test_compiles_to_one_graph_on_the_kernels(name, on_triton):
    assert_compiles(ALL[name](), draw(2, 4, DIM))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", ALL)
def test_dtype_is_kept(name, training, dtype):
    layer = ALL[name]().to(dtype).train(training)
    out = layer(draw(2, 4, DIM, dtype=dtype))
    y = out[0] if isinstance(out, tuple) else out
    assert y.dtype == dtype and y.shape == (2, 4, DIM) and y.isfinite().all()
    y.sum().backward()


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", (*ALL, "masked"))
def test_dtype_under_autocast(name, training):
    masked = lambda: SwitchFFN(DIM, 3, ff_kwargs={"glu_variant": "mswiglu"})  # noqa: E731
    layer = ALL.get(name, masked)().train(training)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(draw(2, 4, DIM))
    y = out[0] if isinstance(out, tuple) else out
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("name", ALL)
def test_initialises_from_meta(name):
    makes = {
        "switch": lambda: SwitchFFN(32, 3),
        "tree": lambda: FastFeedForward(32, 2),
        "all of a tree": lambda: FastFeedForward(32, 2, 16, has_master_leaf=True),
        "path": lambda: PathWeightedFFF(32, 2, 32),
        "top1": lambda: Top1MoE(32, 32, 3, shared_hidden=32),
        "topk": lambda: TopKMoE(32, 32, 3, 2, shared_hidden=32, packed="gate_up", bias=True),
    }
    assert_initialises_from_meta(makes[name])


@pytest.mark.parametrize("name", ALL)
def test_no_tokens(name):
    layer = ALL[name]()
    out = layer(draw(2, 0, DIM))
    y = out[0] if isinstance(out, tuple) else out
    assert y.shape == (2, 0, DIM)
    if isinstance(out, tuple):
        assert out[1].item() == 0


def test_non_contiguous_input():
    x = draw(DIM, 6, 2).permute(2, 1, 0)
    for make in ALL.values():
        layer = make().eval()
        ours, plain = layer(x), layer(x.contiguous())
        torch.testing.assert_close(ours, plain)


BAD = [
    (lambda: SwitchFFN(8, 0), ValueError, "SwitchFFN: num_experts must be at least 1, got 0"),
    (lambda: SwitchFFN(8, 2, capacity_factor=0), ValueError, "SwitchFFN: capacity_factor must be positive or None, got 0"),
    (lambda: SwitchFFN(8, 2, dropped="x"), ValueError, "SwitchFFN: dropped must be 'identity' or 'zero', got 'x'"),
    (lambda: SwitchFFN(8, 2, jitter=2), ValueError, r"SwitchFFN: jitter must be in \[0, 1\], got 2"),
    (lambda: FastFeedForward(8, 0), ValueError, "Tree depth must be at least 1."),
    (lambda: FastFeedForward(8, 1, region_leak=2), ValueError, r"region_leak must be in \[0, 1\], got 2"),
    (lambda: FastFeedForward(8, 1)(draw(2, 7)), ValueError, r"FastFeedForward: x must have last dimension 8, got shape \(2, 7\)"),
    (lambda: FastFeedForward(8, 1, hardening_coef=-1.0), ValueError, "FastFeedForward: hardening_coef must be finite and at least 0, got -1.0"),
    (lambda: FastFeedForward(8, 1, load_balancing_alpha="1"), TypeError, "FastFeedForward: load_balancing_alpha must be a number, got '1'"),
    (lambda: SwitchFFN(8, 2, jitter=None), TypeError, "SwitchFFN: jitter must be a number, got None"),
    (lambda: SwitchFFN(8, 2, capacity_factor="a"), TypeError, "SwitchFFN: capacity_factor must be a number, got 'a'"),
    (lambda: SwitchFFN(8, 2, z_loss_coef=float("nan")), ValueError, "SwitchFFN: z_loss_coef must be finite and at least 0, got nan"),
    (lambda: Top1MoE(8, 8, 2, activation=[]), ValueError, r"Top1MoE: activation must be one of silu, .*got \[\]"),
    (lambda: PathWeightedFFF(8, -1, 8), ValueError, "Tree depth must be non-negative."),
    (lambda: Top1MoE(8, 8, 2, activation="no"), ValueError, "Top1MoE: activation must be one of silu"),
    (lambda: Top1MoE(8, 8, 2, score="no"), ValueError, "Top1MoE: score must be 'softmax' or 'sigmoid', got 'no'"),
    (lambda: Top1MoE(8, 8, 2, scaled="no"), ValueError, "Top1MoE: scaled must be 'output' or 'input', got 'no'"),
    (lambda: Top1MoE(8, 8, 2, capacity_factor=-1), ValueError, "Top1MoE: capacity_factor must be positive or None, got -1"),
    (lambda: Top1MoE(8, 8, 0), ValueError, "Top1MoE: num_experts must be at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_one_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_counts_of_the_seed():
    assert sum(p.numel() for p in FastFeedForward(64, 3, glu_variant="none").parameters()) == (
        8 * sum(p.numel() for p in FeedForward(64).parameters()) + 7 * 65
    )


def test_routers_are_a_list_to_their_users():
    """As the ModuleList of Linears that checkpoints name: length, order, index; over views."""
    routers = FastFeedForward(16, 2, mult=1).routers
    x = draw(5, 16)
    logits = routers(x)
    assert len(routers) == 3 and len(list(routers)) == 3
    torch.testing.assert_close(torch.cat([r(x) for r in routers], 1), logits)
    torch.testing.assert_close(routers[-1](x), logits[:, 2:])
    with pytest.raises(IndexError):
        routers[3]
    routers[1](x).sum().backward()
    expected = torch.zeros_like(routers.weight)
    expected[1] = x.sum(0)
    torch.testing.assert_close(routers.weight.grad, expected)
    torch.testing.assert_close(routers[1].weight.grad, expected[1:2])
    with torch.no_grad():
        routers[2].bias.fill_(7)
    assert routers.bias[2] == 7
