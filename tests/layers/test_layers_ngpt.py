"""nGPT's step against plain PyTorch: norms, normalised weights, scales, the paper's options."""

import functools

import pytest
import torch
import torch.nn.functional as F
from layer_checks import (
    DTYPES,
    assert_initialises_from_meta,
    assert_matches,
    assert_round_trips,
    draw,
    randomise_,
)
from torch import nn

import fusedmlp
from fusedmlp.layers import NGPT, FeedForward, ResidualWrapper
from fusedmlp.layers.ngpt import L2Norm, NormLinear, Scale, SwiGLU, l2norm

STORED = "linear.parametrizations.weight.original"


def unit(t, dim=-1):
    return t / torch.linalg.vector_norm(t, dim=dim, keepdim=True)


def net(p, h, paper):
    weights = {k: p[f"feedforward_net.norm_linear_{k}.{STORED}"] for k in ("gate", "hidden", "out")}
    gate, hidden = F.linear(h, unit(weights["gate"])), F.linear(h, unit(weights["hidden"]))
    if paper:
        gate = gate * p["feedforward_net.s_v.scale"] * h.shape[-1] ** 0.5
        hidden = hidden * p["feedforward_net.s_u.scale"]
    return F.linear(F.silu(gate) * hidden, unit(weights["out"], 0))


def ngpt(start, stored, paper=False):
    """The equation; alpha starts at `start` where its parameter starts at `stored`."""

    def formula(p, x):
        h = unit(x)
        alpha = p["alpha_m.scale"] * (start / stored)
        alpha = alpha.abs() if paper else alpha
        return unit(h + alpha * (unit(net(p, h, paper)) - h))

    return formula


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paper", (False, True))
def test_matches_formula(paper, dtype):
    layer = randomise_(NGPT(24, paper=paper)).to(dtype)
    formula = ngpt(0.05 if paper else 0.5, 24**-0.5, paper)
    assert_matches(layer, formula, draw(3, 11, 24, dtype=dtype))


@pytest.mark.parametrize("paper", (False, True))
def test_runs_on_each_backend(paper, each_backend, device):
    layer = randomise_(NGPT(24, scalar_alpha=True, paper=paper)).to(device)
    formula = ngpt(0.05 if paper else 0.5, 1.0, paper)
    assert_matches(layer, formula, draw(17, 24, device=device))


@pytest.mark.parametrize("paper", (False, True))
def test_default_net_is_one_fused_call(paper, device):
    with fusedmlp.backend("triton"):
        y = NGPT(24, paper=paper).to(device).feedforward_net(draw(3, 24, device=device))
    assert "GatedMLPFunction" in str(y.grad_fn) + str(y.grad_fn.next_functions)


