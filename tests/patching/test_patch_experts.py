"""Experts of transformers' table, in every layout that its decorator knows, against the loop over
experts that a model's own forward is."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

import fusedmlp
from fusedmlp.patching import experts_forward
from fusedmlp.patching.form import is_experts

D, H, E, T, K = 8, 12, 3, 7, 2


class Plain(nn.Module):
    """E experts whose layout is that of the options; `forward` is the loop."""

    def __init__(self, config):
        super().__init__()
        rows = (2 if config.gated else 1) * H
        first = "gate_up_proj" if config.gated else "up_proj"
        sizes = {first: (rows, D), "down_proj": (D, H)}
        generator = torch.Generator().manual_seed(0)
        for name, size in sizes.items():
            w = torch.randn(E, *size, generator=generator) / size[1] ** 0.5
            self.register_parameter(name, nn.Parameter(w.mT.contiguous() if config.turned else w))
            if config.bias:
                b = torch.randn(E, size[0], generator=generator)
                self.register_parameter(f"{name}_bias", nn.Parameter(b))
        self.first, self.act_fn, self.own = first, nn.SiLU(), config

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for t, k in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
            h = self.linear(self.first, index[t, k], x[t])
            h = self.gated(h) if self.own.gated else self.act_fn(h)
            y[t] += weights[t, k] * self.linear("down_proj", index[t, k], h)
        return y

    def gated(self, h):
        return self._apply_gate(h)

    def linear(self, name, e, x):
        w = getattr(self, name)[e]
        b = getattr(self, f"{name}_bias")[e] if self.own.bias else None
        return nn.functional.linear(x, w.T if self.own.turned else w, b)


class WithGate(Plain):
    def _apply_gate(self, h):
        up, gate = h.chunk(2, -1)
        return self.act_fn(gate) * up


class Alike(Plain):
    """Its gate computes what the table's own does, which nothing but running it could tell."""

    def _apply_gate(self, h):
        gate, up = h.chunk(2, -1)
        return up * self.act_fn(gate)


def made(cls, *, turned=False, bias=False, gated=True, **options):
    own = type(cls.__name__, (cls,), {})  # the decorator changes the class
    decorate = use_experts_implementation(
        is_transposed=turned, has_bias=bias, has_gate=gated, **options
    )
    config = SimpleNamespace(
        turned=turned, bias=bias, gated=gated, _experts_implementation="eager"
    )  # fmt: skip
    return decorate(own)(config)


def routed():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=generator)
    return x, torch.randint(E, (T, K), generator=generator), torch.rand(T, K, generator=generator)


LAYOUTS = [(*layout, "reference") for layout in itertools.product((True, False), repeat=3)]


@pytest.mark.parametrize("turned, bias, gated, where", [*LAYOUTS, (True, True, True, "triton")])
def test_every_layout_is_the_loop(turned, bias, gated, where):
    with fusedmlp.backend(where):
        compare(turned, bias, gated)


def compare(turned, bias, gated):
    experts = made(Plain, turned=turned, bias=bias, gated=gated)
    results = []
    for run in (experts, lambda *a: experts_forward(experts, *a)):
        experts.zero_grad()
        x, index, weights = routed()
        y = run(x.requires_grad_(), index, weights.requires_grad_())
        y.square().sum().backward()
        grads = [p.grad.clone() for p in experts.parameters()]
        results.append([y, x.grad, weights.grad, *grads])
    for ours, loop in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", (WithGate, Alike))
def test_a_gate_of_their_own_is_told_by_what_it_computes(cls):
    experts = made(cls)
    expected = experts(*routed())
    torch.testing.assert_close(experts_forward(experts, *routed()), expected)
    (entry,) = fusedmlp.patch(nn.ModuleDict({"experts": experts})).patched
    order = "up_gate" if cls is WithGate else "gate_up"
    assert entry.op == "moe_mlp" and entry.detail == f"activation 'silu', packed '{order}'"
    torch.testing.assert_close(experts(*routed()), expected)


def test_a_norm_after_each_expert_is_refused_and_reported():
    experts = made(Plain, has_post_expert_norm=True)
    why = "Plain has a norm after each expert, which no kernel has"
    with pytest.raises(ValueError, match=why):
        experts_forward(experts, *routed())
    (left,) = fusedmlp.patch(nn.ModuleDict({"experts": experts})).left
    assert left.detail == why


class Otherwise(Plain):
    def forward(self, x, index, weights):
        return self.own.change(super().forward(x, index, weights))


