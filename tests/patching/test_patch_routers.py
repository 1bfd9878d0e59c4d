"""Blocks of experts whose routers return what the releases of transformers return, and in orders
that none of them has yet: patched, each computes what it computed."""

import copy

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp.patching.moe import Llama4, Switch, _llama4, _switch
from fusedmlp.patching.routed import to_experts, to_scale
from fusedmlp.patching.trace import NoMatch

D, H, E, CAPACITY = 16, 24, 3, 2


class Router(nn.Module):
    """Top-1 of a softmax; `order` says what it returns at which place, `keepdim` as 5.17 does."""

    def __init__(self, order, keepdim, num_experts=E):
        super().__init__()
        self.order, self.keepdim, self.num_experts = order, keepdim, num_experts
        self.classifier = nn.Linear(D, num_experts, bias=False)

    def forward(self, x):
        logits = self.classifier(x)
        prob, index = logits.softmax(-1).max(-1, keepdim=self.keepdim)
        mask = nn.functional.one_hot(index, self.num_experts)
        mask = mask * (mask.cumsum(-2) <= CAPACITY)
        prob = prob if self.keepdim else prob.unsqueeze(-1)
        named = {"mask": mask, "prob": prob, "logits": logits, "entropy": logits.sum(-1)}
        return tuple(named[name] for name in self.order)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)
        self.act, self.dropout = nn.ReLU(), nn.Dropout(0.0)

    def forward(self, x):
        return self.wo(self.dropout(self.act(self.wi(x))))


class Experts(nn.ModuleDict):
    def forward(self, x, mask, prob):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.values()):
            chosen = mask[:, 0, e].nonzero()[:, 0]
            y = y.index_add(0, chosen, expert(x[chosen]) * prob[chosen])
        return y


class Flat(nn.Module):
    """As in 5.17: the router sees (tokens, D), so that no sequence ever fills an expert."""

    ORDER, KEEPDIM = ("logits", "mask", "prob"), True

    def __init__(self, num_experts=E):
        super().__init__()
        self.router = Router(self.ORDER, self.KEEPDIM, num_experts)
        self.experts = Experts({f"expert_{i}": Expert() for i in range(num_experts)})

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        _, mask, prob = self.router(hidden_states)
        return self.experts(hidden_states, mask, prob).reshape(batch, length, width)


class BySequence(Flat):
    """As in 5.24: the capacity is a sequence's."""

    ORDER, KEEPDIM = ("mask", "prob", "logits"), False

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        mask, prob, _ = self.router(hidden_states)
        mask, prob = mask.view(-1, 1, self.router.num_experts), prob.view(-1, 1)
        rows = hidden_states.view(-1, width)
        return self.experts(rows, mask, prob).reshape(batch, length, width)


class OfNoRelease(Flat):
    ORDER, KEEPDIM = ("entropy", "prob", "logits", "mask"), False

    def forward(self, x):
        routed = self.router(x)
        mask, prob = routed[3].view(-1, 1, self.router.num_experts), routed[1].reshape(-1, 1)
        return self.experts(x.view(-1, D), mask, prob).view(x.shape)


class Scaled(Flat):
    """What the experts are given is not what the router returned."""

    def forward(self, x):
        _, mask, prob = self.router(x.view(-1, D))
        return self.experts(x.view(-1, D), mask, prob * 2).view(x.shape)


class OfAnother(Flat):
    """What the experts are given is the first of two results, but not of the router's."""

    def forward(self, x):
        _, mask, prob = self.router(x.view(-1, D))
        return self.experts(x.view(-1, D), mask, prob.sort(0)[0]).view(x.shape)


class ByTwo(Flat):
    def forward(self, x):
        routed = self.router(x.view(-1, D))
        return self.experts(x.view(-1, D), routed[1:], routed[2]).view(x.shape)


class Unrolled(Flat):
    def forward(self, x):
        _, mask, prob = self.router(x.view(-1, D))
        y = sum(
            mask[:, :, e] * expert(x.view(-1, D)) for e, expert in enumerate(self.experts.values())
        )
        return (y * prob).view(x.shape)


def results(block, x):
    x = x.clone().requires_grad_()
    y = block(x)
    first = y[0] if isinstance(y, tuple) else y
    first.square().sum().backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters())
    return (*(y if isinstance(y, tuple) else (y,)), x.grad, *grads)


def assert_patched_alike(kind, plan, block, x):
    torch.manual_seed(0)
    own = results(copy.deepcopy(block), x)
    (entry,) = fusedmlp.patch(block).patched[:1]
    assert isinstance(block._plan, plan) and entry.op == "moe_mlp"
    for ours, expected in zip(results(block, x), own, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("num_experts", (E, 1))
@pytest.mark.parametrize("kind", (Flat, BySequence, OfNoRelease))
def test_switch(kind, num_experts):
    fusedmlp.register_patch(kind, _switch)
    torch.manual_seed(0)
    assert_patched_alike(kind, Switch, kind(num_experts), torch.randn(2, 9, D))


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("dropping", ((), (0,), (E - 1,), (0, 1), tuple(range(E))), ids=str)
def test_switch_with_dropout_in_some_experts(dropping, training):
    fusedmlp.register_patch(Flat, _switch)
    torch.manual_seed(0)
    block, x = Flat().train(training), torch.randn(2, 9, D)
    for e in dropping:
        block.experts[f"expert_{e}"].dropout.p = 0.5
    torch.manual_seed(1)
    expected = block(x)
    fusedmlp.patch(block)
    torch.manual_seed(1)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Scaled, "its forward hands on mul, which its router did not return as it is"),
        (OfAnother, "its forward hands on getitem_3, which its router did not return as it is"),
        (ByTwo, "its forward hands on getitem, which its router did not return as it is"),
        (Unrolled, "its forward is not experts(x, mask, prob) with what its router returns"),
    ],
)
def test_another_forward_is_left(kind, reason):
    fusedmlp.register_patch(kind, _switch)
    report = fusedmlp.patch(block := kind())
    assert report.left[0].name == "" and report.left[0].detail == reason
    # The experts in it are MLPs, and those are patched.
    assert type(block) is kind and {e.op for e in report.patched} == {"mlp"}


