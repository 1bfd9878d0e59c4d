"""topk_route: choice, weights and grouping against a plain loop over tokens and against the
reference, and its gradients. Against the routers of models: test_topk_routers.py; bad input:
test_topk_errors.py."""

import math

import pytest
import torch
from op_checks import opcheck

import fusedmlp
from fusedmlp import (
    Routing,
    load_balancing_loss,
    route_to,
    router_z_loss,
    top1_route,
    topk_route,
    update_router_bias,
)
from fusedmlp.ops.topk_route import bwd, fwd
from fusedmlp.testing import assert_close_to, evaluate

NAN, INF = float("nan"), float("inf")
# A bias stands for itself as True: drawn by the number of experts.
FORMS = {
    "softmax": {},
    "softmax of all": {"norm": False, "scale": 2.0},
    "softmax with a least": {"least": 0.5, "eps": 0.125},
    "sigmoid": {"score": "sigmoid", "eps": 1e-20, "scale": 2.5, "bias": True},
    "groups by two": {"score": "sigmoid", "bias": True, "groups": 4, "topk_group": 2},
    "groups by the best": {"norm": False, "groups": 4, "topk_group": 3, "group_score": "max"},
    "root": {"score": "sqrtsoftplus", "bias": True, "groups": 2, "topk_group": 1},
    "biased logits": {"score": "sigmoid", "bias": True, "compared": "logits"},
}
# Chunks of one block and of several, experts and groups off every power of 2, every expert chosen.
SIZES = [(0, 8, 2), (1, 8, 1), (37, 20, 3), (300, 12, 3), (19, 8, 4), (5, 1000, 8)]


