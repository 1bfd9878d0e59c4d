"""MLP, GatingMechanism and ResidualWrapper against plain PyTorch; structure, counts, messages."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from layer_checks import (
    DTYPES,
    Stranger,
    assert_cheap,
    assert_initialises_from_meta,
    assert_matches,
    assert_round_trips,
    draw,
    randomise_,
)
from torch import nn

import fusedmlp
from fusedmlp.layers import MLP, FeedForward, GatingMechanism, ResidualWrapper
from fusedmlp.layers.parts.sequential import FusedSequential


def sequential(layer, prefix):
    """The layer's children called one by one, as nn.Sequential does it, on given parameters."""
    children = nn.Sequential(*layer)

    def formula(p, x):
        own = {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}
        return torch.func.functional_call(children, own, (x,))

    return formula


def rms(x, weight):
    eps = torch.finfo(x.dtype).eps
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def kinds(sequence):
    return [type(m) for m in sequence]


NORM, LINEAR, ACT, DROP = nn.RMSNorm, nn.Linear, nn.GELU, nn.Dropout
ORDERS = {
    "none": [LINEAR, ACT, DROP, LINEAR],
    "post": [LINEAR, NORM, ACT, DROP, LINEAR, NORM],
    "pre": [NORM, LINEAR, ACT, DROP, LINEAR, NORM],
    "both": [NORM, LINEAR, NORM, ACT, DROP, LINEAR, NORM],
}


@pytest.mark.parametrize("mode", ORDERS)
def test_mlp_order(mode):
    layer = MLP(8, norm_mode=mode)
    assert kinds(layer.model) == ORDERS[mode]
    assert layer.norm_mode == mode
    bare = MLP(8, norm_mode=mode, dropout=0.0, output_norm=False)
    expected = [kind for kind in ORDERS[mode] if kind is not DROP]
    assert kinds(bare.model) == (expected if mode == "none" else expected[:-1])


def test_mlp_arguments_of_both_versions_agree():
    assert MLP(8).norm_mode == "post"
    assert MLP(8, pre_norm=True).norm_mode == "pre"
    assert MLP(8, use_norm=False).norm_mode == "none"
    assert MLP(8, pre_norm=True, norm_mode="both").norm_mode == "both"
    assert MLP(8, use_norm=False, norm_mode="none").norm_mode == "none"


def test_mlp_defaults():
    layer = MLP(8)
    assert (layer.input_dim, layer.output_dim) == (8, 8)
    assert layer.model[3].p == 0.1
    assert layer.model[0].weight.shape == (32, 8)
    assert MLP(8, 5, hidden_factor=1.6).model[0].weight.shape == (12, 8)
    assert MLP(8, 5)(draw(2, 3, 8)).shape == (2, 3, 5)


@pytest.mark.parametrize(
    "arguments, count", [({}, 33_408), ({"pre_norm": True}, 33_216), ({"use_norm": False}, 33_088)]
)
def test_mlp_counts(arguments, count):
    assert sum(p.numel() for p in MLP(64, **arguments).parameters()) == count


