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
        for t, k in torch.cartesian_prod(torch.arange(T), torch.arange(K)).tolist():
            h = self.linear(self.first, index[t, k], x[t])
            h = self._apply_gate(h) if self.own.gated else self.act_fn(h)
            y[t] += weights[t, k] * self.linear("down_proj", index[t, k], h)
        return y

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
def test_a_gate_of_their_own_is_refused_and_reported(cls):
    experts = made(cls)
    why = rf"{cls.__name__} must multiply up by .* that has a kernel, got a gate of its own"
    with pytest.raises(ValueError, match=why):
        experts_forward(experts, *routed())
    (left,) = fusedmlp.patch(nn.ModuleDict({"experts": experts})).left
    assert left.detail.endswith("got a gate of its own")
    # Without a gate there is nothing that it could change.
    plain = made(cls, gated=False)
    torch.testing.assert_close(experts_forward(plain, *routed()), plain(*routed()))


@pytest.mark.parametrize(
    "options", ({"is_concatenated": False}, {"has_post_expert_norm": True}), ids=str
)
def test_what_no_kernel_has_is_refused_and_reported(options):
    experts = made(Plain, **options)
    ((name, got),) = options.items()
    why = f"{name} of Plain must be {not got}, got {got}"
    with pytest.raises(ValueError, match=why):
        experts_forward(experts, *routed())
    (left,) = fusedmlp.patch(nn.ModuleDict({"experts": experts})).left
    assert left.detail.endswith(why)
