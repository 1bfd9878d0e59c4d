"""TopKMoE against a loop over tokens in plain PyTorch; its k = 1 is Top1MoE; its losses, the update
of its correction, its limits and messages."""

import functools
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from layer_checks import assert_matches, draw
from torch import nn

import fusedmlp
from fusedmlp.layers import Top1MoE, TopKMoE, moe
from fusedmlp.packing import halves
from fusedmlp.reference.activations import resolve
from fusedmlp.reference.moe import SCORES

D, H, E = 16, 20, 6


def settle(layer):
    """Random parameters; a router decisive enough that no rounding changes a choice."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            scale = 3.0 if "router" in name else 1.0
            shape = p.shape[-1] ** -0.5 if "weight" in name or name.startswith("w_") else 1.0
            p.copy_(scale * shape * torch.randn(p.shape, generator=generator))
        if layer.correction is not None:
            layer.correction.copy_(torch.randn(E, generator=generator) / 3)
    return layer


def choices(layer, value):
    """The experts of one token, by falling value: of the best groups alone where there are some."""
    o = layer.router_options
    allowed = set(range(E))
    if o["groups"]:
        size = E // o["groups"]
        best = lambda g: sorted(value[g * size : (g + 1) * size].tolist())[-2:]  # noqa: E731
        of = max if o["group_score"] == "max" else sum
        ranked = sorted(range(o["groups"]), key=lambda g: -of(best(g)))
        allowed = {e for g in ranked[: o["topk_group"]] for e in range(g * size, (g + 1) * size)}
    return sorted(allowed, key=lambda e: -value[e].item())[: layer.k]


def expert(layer, p, e, x):
    row = resolve(layer.activation)
    pick = lambda name: p[name][e] if name in p else 0  # noqa: E731
    g, b = F.linear(x, p["w_gate"][e]), pick("b_gate")
    if not layer.gated:
        h = row.phi(g + b)
    elif layer.packed:
        g, u = halves(g + b, layer.packed)
        h = row.phi(g) * row.psi(u)
    else:
        h = row.phi(g + b) * row.psi(F.linear(x, p["w_up"][e]) + pick("b_up"))
    return F.linear(h, p["w_down"][e]) + pick("b_down")


def shared(layer, p, x):
    row = resolve(layer.activation)
    one = lambda n: F.linear(x, p[f"shared.{n}.weight"], p.get(f"shared.{n}.bias"))  # noqa: E731
    h = row.phi(one("gate")) * (row.psi(one("up")) if layer.gated else 1)
    y = F.linear(h, p["shared.down.weight"], p.get("shared.down.bias"))
    return one("score").sigmoid() * y if "score" in layer.shared else y


def by_tokens(layer):
    """The layer's formula, token by token and choice by choice."""
    o = layer.router_options

    def compute(p, x):
        z = F.linear(x, p["router.weight"], p.get("router.bias"))
        s = SCORES[o["score"]](z)
        value = (s if o["compared"] == "score" else z).detach()
        if layer.correction is not None:
            value = value + layer.correction
        factor, taken, rows = layer.capacity_factor, [0] * E, []
        limit = math.inf if factor is None else max(1, int(len(x) * layer.k / E * factor))
        for t in range(len(x)):
            chosen = choices(layer, value[t])
            w = s[t, chosen]
            if o["norm"]:
                w = w / (w.sum().clamp(min=o["least"]) + o["eps"])
            y = torch.zeros_like(x[t])
            for e, weight in zip(chosen, o["scale"] * w, strict=True):
                taken[e] += 1
                if taken[e] <= limit:
                    y = y + weight * expert(layer, p, e, x[t])
            rows.append(y if layer.shared is None else y + shared(layer, p, x[t]))
        return torch.stack(rows)

    return compute


OAI = {"activation": "swiglu_oai(limit=0.5)", "packed": "interleaved", "bias": True}
DEEPSEEK = {"score": "sigmoid", "scale": 2.5, "eps": 1e-20, "correction": True, "groups": 3,
            "topk_group": 2, "shared_hidden": 12}  # fmt: skip