class TopOne(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        value, index = logits.topk(1, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter(1, index, value).sigmoid()
        return self.pair(scores, logits)

    def pair(self, scores, logits):
        return scores, logits


class Swapped(TopOne):
    def pair(self, scores, logits):
        return logits, scores


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, D, 2 * H) / 4)
        self.down_proj = nn.Parameter(torch.randn(E, H, D) / 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        gate, up = torch.bmm(x.view(E, -1, D), self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(up * self.act_fn(gate), self.down_proj).view(-1, D)


class ScoresFirst(nn.Module):
    """As in 5.9 to 5.24."""

    ROUTER = TopOne

    def __init__(self):
        super().__init__()
        self.top_k, self.hidden_dim, self.num_experts = 1, D, E
        self.experts, self.router = Stacked(), self.ROUTER(D, E, bias=False)
        self.shared_expert = nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)
        return self.mixed(x, scores), logits

    def mixed(self, x, scores):
        rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
        return self.shared_expert(x) + self.experts(rows).reshape(E, -1, D).sum(dim=0)


class LogitsFirst(ScoresFirst):
    ROUTER = Swapped

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits, scores = self.router(x)
        return self.mixed(x, scores), logits


class NoLogits(ScoresFirst):
    """As in 4.51."""

    def forward(self, hidden_states):
        return super().forward(hidden_states)[0]


@pytest.mark.parametrize("kind", (ScoresFirst, LogitsFirst))
def test_llama4(kind):
    fusedmlp.register_patch(kind, _llama4)
    torch.manual_seed(0)
    assert_patched_alike(kind, Llama4, kind(), torch.randn(2, 5, D))


def test_llama4_that_returns_no_logits_is_left():
    fusedmlp.register_patch(NoLogits, _llama4)
    report = fusedmlp.patch(NoLogits())
    assert "does not return its result and its router's logits" in report.left[0].detail


@pytest.mark.parametrize("k", (0, 2))
def test_llama4_of_another_number_of_experts_a_token_is_left(k):
    fusedmlp.register_patch(ScoresFirst, _llama4)
    block = ScoresFirst()
    block.top_k = k
    report = fusedmlp.patch(block)
    assert report.left[0].detail == f"it takes {k} experts a token, not 1"


@pytest.mark.parametrize("e, name", [(0, "wi"), (E - 1, "wo")])
def test_switch_with_a_bias_in_an_expert_is_left(e, name):
    fusedmlp.register_patch(Flat, _switch)
    block = Flat()
    sizes = (D, H) if name == "wi" else (H, D)
    setattr(block.experts[f"expert_{e}"], name, nn.Linear(*sizes))
    report = fusedmlp.patch(block)
    assert report.left[0].detail == f"an expert's {name} is no plain Linear without bias"


def test_switch_with_experts_of_two_dtypes_keeps_both():
    fusedmlp.register_patch(Flat, _switch)
    block = Flat()
    block.experts["expert_1"].double()
    before = {k: (p.dtype, p.data_ptr()) for k, p in block.named_parameters()}
    fusedmlp.patch(block, dtype_check=False)
    assert before == {k: (p.dtype, p.data_ptr()) for k, p in block.named_parameters()}


@pytest.mark.parametrize(
    "kind, plan, path",
    [
        (Flat, _switch, ""), (Flat, _switch, "experts.expert_0.act"),
        (ScoresFirst, _llama4, ""), (ScoresFirst, _llama4, "experts"),
    ],
)  # fmt: skip
def test_a_function_that_a_block_keeps_may_not_change(kind, plan, path):
    """Its own forward may call it: another, or none, raises until it is back."""
    fusedmlp.register_patch(kind, plan)
    block, x = kind(), torch.randn(2, 9, D)
    owner = block.get_submodule(path)
    owner.function, owner.kept = torch.relu, torch.relu
    assert fusedmlp.patch(block).patched
    expected = block(x)
    owner.function = torch.tanh
    where = f"{path}.function".lstrip(".")
    with pytest.raises(TypeError, match=f"{where} is another function than at patch"):
        block(x)
    owner.function = torch.relu
    torch.testing.assert_close(block(x), expected)
    del owner.function
    with pytest.raises(TypeError, match=f"{where} is another function than at patch"):
        block(x)


OTHERWISE = {
    "no router": lambda m, x: m.experts(x, x, x),
    "two arguments": lambda m, x, y: m.experts(x, (r := m.router(x))[0], r[1]),
    "two calls": lambda m, x: m.experts(x, m.router(x)[0], m.router(x)[1]),
    "of something else": lambda m, x: m.experts(x, (r := m.router(2 * x))[0], r[1]),
}


@pytest.mark.parametrize("read", (to_experts, to_scale), ids=lambda f: f.__name__)
@pytest.mark.parametrize("forward", OTHERWISE.values(), ids=OTHERWISE)
def test_a_router_is_called_once_on_x(forward, read):
    made = type("Block", (nn.Module,), {"forward": forward})()
    made.router, made.experts = nn.Identity(), nn.Identity()
    with pytest.raises(NoMatch, match="^its forward does not call its router once, on x$"):
        read(made)