def draw(T, E, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(T)
    return torch.randn(T, E, generator=generator, dtype=torch.float64).to(device, dtype)


def options_of(form, E, device="cpu", dtype=torch.float32):
    options = dict(FORMS[form])
    if options.get("bias"):
        options["bias"] = torch.linspace(-0.4, 0.4, E).roll(E // 3).to(device, dtype)
    return options


def by_loop(
    logits, k, score="softmax", norm=True, eps=0.0, least=0.0, scale=1.0, bias=None,
    compared="score", groups=1, topk_group=1, group_score="top2", capacity=None,
):  # fmt: skip
    """expert, prob, and for each expert the numbers of the choices that it takes: token by token,
    in Python's own floats."""
    E = logits.shape[1]
    bias = [0.0] * E if bias is None else bias.tolist()
    experts, probs, taken = [], [], [[] for _ in range(E)]
    for t, z in enumerate(logits.tolist()):
        if score == "softmax":
            whole = math.fsum(math.exp(v - max(z)) for v in z)
            s = [math.exp(v - max(z)) / whole for v in z]
        elif score == "sigmoid":
            s = [1 / (1 + math.exp(-v)) for v in z]
        else:
            s = [math.log1p(math.exp(v)) ** 0.5 for v in z]
        value = [a + b for a, b in zip(s if compared == "score" else z, bias, strict=True)]
        size = E // groups
        best = []
        for g in range(groups):
            own = sorted(value[g * size : (g + 1) * size], reverse=True)
            best.append(own[0] if group_score == "max" or groups == 1 else own[0] + own[1])
        inside = sorted(range(groups), key=lambda g: (-best[g], g))[:topk_group]
        able = [e for e in range(E) if e // size in inside]
        chosen = sorted(able, key=lambda e: (-value[e], e))[:k]
        below = max(math.fsum(s[e] for e in chosen), least) + eps if norm else 1.0
        for j, e in enumerate(chosen):
            if capacity is None or len(taken[e]) < capacity:
                taken[e].append(t * k + j)
        experts.append(chosen)
        probs.append([scale * s[e] / below for e in chosen])
    return experts, probs, taken


@pytest.mark.parametrize("capacity", (None, 5))
@pytest.mark.parametrize("form", FORMS)
def test_against_a_loop_over_tokens(form, capacity, device, each_backend):
    T, E, k = 41, 20, 3
    options = options_of(form, E, device)
    logits = draw(T, E, device=device)
    routing = topk_route(logits, k, capacity=capacity, **options)
    experts, probs, taken = by_loop(logits.double(), k, capacity=capacity, **options)
    assert routing.expert.tolist() == experts
    expected = torch.tensor(probs, dtype=torch.float64)
    torch.testing.assert_close(routing.prob.double().cpu(), expected, rtol=2e-6, atol=1e-7)
    ends = routing.offsets.tolist()
    for e in range(E):
        assert routing.tokens[ends[e] : ends[e + 1]].tolist() == taken[e]
    dropped = sorted(set(range(T * k)) - {number for own in taken for number in own})
    assert routing.tokens[ends[E] :].tolist() == dropped
    place = torch.arange(T * k, device=device)
    assert torch.equal(routing.rows[routing.tokens.long()].long(), place)
    assert routing.counts.tolist() == [sum(e in own for own in experts) for e in range(E)]
    assert (~routing.kept).flatten().nonzero().flatten().tolist() == dropped


def assert_same(ours, reference):
    for name, a, b in zip(Routing._fields, ours, reference, strict=True):
        if not a.is_floating_point():
            assert a.dtype == b.dtype and torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_routing_matches_reference(size, form, device, on_triton):
    T, E, k = size
    options = options_of(form, E, device)
    if E // options.get("groups", 1) * options.get("topk_group", 1) < k:
        k = 2
    logits = draw(T, E, device=device)
    with fusedmlp.backend("reference"):
        expected = topk_route(logits, k, capacity=7, **options)
    assert_same(topk_route(logits, k, capacity=7, **options), expected)


def _scalars(routing):
    """A scalar of each kind of result, weighted so that every token and choice counts otherwise."""
    weights = lambda t: torch.linspace(-1, 1, t.numel(), device=t.device).to(t).view(t.shape)  # noqa: E731
    return (
        (routing.prob * weights(routing.prob)).sum(),
        (routing.mean_prob * weights(routing.mean_prob)).sum(),
        (routing.log_sum_exp * weights(routing.log_sum_exp)).sum(),
        load_balancing_loss(routing) + router_z_loss(routing),
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_match_reference(form, dtype, device, on_triton):
    logits = draw(21, 12, dtype, device)
    options = options_of(form, 12, device)
    one = torch.ones((), device=device)
    for i in range(4):
        run = lambda t: _scalars(topk_route(t["z"], 3, **options))[i].float()  # noqa: B023, E731
        ours = evaluate(run, {"z": logits}, one)
        with fusedmlp.backend("reference"):
            eager = evaluate(run, {"z": logits}, one)
            exact = evaluate(
                lambda t: _scalars(topk_route(t["z"], 3, **options))[i],  # noqa: B023
                {"z": logits.double()},
                one.double(),
            )
        assert_close_to(ours["dz"], exact["dz"], eager["dz"], name=f"{form}, scalar {i}")


@pytest.mark.parametrize("form", FORMS)
def test_reference_passes_gradcheck(form):
    logits = draw(5, 8, torch.float64).requires_grad_()
    options = options_of(form, 8, dtype=torch.float64)
    for i in range(4):
        run = lambda z: _scalars(topk_route(z, 3, **options))[i]  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, (logits,))


@pytest.mark.parametrize("capacity", (None, 4))
def test_one_choice_is_top1_route(capacity, device, each_backend):
    """But for the shape (T, 1)."""
    logits = draw(53, 6, device=device)
    one = topk_route(logits, 1, norm=False, capacity=capacity)
    assert one.k == 1 and one.expert.shape == one.prob.shape == one.kept.shape == (53, 1)
    flat = one._replace(expert=one.expert.flatten(), prob=one.prob.flatten())
    assert_same(flat, top1_route(logits, capacity=capacity))
    torch.testing.assert_close(topk_route(logits, 1).prob, torch.ones(53, 1, device=device))


def test_every_expert_and_one_expert(device, each_backend):
    logits = draw(9, 5, device=device)
    routing = topk_route(logits, 5)
    assert torch.equal(routing.expert, logits.sort(dim=1, descending=True).indices)
    assert (routing.counts == 9).all() and load_balancing_loss(routing).item() == pytest.approx(5)
    alone = topk_route(draw(7, 1, device=device), 1, score="sigmoid", norm=False)
    assert alone.expert.tolist() == [[0]] * 7
    torch.testing.assert_close(alone.prob, draw(7, 1, device=device).sigmoid())


def test_ties_nan_and_infinities(device, each_backend):
    """The lowest index of equals, of NaNs too, which come first; zeros of both signs are equal."""
    logits = torch.tensor(
        [
            [1.0, 2, 2, 2], [0, -0.0, 0, -0.0], [1, NAN, 3, NAN], [-INF, -INF, 5, -INF],
            [2, INF, 1, 0],
        ],
        device=device,
    )  # fmt: skip
    routing = topk_route(logits, 3)
    assert routing.expert.tolist() == [[1, 2, 3], [0, 1, 2], [1, 3, 2], [2, 0, 1], [1, 0, 2]]
    assert routing.prob[2].isnan().all() and routing.prob[4].isnan().all()
    torch.testing.assert_close(routing.prob[3], torch.tensor([1.0, 0, 0], device=device))
    soft = topk_route(logits, 3, score="sigmoid", norm=False, bias=torch.zeros(4, device=device))
    assert torch.equal(soft.expert, routing.expert)
    assert soft.prob[2].isnan().tolist() == [True, True, False]
    assert soft.prob[[0, 1, 3, 4]].isfinite().all()


def test_saturated_scores_are_told_apart_by_their_logits(device, each_backend):
    """Sigmoid is 1 in float32 from 17 on, and softmax 0 from -104 below the largest."""
    logits = torch.tensor([[20.0, 30, 25, 40]], device=device)
    assert topk_route(logits, 3, score="sigmoid").expert.tolist() == [[3, 1, 2]]
    far = torch.tensor([[0.0, -300, -200, -250]], device=device)
    assert topk_route(far, 3).expert.tolist() == [[0, 2, 3]]


def test_nothing_outside_the_best_groups_is_chosen(device, each_backend):
    """Not even where all inside are at -inf."""
    logits = torch.tensor([[9.0, -INF, 1, 1, 2, 2]], device=device)
    routing = topk_route(logits, 2, groups=3, topk_group=1, group_score="max")
    assert routing.expert.tolist() == [[0, 1]] and routing.prob.tolist() == [[1.0, 0.0]]
    routing = topk_route(logits, 2, compared="logits", groups=3, topk_group=1)
    assert routing.expert.tolist() == [[4, 5]]


def test_an_underflown_root_has_no_slope(device, each_backend):
    logits = torch.tensor([[1.0, -INF, 2, -200]], device=device, requires_grad=True)
    routing = topk_route(logits, 2, score="sqrtsoftplus")
    (grad,) = torch.autograd.grad(_scalars(routing)[0] + _scalars(routing)[1], logits)
    assert grad.isfinite().all() and not grad[0, [1, 3]].any()


def test_an_output_that_is_not_used_adds_no_gradient(device, each_backend):
    """All scores underflow, so the weights are 0 / 0; the sum of exponentials is as ever."""
    logits = torch.full((2, 4), -200.0, device=device, requires_grad=True)
    routing = topk_route(logits, 2, score="sigmoid")
    routing.log_sum_exp.sum().backward()
    assert routing.prob.isnan().all()
    torch.testing.assert_close(logits.grad, torch.full_like(logits, 0.25))


def test_reruns_are_bit_equal(device, on_triton):
    logits = draw(300, 40, torch.bfloat16, device).requires_grad_()
    runs = []
    for _ in range(2):
        routing = topk_route(logits, 4, score="sigmoid", capacity=9)
        (dz,) = torch.autograd.grad(sum(s.float() for s in _scalars(routing)), logits)
        runs.append([*routing, dz])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_strides_leading_dimensions_and_dtypes(device, each_backend):
    logits = draw(12, 8, torch.bfloat16, device)
    for bias in (None, torch.linspace(-1, 1, 8, device=device)):
        flat = topk_route(logits, 3, bias=bias)
        assert_same(topk_route(logits.view(2, 3, 2, 8), 3, bias=bias), flat)
        assert_same(topk_route(logits.t().contiguous().t(), 3, bias=bias), flat)
        assert torch.equal(topk_route(logits[0], 3, bias=bias).expert, flat.expert[:1])
        assert flat.prob.dtype == torch.bfloat16 and flat.mean_prob.dtype == torch.float32


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles_to_one_graph(dynamic, device, each_backend):
    torch._dynamo.reset()
    bias = torch.linspace(-0.1, 0.1, 8, device=device)

    def run(z):
        routing = topk_route(
            z, 2, score="sigmoid", bias=bias, groups=4, topk_group=2, capacity=8
        )  # fmt: skip
        again = route_to(routing.expert, routing.prob, 8, capacity=8)
        return routing, again.tokens, load_balancing_loss(routing) + router_z_loss(routing)

    logits = draw(20, 8, device=device).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for f in (run, compiled):
        routing, tokens, loss = f(logits)
        (dz,) = torch.autograd.grad(loss + routing.prob[:, 0].sum(), logits)
        results.append((*routing, tokens, loss, dz))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_two_launches_forward_and_one_backward(device, on_triton, launched):
    logits = draw(40, 8, device=device).requires_grad_()
    routing = topk_route(logits, 2)
    assert launched == ["_choose_kernel", "_place_kernel"]
    launched.clear()
    sum(_scalars(routing)[:3]).backward()
    assert launched == ["_bwd_kernel"]


def test_opcheck(device):
    z, bias = torch.randn(7, 8, device=device), torch.zeros(8, device=device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    form = ("sigmoid", True, 1e-20, 0.0, 2.5)
    expert = topk_route(z, 2).expert
    dprob, dmean, dlse = torch.randn(7, 2), torch.randn(8), torch.randn(7)
    grads = [t.to(device) for t in (dprob, dmean, dlse)]
    opcheck(fwd, (z, bias, 2, 3, *form, "score", 4, 2, "top2"), test_utils=tests)
    opcheck(fwd, (z, None, 2, None, *form, "logits", 1, 1, "max"), test_utils=tests)
    opcheck(bwd, (z, expert, *grads, *form), test_utils=tests)
    opcheck(bwd, (z, expert, None, None, None, *form), test_utils=tests)


def test_the_bias_update_balances():
    """Experts that are chosen too often lose by it, until all are chosen alike."""
    logits = draw(512, 8) + torch.linspace(-1, 1, 8)
    bias, first = torch.zeros(8), None
    for _ in range(200):
        counts = topk_route(logits, 2, score="sigmoid", bias=bias).counts
        first = counts if first is None else first
        assert update_router_bias(bias, counts, rate=0.01) is bias
    spread = lambda t: int(t.max() - t.min())  # noqa: E731
    assert spread(counts) < spread(first) / 4
    assert torch.equal(update_router_bias(torch.zeros(2), torch.tensor([3, 3])), torch.zeros(2))


@pytest.mark.parametrize("k", [1, 2])
def test_stats_of_a_routing(k):
    """By hand: 6 tokens, 4 experts, capacity 3; expert 3 is never chosen."""
    first, second = torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([1, 1, 1, 1, 0, 0])
    expert = first if k == 1 else torch.stack([first, second], 1)
    routing = fusedmlp.route_to(expert, torch.ones(expert.shape, requires_grad=True), 4, capacity=3)
    stats = routing.stats()
    counts = torch.tensor([4.0, 1, 1, 0]) if k == 1 else torch.tensor([6.0, 5, 1, 0])
    torch.testing.assert_close(stats.load, counts / (6 * k))
    assert stats.dropped.item() == pytest.approx((1 if k == 1 else 5) / (6 * k))
    assert stats.dropped.item() == pytest.approx((~routing.kept).float().mean().item())
    p = counts[:3] / (6 * k)
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum())
    assert not any(t.requires_grad for t in stats)


def test_stats_of_no_tokens_and_of_sentinels():
    none = fusedmlp.topk_route(torch.zeros(0, 4), 2).stats()
    assert none.load.tolist() == [0] * 4 and none.dropped == 0 and none.entropy == 0
    # Index 4 of 4 experts is none of them.
    half = fusedmlp.route_to(torch.tensor([0, 4, 1, 4]), torch.ones(4), 4).stats()
    assert half.load.tolist() == [0.25, 0.25, 0, 0] and half.dropped == 0.5
    torch.testing.assert_close(half.entropy, torch.tensor(2.0).log())


def test_stats_are_compiled():
    logits = torch.randn(8, 4)
    whole = torch.compile(
        lambda z: fusedmlp.topk_route(z, 2).stats(), fullgraph=True, backend="eager"
    )
    for got, expected in zip(whole(logits), fusedmlp.topk_route(logits, 2).stats(), strict=True):
        torch.testing.assert_close(got, expected)
