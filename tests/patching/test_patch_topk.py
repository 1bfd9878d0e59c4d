"""Routers of k experts a token as topk_route, beside patched experts: found by what they compute,
with what they return, and one Routing for both."""

import copy
import pickle

import pytest
import torch
from patch_blocks import GatedMLP
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import fusedmlp
from fusedmlp.patching import experts, gate, route, spelling
from fusedmlp.patching.route import Logits, route_of
from fusedmlp.patching.swap import Patched

D, E, K = 16, 6, 2


def block():
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=D, intermediate_size=24, num_local_experts=E)
    config._experts_implementation = "eager"
    made = MixtralSparseMoeBlock(config)
    for p in made.parameters():
        nn.init.normal_(p, std=0.4)
    return made


def results(made, x):
    made.zero_grad()
    x = x.clone().requires_grad_()
    y = made(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in made.parameters())]


@pytest.fixture
def grouped(monkeypatch):
    """The calls of route_to."""
    calls = []
    route_to = experts.route_to
    monkeypatch.setattr(experts, "route_to", lambda *a: calls.append(a) or route_to(*a))
    return calls


@pytest.mark.parametrize("where", ("reference", "triton"))
def test_router_and_experts_share_one_routing(where, grouped):
    made, x = block(), torch.randn(2, 5, D)
    own = results(made, x)
    report = fusedmlp.patch(made)
    names = [(e.name, e.op, e.detail) for e in report.patched]
    assert names == [
        ("experts", "moe_mlp", "activation 'silu', packed 'gate_up'"),
        ("gate", "topk_route", "2 experts a token"),
    ]
    with fusedmlp.backend(where):
        ours = results(made, x)
    assert not grouped and made.gate._routed is None
    for mine, theirs in zip(ours, own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert {e.name for e in fusedmlp.patch(made).entries} == {e.name for e in report.entries}
    fusedmlp.unpatch(made)
    assert not any(isinstance(m, Patched) for m in made.modules())
    assert not {"_router", "_routed", "_settings"} & {*vars(made.experts), *vars(made.gate)}


class Scaled(MixtralSparseMoeBlock):
    def forward(self, x):
        flat = x.view(-1, D)
        _, weights, index = self.gate(flat)
        return self.experts(flat, index, 2 * weights).view(x.shape)


def test_other_weights_than_the_routers_are_grouped_again(grouped):
    made, x = block(), torch.randn(2, 5, D)
    made.__class__ = Scaled
    own = results(made, x)
    fusedmlp.patch(made)
    for mine, theirs in zip(results(made, x), own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(grouped) == 1


def test_nothing_is_drawn_from_the_models_own_numbers(monkeypatch):
    """What patch() tries out it draws from generators of its own, and gives the same again."""
    found = []
    for _ in range(2):
        for looked in (gate, route, spelling):
            monkeypatch.setattr(looked, "_FOUND", {})
        model = nn.ModuleList([block(), GatedMLP()])
        state = torch.get_rng_state()
        found.append(fusedmlp.patch(model))
        assert torch.equal(torch.get_rng_state(), state)
    assert len(found[0].patched) == 3 and str(found[0]) == str(found[1])


def test_hooks_of_the_router_see_its_logits():
    made, x = block(), torch.randn(2, 5, D)
    fusedmlp.patch(made)
    seen = []
    made.gate.register_forward_hook(lambda module, args, out: seen.append(out))
    made(x)
    ((logits, weights, index),) = seen
    assert torch.equal(logits, F.linear(x.view(-1, D), made.gate.weight))
    torch.testing.assert_close(weights, logits.topk(K).values.softmax(-1))
    assert torch.equal(index, logits.topk(K).indices)


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle")
)
def test_copies_have_routers_of_their_own(copied, grouped):
    made, x = block(), torch.randn(2, 5, D)
    fusedmlp.patch(made)
    again = copied(made)
    assert again.experts._router is again.gate is not made.gate
    torch.testing.assert_close(again(x), made(x))
    assert not grouped


def test_another_number_of_experts_later_makes_the_next_call_raise():
    made, x = block(), torch.randn(2, 5, D)
    fusedmlp.patch(made)
    made.eval()(x)  # the mode is no setting
    made.gate.top_k = 1
    with pytest.raises(TypeError, match="a number or function in it is another than at patch"):
        made(x)


def test_one_graph():
    made, x = block(), torch.randn(2, 5, D)
    fusedmlp.patch(made)
    own = results(made, x)
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    for mine, theirs in zip(results(compiled, x), own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert made.gate._routed is None


def test_under_autocast_the_router_is_its_own(grouped):
    made, x = block(), torch.randn(2, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        own = made(x)
        fusedmlp.patch(made)
        ours = made(x)
    torch.testing.assert_close(ours, own, rtol=0.05, atol=0.05)
    assert len(grouped) == 1


def test_a_hooked_router_is_left():
    made = block()
    made.gate.register_forward_hook(lambda *a: None)
    report = fusedmlp.patch(made)
    assert [(e.name, e.detail) for e in report.left] == [
        ("gate", "its router runs as it is: it has hooks")
    ]
    assert [e.name for e in report.patched] == ["experts"]


class Router(nn.Module):
    """Sigmoid scores with a correction, renormalised; a subclass changes one step."""

    def __init__(self, top_k=K, scale=2.5):
        super().__init__()
        self.top_k, self.scale = top_k, scale
        self.weight = nn.Parameter(torch.randn(E, D))
        self.register_buffer("correction", torch.zeros(E))

    def forward(self, x):
        logits = self.logits(x.reshape(-1, D))
        scores = self.scores(logits)
        index = (scores + self.correction).topk(self.top_k, sorted=False).indices
        weights = scores.gather(1, index)
        weights = self.scale * weights / (weights.sum(1, keepdim=True) + 1e-20)
        return logits, self.rounded(weights, logits, x), index

    def rounded(self, weights, logits, x):
        return weights

    def logits(self, x):
        return F.linear(x.float(), self.weight.float())

    def scores(self, logits):
        return logits.sigmoid()


class OfOwnDtype(Router):
    def logits(self, x):
        return F.linear(x, self.weight)

    def scores(self, logits):
        return logits.float().softmax(-1)


class Capped(Router):
    def logits(self, x):
        return 30 * torch.tanh(super().logits(x) / 30)


class Tempered(Router):
    def scores(self, logits):
        return (logits / 2).sigmoid()


class Detached(Router):
    def scores(self, logits):
        return logits.detach().sigmoid()


class Rounds(Router):
    def scores(self, logits):
        return logits.sigmoid().bfloat16().to(logits.dtype)


class RoundsInFloat32(Router):
    """Its weights, once they are computed."""

    def rounded(self, weights, logits, x):
        return weights.bfloat16().float() if weights.dtype == torch.float32 else weights


class Jitters(Router):
    def scores(self, logits):
        return (logits + torch.rand_like(logits) * self.training).sigmoid()


class Pairs(Router):
    def forward(self, x):
        return super().forward(x)[1:]


def test_a_correction_that_is_a_parameter_gets_no_gradient():
    """A choice gives none, in the router's own forward either."""
    made, x = block(), torch.randn(10, D)
    made.gate = Router()
    del made.gate.correction
    made.gate.correction = nn.Parameter(torch.randn(E))
    _, weights, _ = made.gate(x)
    assert "gate" in {entry.name for entry in fusedmlp.patch(made).patched}
    logits, ours, _ = made.gate(x)
    torch.testing.assert_close(ours.sort(-1).values, weights.sort(-1).values)
    (ours.square().sum() + logits.sum()).backward()
    assert made.gate.weight.grad.any() and made.gate.correction.grad is None


class AddsWhatItIsGiven(Router):
    """To its logits, which no linear map of x alone makes."""

    def forward(self, x, bias):
        logits = self.logits(x.reshape(-1, D)) + bias
        weights, index = logits.sigmoid().topk(self.top_k)
        return logits, weights, index


def test_an_argument_is_no_bias_of_logits():
    assert route_of(AddsWhatItIsGiven()) == "its logits are not one linear map of x"


def test_a_route_has_the_numbers_and_names_of_its_router():
    route = route_of(Router(k := 3, scale=0.7))
    assert route.logits == Logits("weight", None, "float32", False)
    assert (route.added, route.k, route.prob_like) == ("correction", k, "float32")
    assert dict(route.options) == {"score": "sigmoid", "eps": 1e-20, "scale": 0.7}
    other = route_of(OfOwnDtype(scale=1.0))
    assert other.logits.in_ == "as they are" and dict(other.options) == {}


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Capped, "its logits are not one linear map of x"),
        (Tempered, "topk_route has no arguments that choose and weigh as it does"),
        (Detached, "the gradient of its weights is another"),
        (Rounds, "topk_route has no arguments that choose and weigh as it does"),
        (RoundsInFloat32, "it rounds its scores before it chooses"),
        (Jitters, "it is another in training"),
        (Pairs, "it is called otherwise: TypeError"),
    ],
)
def test_another_router_is_left_with_the_reason(kind, reason):
    assert route_of(kind()).startswith(reason)
    made = block()
    made.gate = kind()
    x = torch.randn(2, 5, D)
    report = fusedmlp.patch(made)
    (left,) = report.left
    assert left.name == "gate" and left.detail.startswith(f"its router runs as it is: {reason}")
    if kind is not Pairs:
        made.eval()
        ours = made(x)
        fusedmlp.unpatch(made)
        torch.testing.assert_close(ours, made(x))