def test_mlp_matches_an_independent_formula():
    layer = randomise_(MLP(8, 5, hidden_factor=2, dropout=0.0))

    def formula(p, x):
        h = rms(F.linear(x, p["model.0.weight"], p["model.0.bias"]), p["model.1.weight"])
        y = F.linear(F.gelu(h), p["model.3.weight"], p["model.3.bias"])
        return rms(y, p["model.4.weight"])

    assert_matches(layer, formula, draw(5, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ORDERS)
def test_mlp_matches_its_children(mode, dtype):
    layer = randomise_(MLP(8, norm_mode=mode, hidden_factor=2, dropout=0.0)).to(dtype)
    assert_matches(layer, sequential(layer.model, "model."), draw(2, 7, 8, dtype=dtype))


@pytest.mark.parametrize("act_fn", (nn.SiLU(), Stranger, fusedmlp.SugarReLU, fusedmlp.Gelu2))
@pytest.mark.parametrize("mode", ("none", "post"))
def test_mlp_on_each_backend(mode, act_fn, each_backend, device):
    layer = MLP(8, norm_mode=mode, hidden_factor=2, dropout=0.0, act_fn=act_fn)
    layer = randomise_(layer).to(device)
    assert_matches(layer, sequential(layer.model, "model."), draw(5, 8, device=device))


def test_mlp_dropout_in_training_only():
    layer = randomise_(MLP(8, dropout=0.5, norm_mode="none"))
    x = draw(50, 8)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, nn.Sequential.forward(layer.model, x))
    assert not torch.allclose(y, layer.eval()(x))
    torch.testing.assert_close(layer(x), nn.Sequential.forward(layer.model, x))


def test_what_runs_as_one_call():
    layer = MLP(8, norm_mode="pre", act_fn=nn.SiLU)
    assert "runs RMSNorm, Linear + SiLU, Dropout, Linear, RMSNorm" in repr(layer)
    layer.eval()
    expected = "model (FusedSequential): runs RMSNorm, Linear + SiLU + Dropout + Linear, RMSNorm"
    assert expected in fusedmlp.explain(layer)
    assert "runs Linear, RMSNorm, GELU, Linear, RMSNorm" in repr(MLP(8, dropout=0.0))
    assert "runs Linear, Stranger, Linear" in repr(
        MLP(8, act_fn=Stranger, norm_mode="none", dropout=0.0)
    )
    gate = GatingMechanism(8, bottleneck_dim=4)
    assert "runs Linear, RMSNorm, GELU, Dropout, Linear + Sigmoid" in repr(gate)


@pytest.mark.parametrize("layers", [(), (nn.GELU(),), (nn.Linear(4, 4),), (nn.GELU(), nn.Tanh())])
def test_fused_sequential_of_few(layers):
    x = draw(3, 4)
    torch.testing.assert_close(FusedSequential(*layers)(x), nn.Sequential(*layers)(x))


def test_fused_sequential_calls_what_is_no_plain_linear():
    class Adapter(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = FusedSequential(Adapter(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), Adapter(4, 4))
    assert net.path() == "runs Adapter, GELU, Linear + GELU, Adapter"
    x = draw(3, 4)
    torch.testing.assert_close(net(x), nn.Sequential.forward(net, x))


def test_mlp_residual():
    layer = randomise_(MLP(8, residual=True, dropout=0.0, hidden_factor=2))
    assert isinstance(layer.model, ResidualWrapper)
    x = draw(5, 8)
    torch.testing.assert_close(layer(x), x + layer.model.module(x))
    with pytest.warns(UserWarning, match="MLP: residual=True is not used, because input_dim 8 and"):
        other = MLP(8, 5, residual=True)
    assert not isinstance(other.model, ResidualWrapper)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MLP(8, 8, residual=True)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"hidden_factor": 0}, ValueError, "hidden_factor must be positive, got 0"),
        ({"hidden_factor": -2}, ValueError, "hidden_factor must be positive, got -2"),
        ({"hidden_factor": "4"}, TypeError, "MLP: hidden_factor must be a number, got '4'"),
        ({"hidden_factor": 0.01}, ValueError, "MLP: hidden_factor must .* width of at least 1"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0.0,1.0\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0.0,1.0\), got -0.1"),
        ({"input_dim": 0}, ValueError, "MLP: input_dim must be at least 1, got 0"),
        ({"output_dim": 2.0}, TypeError, "MLP: output_dim must be an int, got 2.0"),
        ({"norm_mode": "mid"}, ValueError, "MLP: norm_mode must be None or one of pre, post, both"),
        ({"norm_mode": "pre", "use_norm": False}, ValueError, "MLP: norm_mode must agree .*False"),
        ({"norm_mode": "post", "pre_norm": True}, ValueError, "MLP: norm_mode must agree"),
        (
            {"act_fn": "no"},
            ValueError,
            "MLP: act_fn must be one of silu, .*, clipped_gelu; got 'no'",
        ),
        ({"act_fn": lambda: 3}, TypeError, "MLP: act_fn .* which made 3"),
    ],
)
def test_mlp_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MLP(**{"input_dim": 8, **arguments})


