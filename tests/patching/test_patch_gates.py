"""Gates told by their values: which row, with which parameters, in which layout, and what is no
gate."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedmlp
from fusedmlp.patching import experts_forward
from fusedmlp.patching.gate import Gate, _same, gate_by_values, gate_of, numbers_of
from fusedmlp.patching.trace import trace

E, D, H = 2, 8, 12


class Experts(nn.Module):
    """Experts outside transformers' table; a subclass gives the gate."""

    limit, alpha = 7.0, 1.702

    def __init__(self, **settings):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size: nn.Parameter(torch.randn(size, generator=generator))  # noqa: E731
        self.gate_up_proj, self.down_proj = draw(E, 2 * H, D), draw(E, D, H)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for e in range(E):
            h = self._apply_gate(F.linear(x, self.gate_up_proj[e]))
            share = torch.where(index == e, weights, 0).sum(1, keepdim=True)
            y = y + share * F.linear(h, self.down_proj[e])
        return y


class Oai(Experts):
    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        g, u = g.clamp(max=self.limit), u.clamp(-self.limit, self.limit)
        return (u + 1) * (g * torch.sigmoid(self.alpha * g))


class Interleaved(Oai):
    def _apply_gate(self, h):
        return super()._apply_gate(torch.cat((h[..., ::2], h[..., 1::2]), -1))


class Literal(Experts):
    def _apply_gate(self, h):
        up, gate = h.chunk(2, -1)
        return F.silu(gate.clamp(max=5.5)) * up.clamp(-5.5, 5.5)


class Configured(Experts):
    """Its numbers are of a configuration, which two modules of the class need not share."""

    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return F.silu(g).clamp(max=self.config.cap) * u.clamp(-self.config.cap, self.config.cap)


class InFloat32(Experts):
    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return (F.silu(g.float()) * u.to(torch.float32)).to(h.dtype)


@pytest.mark.parametrize(
    "made, expected",
    [
        (lambda: Oai(), Gate("swiglu_oai", "gate_up")),
        (lambda: Oai(limit=7.5), Gate("swiglu_oai(limit=7.5)", "gate_up")),
        (lambda: Oai(limit=7.0000001), Gate("swiglu_oai(limit=7.0000001)", "gate_up")),
        (lambda: Oai(limit=0.01, alpha=3), Gate("swiglu_oai(limit=0.01, alpha=3.0)", "gate_up")),
        (lambda: Interleaved(limit=900), Gate("swiglu_oai(limit=900.0)", "interleaved")),
        (lambda: Literal(), Gate("clamped_swiglu(limit=5.5)", "up_gate")),
        (lambda: InFloat32(), Gate("silu", "gate_up")),
    ],
)
def test_row_parameters_and_layout(made, expected):
    module = made()
    assert gate_of(module, "_apply_gate") == expected
    x, index, weights = torch.randn(5, D), torch.tensor([[0], [1], [1], [0], [0]]), torch.rand(5, 1)
    torch.testing.assert_close(
        experts_forward(module, x, index, weights), module(x, index, weights)
    )


def test_two_modules_of_a_class_have_their_own_numbers():
    for cap in (2.0, 3.0):
        module = Configured(config=SimpleNamespace(cap=cap))
        assert gate_of(module, "_apply_gate").activation == f"swiglu_step(limit={cap})"


class OneSided(Experts):
    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return F.silu(g.clamp(max=7.0)) * u.clamp(max=7.0)


class WithoutOne(Experts):
    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return u.clamp(-7, 7) * (g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)))


class BothSides(Experts):
    """The lower clamp of the gate bites at -7 alone, where the sigmoid is 1e-3."""

    def _apply_gate(self, h):
        g, u = h.clamp(-7, 7).chunk(2, -1)
        return F.silu(g) * u


class OtherHalves(Experts):
    """Interleaved in pairs of two."""

    def _apply_gate(self, h):
        g, u = h.unflatten(-1, (-1, 2, 1)).flip(-2).unbind(-2)
        return (F.silu(g) * u).flatten(-2).roll(1, -1)


class Learned(Experts):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return F.silu(self.beta * g) * u


class Buffered(Experts):
    def __init__(self):
        super().__init__()
        self.register_buffer("cap", torch.tensor(7.0))

    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return F.silu(torch.minimum(g, self.cap)) * u


class OnData(Experts):
    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return F.silu(g) * u if g.abs().max() < 1e6 else g * u


class OnNeighbours(Experts):
    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return F.silu(g - g.mean(-1, keepdim=True)) * u


class OnMode(Experts):
    def _apply_gate(self, h):
        g, u = h.chunk(2, -1)
        return (F.silu(g) if self.training else F.gelu(g)) * u


class In16Bits(Experts):
    def _apply_gate(self, h):
        g, u = h.bfloat16().chunk(2, -1)
        return (F.silu(g) * u).to(h.dtype)


UNKNOWN = (OneSided, WithoutOne, BothSides, OtherHalves, Learned, Buffered, OnData, OnNeighbours,
           OnMode, In16Bits)  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_no_row_is_refused_with_the_reason(kind):
    experts = kind()
    reason = gate_of(experts, "_apply_gate")
    assert isinstance(reason, str) and "_apply_gate" in reason
    with pytest.raises(ValueError, match=f"{kind.__name__}: its _apply_gate"):
        experts_forward(experts, torch.randn(1, D), torch.zeros(1, 1, dtype=int), torch.ones(1, 1))
    (left,) = fusedmlp.patch(nn.ModuleDict({"experts": experts})).left
    assert left.detail == f"{kind.__name__}: {reason}"


def test_another_limit_later_is_another_gate():
    experts = Oai()
    call = lambda: experts(torch.full((1, D), 9.0), torch.zeros(1, 1, dtype=int), torch.ones(1, 1))  # noqa: E731
    own = []
    for experts.limit in (7.0, 2.0):
        own.append(call())
    assert not torch.equal(*own)
    assert fusedmlp.patch(nn.ModuleDict({"experts": experts})).patched
    for experts.limit, expected in zip((7.0, 2.0), own, strict=True):
        torch.testing.assert_close(call(), expected)


@pytest.mark.parametrize("row", (0, 1, 30, -1))
def test_a_gate_is_one_at_every_point(row):
    def fn(g, u):
        y = F.silu(g) * u
        y[row] += 1e-3
        return y

    assert gate_by_values(fn, []) is None
    assert gate_by_values(lambda g, u: F.silu(g) * u, []) == "silu"


def test_what_is_finite_is_no_infinite_gate():
    text, ones = "leaky_relu(negative_slope=1e307)", torch.ones(1, 1, dtype=torch.float64)
    for g, same in ((-1, True), (-100, False)):
        y = torch.nan_to_num(1e307 * g * ones)
        assert _same(y, text, g * ones, ones) is same


def test_numbers_of_a_trace_are_no_flags():
    act = nn.Sequential(nn.LeakyReLU(0.25, inplace=True))
    assert numbers_of(act, trace(act, "forward").nodes) == [0.25]


@pytest.mark.parametrize("made", (lambda g, u: (g, u), lambda g, u: g[:1], lambda g, u: None))
def test_what_gives_no_tensor_like_its_argument_is_no_gate(made):
    assert gate_by_values(made, []) is None