KINDS = {
    **{f"k = {k}": {"k": k} for k in (1, 2, E)},
    "not normalised": {"norm": False, "scale": 0.5},
    "gpt-oss": OAI,
    "DeepSeek-V3": DEEPSEEK,
    "DeepSeek-V2": {"norm": False, "groups": 2, "topk_group": 1, "group_score": "max"},
    "Qwen2-MoE": {"norm": False, "shared_hidden": 12, "shared_score": True},
    "capacity": {"capacity_factor": 0.75, "k": 3},
    "plain": {"gated": False, "activation": "relu_sq", "shared_hidden": 12, "bias": True},
    "gate first": {"packed": "gate_up", "activation": "clamped_swiglu(limit=0.5)"},
    "up first": {"packed": "up_gate", "activation": "situ(beta=0.5)", "shared_hidden": 12},
    "biases": {"bias": True, "score": "sqrtsoftplus", "compared": "logits", "correction": True},
    "recompute": {"recompute": True, "least": 0.9},
}


def made(kind):
    return settle(TopKMoE(D, H, E, **{"k": 2, **KINDS[kind]}))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_its_formula(kind):
    layer = made(kind)
    assert_matches(layer, by_tokens(layer), draw(9, D))


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64(kind):
    """The loop to its last digits, and none of a token's choices left out."""
    layer, x = made(kind).double(), draw(2, 7, D, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    p = dict(layer.named_parameters())
    torch.testing.assert_close(y, by_tokens(layer)(p, x.flatten(0, 1)).view(x.shape))
    assert y.shape == x.shape and routing.expert.shape == routing.prob.shape == (14, layer.k)
    assert bool(routing.kept.all()) == (kind != "capacity")
    assert routing.counts.sum() == 14 * layer.k


@pytest.mark.parametrize("kind", ("k = 2", "gpt-oss", "DeepSeek-V3", "capacity"))
def test_on_each_backend(kind, each_backend):
    layer = made(kind)
    assert_matches(layer, by_tokens(layer), draw(9, D))


# --- k = 1


TOP1 = ["w_gate", "w_up", "w_down", "router.weight",
        "shared.gate.weight", "shared.up.weight", "shared.down.weight"]  # fmt: skip


@pytest.mark.parametrize("options", ({}, {"capacity_factor": 0.5}, {"score": "sigmoid"},
                                     {"activation": "swiglu_oai"}))  # fmt: skip
def test_top1_moe_is_its_k_of_1(options):
    """The same draws, names, result and gradients, bit for bit."""
    torch.manual_seed(0)
    top1 = Top1MoE(D, H, E, shared_hidden=8, **options)
    torch.manual_seed(0)
    topk = TopKMoE(D, H, E, 1, shared_hidden=8, norm=False, **options)
    assert isinstance(top1, TopKMoE)
    assert list(top1.state_dict()) == list(topk.state_dict()) == TOP1
    for ours, theirs in zip(topk.parameters(), top1.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    topk.load_state_dict(top1.state_dict())
    x, results = draw(2, 7, D), []
    for layer in (top1, topk):
        leaf = x.clone().requires_grad_()
        y, routing = layer(leaf, return_routing=True)
        y.square().sum().backward()
        grads = [leaf.grad, *(p.grad for p in layer.parameters())]
        kept = [routing.expert.view(-1), routing.prob.view(-1), routing.counts, routing.tokens]
        results.append((y, *grads, *kept))
    assert all(map(torch.equal, *results))


def test_routings_of_one_expert():
    """(T,) of Top1MoE, as ever; (T, k) of TopKMoE, whatever k."""
    x = draw(3, D)
    assert Top1MoE(D, H, E)(x, return_routing=True)[1].expert.shape == (3,)
    assert TopKMoE(D, H, E, 1)(x, return_routing=True)[1].expert.shape == (3, 1)


# --- losses, and balance without one


@pytest.mark.parametrize("kind", ("k = 1", "k = 2", "DeepSeek-V3"))
def test_losses_have_gradients(kind):
    layer, x = made(kind).double(), draw(9, D, dtype=torch.float64)
    _, routing = layer(x, return_routing=True)
    balance, z_loss = fusedmlp.load_balancing_loss(routing), fusedmlp.router_z_loss(routing)
    w = layer.router.weight.detach().requires_grad_()
    z = x @ w.T
    s = SCORES[layer.router_options["score"]](z)
    share = (s / s.sum(1, keepdim=True)).mean(0)
    expected = E / 9 * (routing.counts * share).sum()
    torch.testing.assert_close((balance, z_loss), (expected, z.logsumexp(1).square().mean()))
    (ours,) = torch.autograd.grad(balance + 2 * z_loss, layer.router.weight)
    (theirs,) = torch.autograd.grad(expected + 2 * z.logsumexp(1).square().mean(), w)
    torch.testing.assert_close(ours, theirs)
    assert ours.any()


def test_a_balanced_router_has_a_loss_of_k():
    """Token t prefers experts t and t + 1, round the table."""
    layer = TopKMoE(E, H, E, 2)
    with torch.no_grad():
        layer.router.weight.copy_(9 * torch.eye(E) + 8 * torch.eye(E).roll(1, 0))
    _, routing = layer(torch.eye(E), return_routing=True)
    assert routing.counts.tolist() == [2] * E
    assert fusedmlp.load_balancing_loss(routing).item() == pytest.approx(2)


def test_updates_of_the_correction_even_the_load():
    """A router prefers experts 0 and 1; weights stay those of the scores."""
    layer, x = TopKMoE(D, H, E, 2, score="sigmoid", correction=True), draw(120, D)
    with torch.no_grad():
        layer.router.weight.copy_(draw(E, D) / 4)
        x[:, 0] = 1
        layer.router.weight[:2, 0] += 2
    assert not layer.correction.any()
    spread = []
    for _ in range(40):
        _, routing = layer(x, return_routing=True)
        spread.append(routing.counts.max().item() / routing.counts.float().mean().item())
        fusedmlp.update_router_bias(layer.correction, routing.counts, rate=0.01)
    assert spread[0] > 2 and max(spread[-5:]) < 1.1, spread
    assert layer.correction[:2].max() < layer.correction[2:].min()
    score = layer.router(x).sigmoid().gather(1, routing.expert)
    torch.testing.assert_close(routing.prob, score / score.sum(1, keepdim=True))


def test_the_correction_is_a_wide_buffer():
    """In 16 bits a step of 0.001 beside 0.5 is none."""
    layer = TopKMoE(D, H, E, 2, correction=True)
    assert "correction" in layer.state_dict() and "correction" not in dict(layer.named_parameters())
    layer.correction.fill_(0.5)
    outer = nn.Sequential(layer).bfloat16()
    assert layer.w_gate.dtype == torch.bfloat16 and layer.correction.dtype == torch.float32
    assert outer(draw(3, D, dtype=torch.bfloat16)).dtype == torch.bfloat16
    fusedmlp.update_router_bias(layer.correction, torch.tensor([9, 0, 0, 0, 0, 0]))
    assert layer.correction[0].item() == pytest.approx(0.499, abs=1e-6)
    assert layer.double().correction.dtype == torch.float64
    assert layer.half().correction.dtype == torch.float64
    assert layer.float().correction.dtype == torch.float32
    assert layer.correction[0].item() == pytest.approx(0.499, abs=1e-6)
    assert layer.to("meta").correction.is_meta
    layer.to_empty(device="cpu").init_weights_()
    assert not layer.correction.any()


# --- shapes, and what it says


def test_no_tokens_and_any_leading_dimensions():
    layer = made("DeepSeek-V3")
    x = draw(2, 3, 2, D)
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 2)).view(x.shape))
    for shape in ((0, D), (2, 0, D)):
        leaf = torch.zeros(shape, requires_grad=True)
        y, routing = layer(leaf, return_routing=True)
        y.sum().backward()
        assert y.shape == leaf.grad.shape == shape and routing.expert.shape == (0, 2)
        assert fusedmlp.load_balancing_loss(routing) == fusedmlp.router_z_loss(routing) == 0
        assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)
    assert layer(draw(D)).shape == (D,)