def test_mlp_initial_values():
    torch.manual_seed(0)
    layer = MLP(128)
    for linear in (layer.model[0], layer.model[4]):
        assert linear.weight.std().item() == pytest.approx(
            (2 / linear.in_features) ** 0.5, rel=0.05
        )
        assert not linear.bias.any()


@pytest.mark.parametrize("sigmoid", (True, False))
@pytest.mark.parametrize("pre_norm", (True, False))
@pytest.mark.parametrize("use_norm", (True, False))
def test_gating_order(use_norm, pre_norm, sigmoid):
    layer = GatingMechanism(
        8, bottleneck_dim=4, use_norm=use_norm, pre_norm=pre_norm, sigmoid_output=sigmoid
    )
    expected = [NORM] * (use_norm and pre_norm) + [LINEAR] + [NORM] * (use_norm and not pre_norm)
    assert kinds(layer.gate) == expected + [ACT, DROP, LINEAR] + [nn.Sigmoid] * sigmoid


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pre_norm", (True, False))
def test_gating_matches_its_children(pre_norm, dtype):
    layer = GatingMechanism(8, 6, bottleneck_factor=0.5, dropout=0.0, pre_norm=pre_norm)
    layer = randomise_(layer).to(dtype)
    assert_matches(layer, sequential(layer.gate, "gate."), draw(2, 7, 8, dtype=dtype))


@pytest.mark.parametrize("pre_norm", (True, False))
def test_gating_on_each_backend(pre_norm, each_backend, device):
    layer = GatingMechanism(8, bottleneck_factor=0.5, dropout=0.0, pre_norm=pre_norm)
    layer = randomise_(layer).to(device)
    assert_matches(layer, sequential(layer.gate, "gate."), draw(5, 8, device=device))


@pytest.mark.parametrize("i", range(4))
def test_a_hook_inside_a_fused_sequence_runs(i, on_triton, device):
    """On the kernels too, where what has none is fused."""
    layer = randomise_(MLP(8, norm_mode="none")).to(device).eval()
    x, seen = draw(3, 8, device=device), []
    y = layer(x)
    layer.model[i].register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(layer(x), y)
    assert len(seen) == 1


def test_gating_without_dropout_holds_none():
    layer = GatingMechanism(8, bottleneck_dim=4, dropout=0.0)
    assert kinds(layer.gate) == [LINEAR, NORM, ACT, LINEAR, nn.Sigmoid]


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: MLP(8, norm_mode="none", dropout=0.5, **options),
        lambda **options: GatingMechanism(8, bottleneck_dim=4, use_norm=False, **options),
    ],
)
def test_a_dropout_between_them_does_not_forbid_recomputing(make):
    """In eval the linears around it are one call."""
    layer, plain = randomise_(make(recompute=True)).eval(), randomise_(make()).eval()
    assert "recompute=True" in repr(layer)
    torch.testing.assert_close(layer(draw(3, 8)), plain(draw(3, 8)))


def test_gating_initial_values():
    torch.manual_seed(0)
    layer = GatingMechanism(64, bottleneck_factor=0.5).eval()
    assert layer.gate[1].weight.eq(1).all()
    for linear in (layer.gate[0], layer.gate[4]):
        bound = 0.1 * (6 / 96) ** 0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert linear.bias.eq(1).all()
    gate = layer(draw(50, 64))
    assert ((gate > 0.6) & (gate < 0.85)).all()