def test_given_net():
    layer = randomise_(NGPT(8, FeedForward(8, glu_variant="swiglu"), alpha_m_init=0.3))
    x = draw(5, 8)
    h = unit(x)
    alpha = 0.3 * layer.alpha_m.scale * 8**0.5
    torch.testing.assert_close(layer(x), unit(h + alpha * (unit(layer.feedforward_net(h)) - h)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_is_on_the_sphere(dtype):
    y = NGPT(64)(draw(3, 5, 64, dtype=torch.float32))
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(3, 5))
    y = NGPT(64).to(dtype)(draw(3, 5, 64, dtype=dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float().norm(dim=-1), torch.ones(3, 5), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "arguments, count",
    [
        ({}, 32_704),
        ({"scalar_alpha": True}, 32_641),
        ({"paper": True}, 32_704 + 2 * 170),
        ({"feedforward_net": FeedForward(64, glu_variant="swiglu")}, 49_792),
        ({"feedforward_net": nn.Identity(), "scalar_alpha": True}, 1),
    ],
)
def test_counts(arguments, count):
    assert sum(p.numel() for p in NGPT(64, **arguments).parameters()) == count


def test_state_and_flags():
    layer = NGPT(8)
    assert list(layer.state_dict()) == [
        *(f"feedforward_net.norm_linear_{k}.{STORED}" for k in ("hidden", "gate", "out")),
        "alpha_m.scale",
    ]
    assert layer.needs_normalized_target
    assert torch.compile(layer, backend="eager").needs_normalized_target
    assert not hasattr(layer, "has_aux_loss")


def test_initial_alpha():
    torch.testing.assert_close(NGPT(16).alpha_m(), torch.full((16,), 0.5))
    torch.testing.assert_close(NGPT(16).alpha_m.scale.data, torch.full((16,), 0.25))
    assert NGPT(16, scalar_alpha=True).alpha_m.scale.tolist() == [1.0]
    torch.testing.assert_close(NGPT(16, paper=True).alpha_m(), torch.full((16,), 0.05))
    paper = NGPT(16, paper=True, alpha_m_init=0.2, alpha_m_scale=2.0)
    torch.testing.assert_close(paper.alpha_m(), torch.full((16,), 0.2))
    assert paper.alpha_m.scale.eq(2).all()


def test_the_sign_of_alpha_counts_by_default_only():
    x = draw(5, 8)
    for paper in (False, True):
        layer = NGPT(8, paper=paper)
        y = layer(x)
        with torch.no_grad():
            layer.alpha_m.scale.neg_()
        assert torch.allclose(layer(x), y) is paper


@pytest.mark.parametrize("norm_eps", (0.0, 0.1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2norm(dtype, norm_eps):
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.6, 0.78], [0.0, 0.0]], dtype=dtype)
    hard = [[0.6, 0.8], [0.6, 0.8], [0.6097, 0.7926], [0.0, 0.0]]
    soft = [[0.66, 0.88], [0.54, 0.72], [0.6, 0.78], [0.0, 0.0]]
    y = L2Norm(norm_eps=norm_eps)(x)
    assert y.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(
        y.float(), torch.tensor(soft if norm_eps else hard), atol=tolerance, rtol=0
    )


def test_l2norm_of_large_and_other_dims():
    x = draw(3, 4, 5)
    torch.testing.assert_close(L2Norm(dim=1)(x), F.normalize(x, dim=1))
    huge = torch.full((2, 64), 6e4, dtype=torch.float16)
    torch.testing.assert_close(l2norm(huge), torch.full_like(huge, 0.125))
    assert l2norm(x.double()).dtype == torch.float64
    assert torch.autograd.gradcheck(l2norm, (x.double().requires_grad_(),))


@pytest.mark.parametrize("x, norm", [([3.0, 4.0], 1.1), ([0.3, 0.4], 0.9), ([0.63, 0.84], 1.05)])
def test_the_norm_of_the_result_is_a_constant_for_autograd(x, norm):
    """An edge, and what lies between both, where the value is left alone."""
    x = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    y = l2norm(x, norm_eps=0.1)
    (slope,) = torch.autograd.grad(y[0, 0], x)
    leaf = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(norm * (leaf / leaf.norm())[0, 0], leaf)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("part", ("", ".linear"))
@pytest.mark.parametrize("name", ("hidden", "gate", "out"))
@pytest.mark.parametrize("paper", (True, False))
def test_a_hook_on_a_norm_linear_runs(paper, name, part):
    """Then its products are calls, of which scales are no part."""
    layer, x = randomise_(NGPT(8, paper=paper)), draw(3, 8)
    y, seen = layer(x), []
    module = layer.get_submodule(f"feedforward_net.norm_linear_{name}{part}")
    module.register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(layer(x), y)
    assert len(seen) == 1


@pytest.mark.parametrize("paper", (True, False))
def test_norm_eps_reaches_every_norm(paper):
    layer = NGPT(8, paper=paper, norm_eps=0.25)
    found = {
        path: value
        for path, m in layer.named_modules()
        for name, value in vars(m).items()
        if name.endswith("norm_eps")
    }
    assert set(found.values()) == {0.25} and len(found) == 4, found


@pytest.mark.parametrize("rows", (True, False))
def test_norm_linear(rows):
    layer = randomise_(NormLinear(6, 4, norm_dim_in=rows))
    weight = unit(layer.linear.parametrizations.weight.original, -1 if rows else 0)
    torch.testing.assert_close(layer.linear.weight, weight)
    torch.testing.assert_close(layer.weight, weight)
    x = draw(3, 6)
    torch.testing.assert_close(layer(x=x), F.linear(x, weight))
    assert list(layer.state_dict()) == [STORED]
    before = layer(x)
    with torch.no_grad():
        layer.linear.parametrizations.weight.original.mul_(3)
    torch.testing.assert_close(layer(x), before)


def test_scale():
    scale = Scale(5, init=0.5, scale=0.1)
    torch.testing.assert_close(scale(), torch.full((5,), 0.5))
    torch.testing.assert_close(scale.scale.data, torch.full((5,), 0.1))
    with torch.no_grad():
        scale.scale.mul_(2)
    torch.testing.assert_close(scale(), torch.full((5,), 1.0))
    scale.reset_parameters()
    torch.testing.assert_close(scale(), torch.full((5,), 0.5))
    assert "5, init=0.5, scale=0.1" in repr(scale)


class WithLoss(nn.Module):
    def forward(self, x):
        return x, x.sum()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: NGPT(0), ValueError, "NGPT: dim must be at least 1, got 0"),
        (lambda: NGPT(8, norm_eps=1.0), ValueError, r"L2Norm: norm_eps must be in \[0, 1\)"),
        (lambda: NormLinear(8, 8, norm_eps=-1), ValueError, "NormLinear: norm_eps must be"),
        (lambda: NGPT(8, alpha_m_scale=0.0), ValueError, "Scale: scale must not be 0"),
        (lambda: SwiGLU(8, mult=0.1), ValueError, "SwiGLU: mult must be finite and give a hidden"),
        (lambda: SwiGLU(8, mult="4"), TypeError, "SwiGLU: mult must be"),
        (lambda: SwiGLU(1, mult=1), ValueError, "SwiGLU: hidden width .* at least 1, got 0"),
        (lambda: NGPT(8, WithLoss())(draw(2, 8)), TypeError, "one tensor, got tuple from WithLoss"),
        (lambda: NGPT(8)(draw(2, 7)), ValueError, "NGPT: x must have last dimension 8, got"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


MAKERS = {
    "default": functools.partial(NGPT, 64),
    "paper": functools.partial(NGPT, 64, paper=True),
    "soft": functools.partial(NGPT, 64, norm_eps=0.1, scalar_alpha=True),
    "given": lambda: NGPT(64, ResidualWrapper(FeedForward(64, mult=1, dropout=0.1))),
}


@pytest.mark.parametrize("name", MAKERS)
def test_round_trips(name):
    assert_round_trips(randomise_(MAKERS[name]()), MAKERS[name](), draw(5, 64))


@pytest.mark.parametrize("name", MAKERS)
def test_initialises_from_meta(name):
    assert_initialises_from_meta(MAKERS[name])


def test_a_net_that_cannot_be_initialised_says_so():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(8))

    with pytest.raises(TypeError, match="NGPT: Bare must have reset_parameters"):
        NGPT(8, Bare()).init_weights_()


def test_autocast_keeps_x():
    layer = NGPT(64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(draw(5, 64))
    y.sum().backward()
    assert y.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


def test_leading_dims():
    layer = NGPT(8)
    x = draw(2, 3, 4, 8)
    torch.testing.assert_close(layer(x=x.view(-1, 8)).view(x.shape), layer(x))
    assert layer(x[:0]).shape == (0, 3, 4, 8)


def test_documented_examples():
    from fusedmlp.layers import NGPT, FeedForward

    ngpt_feedforward = NGPT(
        dim=256,
    )
    feedforward_net = FeedForward(
        dim=256,
        mult=4,
        glu_variant="swiglu",
    )
    ngpt_feedforward_wrapped = NGPT(
        feedforward_net=feedforward_net,
        dim=256,
    )
    x = draw(2, 256)
    assert ngpt_feedforward(x).shape == ngpt_feedforward_wrapped(x).shape == x.shape