def test_options_reach_the_ops(monkeypatch):
    """Each argument of topk_route and of moe_mlp, as it is."""
    seen = {}
    for name in ("topk_route", "moe_mlp"):
        real = getattr(moe, name)
        record = lambda *a, _name=name, _real=real, **k: seen.update({_name: k}) or _real(*a, **k)  # noqa: E731
        monkeypatch.setattr(moe, name, record)
    options = {
        "score": "sigmoid", "norm": False, "eps": 0.5, "least": 0.25, "scale": 3.0,
        "compared": "logits", "groups": 3, "topk_group": 2, "group_score": "max",
    }  # fmt: skip
    experts = {"activation": "situ", "packed": "up_gate", "recompute": True}
    layer = TopKMoE(D, H, E, 2, **options, **experts, correction=True, capacity_factor=1.0)
    layer(draw(9, D))
    assert seen["topk_route"] == {**options, "bias": layer.correction, "capacity": 3}
    assert seen["moe_mlp"] == experts
    known = inspect.signature(fusedmlp.topk_route).parameters
    assert {n for n, p in known.items() if p.kind is p.KEYWORD_ONLY} == seen["topk_route"].keys()


def test_explain_and_repr():
    text = "2 of 6 experts: topk_route, one moe_mlp, 'swiglu_oai(limit=0.5)'"
    assert text in repr(TopKMoE(D, H, E, 2, **OAI))
    layer = TopKMoE(D, H, E, 2, gated=False, shared_hidden=8)
    assert "moe_mlp, 'silu', and one mlp for the shared expert" in fusedmlp.explain(layer)