@pytest.mark.parametrize("arguments", ({}, {"bottleneck_factor": 0.5, "bottleneck_dim": 4}))
def test_gating_takes_one_bottleneck_argument(arguments):
    with pytest.raises(AssertionError, match="exactly one of bottleneck_factor and bottleneck_dim"):
        GatingMechanism(8, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bottleneck_dim": 0}, "GatingMechanism: bottleneck_dim must be at least 1, got 0"),
        ({"bottleneck_factor": 0.1}, "GatingMechanism: bottleneck_factor must .* got 0.1 \\* 8"),
        ({"bottleneck_dim": 4, "dropout": 2}, r"GatingMechanism: dropout must be in \[0.0,1.0\)"),
        ({"bottleneck_dim": 4, "input_dim": 0}, "GatingMechanism: input_dim must be at least 1"),
    ],
)
def test_gating_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GatingMechanism(**{"input_dim": 8, **arguments})


class WithLoss(nn.Module):
    """Returns an output and an auxiliary loss."""

    has_aux_loss = True

    def forward(self, x, factor=1.0):
        return factor * x, x.sum()


def test_residual():
    x = draw(3, 4)
    layer = randomise_(FeedForward(4))
    torch.testing.assert_close(ResidualWrapper(layer)(x=x), x + layer(x))
    assert not ResidualWrapper(layer).has_aux_loss
    wrapped = ResidualWrapper(WithLoss())
    y, loss = wrapped(x, factor=3.0)
    torch.testing.assert_close(y, 4 * x)
    assert torch.equal(loss, x.sum()) and wrapped.has_aux_loss
    assert torch.compile(wrapped, backend="eager").has_aux_loss
    with pytest.raises(
        ValueError, match=r"ResidualWrapper: module must keep .* got \(3, 3\) from Lin"
    ):
        ResidualWrapper(nn.Linear(4, 3))(x)
    with pytest.raises(TypeError, match="ResidualWrapper: module must be an nn.Module, got 'x'"):
        ResidualWrapper("x")


MAKERS = {
    "mlp": functools.partial(MLP, 64, hidden_factor=2),
    "mlp-pre": functools.partial(MLP, 64, pre_norm=True, act_fn=nn.PReLU, residual=True),
    "gating": functools.partial(GatingMechanism, 64, bottleneck_factor=0.5),
    "residual": lambda: ResidualWrapper(nn.Sequential(nn.LayerNorm(64), MLP(64, hidden_factor=1))),
}


@pytest.mark.parametrize("name", MAKERS)
def test_round_trips(name):
    assert_round_trips(randomise_(MAKERS[name]()), MAKERS[name](), draw(5, 64))


@pytest.mark.parametrize("name", MAKERS)
def test_initialises_from_meta(name):
    assert_initialises_from_meta(MAKERS[name])


@pytest.mark.parametrize("name", MAKERS)
def test_leading_dims_keyword_and_autocast(name):
    layer = MAKERS[name]().eval()
    x = draw(2, 3, 4, 64)
    torch.testing.assert_close(layer(x=x.view(-1, 64)).view(x.shape), layer(x))
    assert layer(x[:0]).shape == (0, 3, 4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_is_cheap():
    plain = MLP(64, norm_mode="none", hidden_factor=2).eval()
    assert_cheap(plain, functools.partial(nn.Sequential.forward, plain.model))
    gate = GatingMechanism(64, bottleneck_factor=0.5).eval()
    assert_cheap(gate, functools.partial(nn.Sequential.forward, gate.gate))


def test_documented_examples():
    from fusedmlp.layers.gating import GatingMechanism
    from fusedmlp.layers.mlp import MLP

    mlp = MLP(
        input_dim=256,
        output_dim=256,
    )
    gate = GatingMechanism(
        input_dim=256,
        bottleneck_factor=0.5,
    )
    x = draw(2, 256)
    assert mlp(x).shape == gate(x).shape == x.shape
