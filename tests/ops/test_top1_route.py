"""Routing: each token's expert, the grouping of tokens, the losses, and what is done with bad
logits and indices."""

import pytest
import torch
from op_checks import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp import Routing, load_balancing_loss, route_to, router_z_loss, top1_route
from fusedmlp.ops.top1_route import bwd, fwd, given, jitter
from fusedmlp.testing import assert_close_to, evaluate

# Chunks of one block and of several, experts off every power of 2, more experts than tokens.
SIZES = [(0, 4), (1, 1), (37, 5), (260, 64), (41, 1024), (600, 3)]
CAPACITIES = (None, 1, 7)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(T, E, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(T)
    return torch.randn(T, E, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_same(ours, reference):
    for name, a, b in zip(Routing._fields, ours, reference, strict=True):
        if a is None or not a.is_floating_point():
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
        else:
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_routing_matches_reference(size, capacity, device, on_triton):
    logits = draw(*size, device=device)
    with fusedmlp.backend("reference"):
        expected = top1_route(logits, capacity=capacity)
    assert_same(top1_route(logits, capacity=capacity), expected)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("size", [(37, 5), (41, 300)], ids=str)
def test_given_experts_match_reference(size, capacity, device, on_triton):
    T, E = size
    expert = torch.randint(-2, E + 2, (T,), generator=torch.Generator().manual_seed(2)).to(device)
    prob = torch.rand(T, device=device)
    with fusedmlp.backend("reference"):
        expected = route_to(expert, prob, E, capacity=capacity)
    assert_same(route_to(expert, prob, E, capacity=capacity), expected)


def test_by_hand(device, each_backend):
    """Six tokens, three experts, room for two: a tie, and the third token of expert 1 dropped."""
    logits = torch.tensor(
        [[0.0, 2, 1], [1, 1, 0], [0, 3, 3], [5, 0, 0], [0, 1, 0], [-1, 0, 2]], device=device
    )
    routing = top1_route(logits, capacity=2)
    assert routing.expert.tolist() == [1, 0, 1, 0, 1, 2]
    assert routing.tokens.tolist() == [1, 3, 0, 2, 5, 4]
    assert routing.rows.tolist() == [2, 0, 3, 1, 5, 4]
    assert routing.offsets.tolist() == [0, 2, 4, 5, 6]
    assert routing.counts.tolist() == [2, 3, 1]
    assert routing.kept.tolist() == [True, True, True, True, False, True]
    torch.testing.assert_close(routing.prob, logits.softmax(-1).amax(-1))
    torch.testing.assert_close(routing.mean_prob, logits.softmax(-1).mean(0))
    torch.testing.assert_close(routing.log_sum_exp, logits.logsumexp(-1))


@pytest.mark.parametrize("capacity", (None, 3))
def test_every_token_has_one_row(capacity, device, each_backend):
    routing = top1_route(draw(53, 6, device=device), capacity=capacity)
    place = torch.arange(53, device=device)
    assert torch.equal(routing.tokens[routing.rows.long()].long(), place)
    ends = routing.offsets.tolist()
    for e in range(6):
        own = routing.tokens[ends[e] : ends[e + 1]].long()
        assert (routing.expert[own] == e).all() and (own.diff() > 0).all()
        first = place[routing.expert == e][:capacity]
        assert torch.equal(own, first)
    dropped = routing.tokens[ends[6] :].long()
    assert (dropped.diff() > 0).all() and not routing.kept[dropped].any()


def _scalars(routing):
    """A scalar of each kind of result, weighted so that every token counts otherwise."""
    weights = torch.linspace(-1, 1, len(routing.prob), device=routing.prob.device)
    return (
        (routing.prob * weights.to(routing.prob)).sum(),
        (routing.mean_prob * torch.arange(routing.num_experts).to(routing.mean_prob)).sum(),
        (routing.log_sum_exp * weights.to(routing.log_sum_exp)).sum(),
        load_balancing_loss(routing),
        router_z_loss(routing),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(33, 5), (9, 200)], ids=str)
@pytest.mark.parametrize("strided", (False, True))
def test_gradients_match_reference(size, dtype, strided, device, on_triton):
    logits = draw(*size, dtype, device)
    if strided:
        logits = torch.stack([logits, logits + 1], -1)[..., 0].t().contiguous().t()
    for i in range(5):
        run = lambda t: _scalars(top1_route(t["z"]))[i].float()  # noqa: B023, E731
        one = torch.ones((), device=device)
        ours = evaluate(run, {"z": logits}, one)
        with fusedmlp.backend("reference"):
            eager = evaluate(run, {"z": logits}, one)
            exact = evaluate(
                lambda t: _scalars(top1_route(t["z"]))[i],  # noqa: B023
                {"z": logits.double()},
                one.double(),
            )
        assert_close_to(ours["dz"], exact["dz"], eager["dz"], name=f"scalar {i}")


def test_reference_passes_gradcheck():
    logits = draw(5, 4, torch.float64).requires_grad_()
    for i in range(5):
        assert torch.autograd.gradcheck(lambda z: _scalars(top1_route(z))[i], (logits,))  # noqa: B023


def test_losses_by_hand(device, each_backend):
    """Two experts, all tokens to the first, one kept: f = (1, 0), or (1/20, 0) of those kept."""
    routing = top1_route(torch.zeros(20, 2, device=device), capacity=1)
    assert load_balancing_loss(routing).item() == pytest.approx(1.0)
    assert load_balancing_loss(routing, kept_only=True).item() == pytest.approx(0.05)
    assert router_z_loss(routing).item() == pytest.approx(torch.tensor(2.0).log().item() ** 2)
    balanced = top1_route(torch.eye(4, device=device).repeat(3, 1) * 1e-3)
    assert load_balancing_loss(balanced).item() == pytest.approx(1.0, abs=1e-3)
    none = top1_route(torch.zeros(0, 2, device=device))
    assert load_balancing_loss(none).item() == router_z_loss(none).item() == 0


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_bad_logits_stay_in_their_token(bad, device, on_triton):
    logits = draw(40, 6, device=device)
    clean = top1_route(logits)
    logits[7, 3] = bad
    dirty = top1_route(logits)
    others = [t for t in range(40) if t != 7]
    assert torch.equal(clean.prob[others], dirty.prob[others])
    assert torch.equal(clean.expert[others], dirty.expert[others])
    assert dirty.prob[7].isnan() and dirty.expert[7] == 3
    with fusedmlp.backend("reference"):
        assert_same(dirty._replace(log_sum_exp=None), top1_route(logits)._replace(log_sum_exp=None))


def test_minus_infinity_switches_an_expert_off(device, each_backend):
    logits = draw(30, 4, device=device)
    logits[:, 2] = -float("inf")
    routing = top1_route(logits)
    assert routing.counts[2] == 0 and routing.mean_prob[2] == 0 and routing.prob.isfinite().all()
    logits[7] = -float("inf")
    dark = top1_route(logits)
    assert dark.prob[7].isnan() and dark.prob.isfinite().sum() == 29
    assert not dark.log_sum_exp[7].isfinite() and dark.log_sum_exp.isfinite().sum() == 29


def test_reruns_are_bit_equal(device, on_triton):
    logits = draw(300, 40, torch.bfloat16, device).requires_grad_()
    runs = []
    for _ in range(2):
        routing = top1_route(logits, capacity=9)
        (dz,) = torch.autograd.grad(sum(s.float() for s in _scalars(routing)), logits)
        runs.append([*routing, dz])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_leading_dimensions_and_dtypes(device, each_backend):
    logits = draw(12, 5, torch.bfloat16, device)
    flat, shaped = top1_route(logits), top1_route(logits.view(2, 3, 2, 5))
    assert_same(shaped, flat)
    assert flat.prob.dtype == torch.bfloat16 and flat.mean_prob.dtype == torch.float32
    assert top1_route(logits[0]).expert.shape == (1,)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles_to_one_graph(dynamic, device, each_backend):
    torch._dynamo.reset()

    def run(z):
        routing = top1_route(z, capacity=4)
        again = route_to(routing.expert, routing.prob, 5, capacity=4)
        return routing, again.tokens, load_balancing_loss(routing) + router_z_loss(routing)

    logits = draw(20, 5, device=device).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for f in (run, compiled):
        routing, tokens, loss = f(logits)
        (dz,) = torch.autograd.grad(loss + routing.prob.sum(), logits)
        results.append((*routing, tokens, loss, dz))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert isinstance(compiled(logits)[0], Routing)


def test_opcheck(device):
    z, ints = torch.randn(7, 5, device=device), torch.arange(7, device=device) % 5
    lse, mean = torch.randn(7, device=device), torch.randn(5, device=device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for capacity in (None, 2):
        opcheck(fwd, (z, capacity), test_utils=tests)
        opcheck(given, (ints, 5, capacity), test_utils=tests)
    opcheck(bwd, (z, ints, lse, mean, lse), test_utils=tests)
    opcheck(bwd, (z, ints, None, None, None), test_utils=tests)


class Given(TorchDispatchMode):
    """Which gradients a router's backward is given."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "route_bwd" in str(func):
            self.given = [t is not None for t in args[2:5]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("route", (top1_route, lambda z: fusedmlp.topk_route(z, 2)))
@pytest.mark.parametrize("at, name", list(enumerate(("prob", "mean_prob", "log_sum_exp"))))
def test_an_output_that_nobody_uses_has_no_gradient(at, name, route, device, on_triton):
    """Not zeros, which a kernel would read."""
    routing = route(torch.randn(4, 5, device=device, requires_grad=True))
    with Given() as seen:
        getattr(routing, name).sum().backward()
    assert seen.given == [i == at for i in range(3)]


def test_jitter():
    x = torch.ones(1000)
    torch.manual_seed(0)
    y = jitter(x, 0.1)
    assert 0.9 <= y.min() < 0.91 and 1.09 < y.max() <= 1.1
    assert jitter(x, 0) is x
    assert 0 <= jitter(x, 1).min() < 0.01
    with pytest.raises(ValueError, match=r"jitter: epsilon must be in \[0, 1\], got 2"):
        jitter(x, 2)


INT = torch.zeros(4, dtype=torch.int64)
BAD = [
    (lambda: top1_route([1.0]), TypeError, "top1_route: logits must be a Tensor, got list"),
    (lambda: top1_route(INT), TypeError, "top1_route: logits must have a floating dtype, got torch.int64"),
    (lambda: top1_route(torch.zeros(())), ValueError, r"top1_route: logits must be \(\.\.\., E\), E at least 1, got \(\)"),
    (lambda: top1_route(torch.zeros(3, 0)), ValueError, r"E at least 1, got \(3, 0\)"),
    (lambda: top1_route(torch.zeros(3, 2), capacity=0), ValueError, "top1_route: capacity must be None or at least 1, got 0"),
    (lambda: top1_route(torch.zeros(3, 2), capacity=1.5), TypeError, "top1_route: capacity must be None or an int, got 1.5"),
    (lambda: route_to(INT.int(), torch.zeros(4), 2), TypeError, "route_to: expert must be int64, got torch.int32"),
    (lambda: route_to(INT, INT, 2), TypeError, "route_to: prob must have a floating dtype, got torch.int64"),
    (lambda: route_to(INT, torch.zeros(3), 2), ValueError, r"route_to: prob must have shape \(4,\), got \(3,\)"),
    (lambda: route_to(INT, torch.zeros(4), 0), ValueError, "route_to: num_experts must be at least 1, got 0"),
    (lambda: route_to(INT, torch.zeros(4), 3.5), TypeError, "route_to: num_experts must be an int, got 3.5"),
    (lambda: route_to(INT, torch.zeros(4), None), TypeError, "route_to: num_experts must be an int, got None"),
    (lambda: load_balancing_loss(None), TypeError, "load_balancing_loss: routing must be a Routing, got NoneType"),
    (lambda: router_z_loss(torch.zeros(3, 2)), TypeError, "router_z_loss: routing must be a Routing, got Tensor"),
    (lambda: jitter(torch.ones(2), None), TypeError, "jitter: epsilon must be a number, got None"),
    (lambda: route_to(INT, torch.zeros(4), 2, capacity=-1), ValueError, "route_to: capacity .* got -1"),
    (lambda: route_to(INT, torch.zeros(4, device="meta"), 2), ValueError, "route_to: prob must be on cpu, as expert is, got meta"),
    (lambda: load_balancing_loss(route_to(INT, torch.zeros(4), 2)), ValueError, "load_balancing_loss: routing must come from top1_route"),
    (lambda: router_z_loss(route_to(INT, torch.zeros(4), 2)), ValueError, "router_z_loss: routing must come from top1_route"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_one_clear_error(call, error, message, each_backend):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("at", ((3, 35), (64, 99), (5, 37, 69), (0, 96)), ids=str)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), 9.0))
def test_the_first_of_equals_is_chosen(value, at, device, each_backend):
    """NaNs, infinities and ties at the largest, of 100 experts."""
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).clamp(max=2)
    logits[1:3, list(at)] = value
    expert = fusedmlp.top1_route(logits.to(device)).expert.cpu()
    assert expert.tolist() == [logits[0].argmax(), min(at), min(at), logits[3].argmax()]