def test_weights_tell_routers_apart_where_every_expert_is_chosen():
    assert dict(route_of(Router(E)).options) == {"score": "sigmoid", "eps": 1e-20, "scale": 2.5}
    none = "topk_route has no arguments that choose and weigh as it does"
    assert route_of(Tempered(E)) == none


class LikeX(Router):
    def rounded(self, weights, logits, x):
        return weights.to(x.dtype)


class LikeLogits(OfOwnDtype):
    def rounded(self, weights, logits, x):
        return weights.to(logits.dtype)


class ScaledNarrow(LikeLogits):
    """Its weights are off by a rounding or two of their dtype."""

    def rounded(self, weights, logits, x):
        return super().rounded(weights, logits, x) * 3 / 3


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", (Router, OfOwnDtype, LikeX, LikeLogits, ScaledNarrow))
def test_a_router_gives_its_own_dtypes(kind, dtype):
    """Its weights are of float32, of its logits' dtype or of x's, as in its own code."""
    torch.manual_seed(0)
    made, x = block().to(dtype), torch.randn(10, D, dtype=dtype)
    made.gate = kind().to(dtype)
    own = made.gate(x)
    assert "gate" in {entry.name for entry in fusedmlp.patch(made).patched}
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for mine, theirs in zip(made.gate(x), own, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine.sort(-1).values, theirs.sort(-1).values, **near)