CHANGES = {
    "another": lambda y: 2 * y,
    "nearly": lambda y: (1 + 1e-6) * y,
    "in a batch": lambda y: y[None],
    "with more": lambda y: (y, None),
    "an error": lambda y: y.no_such_thing,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_forward_is_refused(change):
    """What `_apply_gate` and the flags say is not what the class does."""
    why = "Otherwise: its forward is not that of experts so laid"
    experts = made(Otherwise)
    experts.own.change = change
    with pytest.raises(ValueError, match=why):
        experts_forward(experts, *routed())


class Positive(Plain):
    """Alike where the gate is far above 0."""

    def gated(self, h):
        gate, up = h.chunk(2, -1)
        return torch.relu(gate) * up


class Interleaved(Plain):
    """Alike where the hidden width is 1."""

    def gated(self, h):
        return self.act_fn(h[::2]) * h[1::2]


class Best(Plain):
    """Alike where a token has one expert."""

    def forward(self, x, index, weights):
        return super().forward(x, index[:, :1], weights[:, :1])


class First(Plain):
    """Alike where there is one token."""

    def forward(self, x, index, weights):
        return super().forward(x, index[:1].expand_as(index), weights)


@pytest.mark.parametrize("cls", (Positive, Interleaved, Best, First))
def test_a_forward_that_does_not_call_its_gate_so_is_refused(cls):
    """And nothing is drawn from, or left in, torch's own generator."""
    experts, before = made(cls), torch.get_rng_state()
    with pytest.raises(ValueError, match="its forward is not that of experts so laid"):
        experts_forward(experts, *routed())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("k, recompute", [(1, False), (2, False), (2, True)])
def test_x_is_saved_once_for_any_number_of_experts_a_token(k, recompute):
    experts, (x, index, weights) = made(Plain), routed()
    fusedmlp.patch(nn.ModuleDict({"experts": experts}), recompute=recompute)
    x.requires_grad_()
    kept = {}
    keep = lambda t: kept.setdefault((t.data_ptr(), t.shape), t)  # noqa: E731
    with fusedmlp.backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        experts(x, index[:, :k], weights[:, :k].contiguous())
    own = {p.data_ptr() for p in experts.parameters()}
    saved = [t for (address, _), t in kept.items() if address not in own]
    routing = 4 * (2 * T * k + (E + 2) + E) + 8 * T * k + 4 * T * k  # integers, expert and prob
    gu = 0 if recompute else 4 * 2 * T * k * H
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    assert sum(t.nbytes for t in saved) <= x.nbytes + gu + routing


@pytest.mark.parametrize("gated", (True, False))
def test_bytes_that_recompute_spares_are_those_of_k_experts(gated):
    """k by the configuration; where that does not say one number, none are counted, nor tried."""
    for k, count in ((1, 1), (3, 3), (None, 0), ([1, 2], 0), ("absent", 0)):
        experts = made(Plain, gated=gated, bias=True).bfloat16()
        experts.config = SimpleNamespace(num_experts_per_tok=k)
        if k == "absent":
            del experts.config
        for recompute in (False, True):
            (entry,) = fusedmlp.patch(nn.ModuleList([experts]), recompute=recompute).patched
            assert entry.spared == recompute * count * (1 + gated) * H * 2, k
            assert ("saves x alone, 2 k H values a token less" in entry.detail) == recompute
            plan, like = experts._plan, torch.ones(1)
            if count:
                inputs = plan.example(experts, 5, like)
                assert [tuple(t.shape) for t in inputs] == [(5, D), (5, k), (5, k)]
                assert [t.dtype for t in inputs] == [like.dtype, torch.int64, like.dtype]
            else:
                with pytest.raises(NotImplementedError, match="how many experts a token has"):
                    plan.example(experts, 5, like)
            fusedmlp.unpatch(experts)


@pytest.mark.parametrize("where", ("reference", "triton"))
def test_an_expert_of_another_rank_adds_nothing(where):
    experts, (x, index, weights) = made(Plain), routed()
    away = index == 0
    with fusedmlp.backend(where):
        y = experts_forward(experts, x, index.where(~away, E), weights)
        none = experts_forward(experts, x, torch.full_like(index, E), weights)
        empty = experts_forward(experts, x[:0], index[:0], weights[:0])
    torch.testing.assert_close(y, experts(x, index, weights.where(~away, 0)))
    assert not none.any() and empty.shape == (0, D)


@pytest.mark.parametrize(("first", "second"), [*itertools.product((2, 3), repeat=2)])
def test_experts_are_stacked_in_both_weights(first, second):
    """A gate of a module's own makes no experts of one whose other weight is a matrix."""
    module = nn.Module()
    for name, dim in (("gate_up_proj", first), ("down_proj", second)):
        module.register_parameter(name, nn.Parameter(torch.zeros((2,) * dim)))
    assert not is_experts(module)
    module._apply_gate = lambda h: h
    assert is_experts(module) == (first == second == 3)


def test_a_hook_on_what_they_do_not_call():
    experts, why = made(Plain), "act_fn has hooks, which"
    handle = experts.act_fn.register_forward_hook(lambda *_: None)
    (entry,) = fusedmlp.patch(nn.ModuleList([experts])).left
    assert entry.detail == f"{why} a fused call would pass by"
    handle.remove()
    assert fusedmlp.patch(nn.ModuleList([experts])).patched
    experts.act_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=f"{why} the fused call would pass by"):
        experts(*routed())


class Other(nn.Parameter):
    """A tensor of a quantiser's."""


@pytest.mark.parametrize("name", ("gate_up_proj", "down_proj", "gate_up_proj_bias"))
def test_experts_in_other_numbers_are_left(name):
    whole = lambda p: nn.Parameter(p.to(torch.int8), requires_grad=False)  # noqa: E731
    for other, kind in ((whole, "Parameter of torch.int8"), (Other, "Other of torch.float32")):
        experts = made(Plain, bias=True)
        setattr(experts, name, other(getattr(experts, name).detach()))
        (entry,) = fusedmlp.patch(nn.ModuleList([experts])).left
        assert entry.detail == f"{name} is a {kind}: quantised"


def test_a_parameter_that_is_none_is_none_of_the_experts():
    experts = made(Plain)
    experts.register_parameter("scale", None)
    (entry,) = fusedmlp.patch(nn.ModuleList([experts])).patched
    assert {name for name, _ in experts._plan.matrices(experts)} == {"gate_up_proj", "down_proj"}
    assert entry.op == "moe_mlp"