make = functools.partial(TopKMoE, 8, 8, 4)
GATE = "a function of one tensor here, where there is no up projection"
BAD = [
    (lambda: make(0), ValueError, "k must be from 1 to 4, the number of experts, got 0"),
    (lambda: make(5), ValueError, "k must be from 1 to 4, the number of experts, got 5"),
    (lambda: make(2.0), TypeError, "k must be an int, got 2.0"),
    (lambda: TopKMoE(0, 8, 4, 2), ValueError, "dim must be at least 1, got 0"),
    (lambda: TopKMoE(8, 8, "4", 2), TypeError, "num_experts must be an int, got '4'"),
    (lambda: make(2, activation="no"), ValueError, "activation must be one of silu, "),
    (lambda: make(2, activation="swiglu_oai(limit=-1)"), ValueError, "activation must be 'swiglu_"),
    (lambda: make(2, activation="situ", gated=False), ValueError, f"activation must be {GATE}"),
    (lambda: make(2, packed="both"), ValueError, "packed must be None, 'gate_up', 'up_gate' or 'i"),
    (lambda: make(2, packed="gate_up", gated=False), ValueError, "packed must be None for plain e"),
    (lambda: make(2, score="no"), ValueError, "score must be one of 'softmax', 'sigmoid', 'sqrt"),
    (lambda: make(2, compared="no"), ValueError, "compared must be one of 'score', 'logits', got"),
    (lambda: make(2, group_score="no"), ValueError, "group_score must be one of 'top2', 'max', go"),
    (lambda: make(2, norm=1), TypeError, "norm must be True or False, got 1"),
    (lambda: make(2, eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
    (lambda: make(2, scale=math.inf), ValueError, "scale must be finite, got inf"),
    (lambda: make(2, groups=2), ValueError, "groups and topk_group must be both given or both N"),
    (lambda: make(2, groups=3, topk_group=1), ValueError, "groups must divide the 4 experts, got"),
    (lambda: make(3, groups=2, topk_group=1), ValueError, "topk_group must leave at least k = 3 e"),
    (lambda: make(2, capacity_factor=0), ValueError, "capacity_factor must be positive or None, g"),
    (lambda: make(2, shared_hidden=0), ValueError, "shared_hidden must be at least 1, got 0"),
    (lambda: make(2, shared_score=True), ValueError, "shared_score must be False without a shared"),
    (lambda: make(2)(draw(2, 7)), ValueError, "x must have last dimension 8, got shape (2, 7)"),
    (lambda: make(2)(draw(2, 8).half()), TypeError, "x must be torch.float32, got torch.float16"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_one_clear_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(f"TopKMoE: {message}")
