"""FeedForward against its equations in plain PyTorch; its structure, counts and messages."""

import functools
import pickle
import re
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
    stranger,
)
from torch import nn

import fusedmlp
from fusedmlp.layers import (
    GLU,
    Bilinear,
    FastFeedForward,
    FeedForward,
    GeGLU,
    ReGLU,
    SwiGLU,
    SwitchFFN,
)
from fusedmlp.layers.per_expert import per_expert_state_dict

GATES = {
    "glu": (GLU, torch.sigmoid),
    "geglu": (GeGLU, F.gelu),
    "swiglu": (SwiGLU, F.silu),
    "reglu": (ReGLU, F.relu),
    "bilinear": (Bilinear, lambda g: g),
}
ACTS = {
    nn.GELU: F.gelu,
    nn.SiLU: F.silu,
    nn.Sigmoid: torch.sigmoid,
    nn.Tanh: torch.tanh,
    nn.Identity: lambda z: z,
    Stranger: stranger,
}
VARIANTS = ("none", *GATES)


def gated(act, drop=lambda h: h):
    def compute(p, x):
        value, gate = F.linear(x, p["net.0.proj.weight"], p["net.0.proj.bias"]).chunk(2, -1)
        return F.linear(drop(value * act(gate)), p["net.2.weight"], p["net.2.bias"])

    return compute


def plain(act, drop=lambda h: h):
    def compute(p, x):
        h = act(F.linear(x, p["net.0.weight"], p["net.0.bias"]))
        return F.linear(drop(h), p["net.3.weight"], p["net.3.bias"])

    return compute


# In 16 bits a relu's pre-activation may round across 0, where no gradient is the right one.
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(v, d) for v in GATES for d in DTYPES if v != "reglu" or d is torch.float32],
)
def test_gated_matches_formula(variant, dtype):
    layer = randomise_(FeedForward(16, mult=1.5, glu_variant=variant)).to(dtype)
    assert_matches(layer, gated(GATES[variant][1]), draw(2, 7, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTS)
def test_plain_matches_formula(activation, dtype):
    layer = randomise_(FeedForward(16, mult=1.5, activation=activation)).to(dtype)
    assert_matches(layer, plain(ACTS[activation]), draw(2, 7, 16, dtype=dtype))


def test_activation_may_be_any_callable_without_arguments():
    tanh = functools.partial(nn.GELU, approximate="tanh")
    layer = randomise_(FeedForward(16, activation=tanh))
    assert_matches(layer, plain(lambda z: F.gelu(z, approximate="tanh")), draw(5, 16))
    layer = FeedForward(16, activation=nn.PReLU)
    assert_matches(
        layer, lambda p, x: plain(lambda z: F.prelu(z, p["net.1.weight"]))(p, x), draw(5, 16)
    )


@pytest.mark.parametrize("variant", ("none", "swiglu", "reglu"))
def test_runs_on_each_backend(variant, each_backend, device):
    layer = randomise_(FeedForward(16, mult=2, glu_variant=variant)).to(device)
    formula = plain(F.gelu) if variant == "none" else gated(GATES[variant][1])
    assert_matches(layer, formula, draw(5, 16, device=device))


@pytest.mark.parametrize("variant", ("none", "swiglu"))
def test_active_dropout_runs_on_each_backend(variant, each_backend, device):
    """One mask for layer and formula: the same draw from the same seed."""
    layer = randomise_(FeedForward(16, mult=2, dropout=0.5, glu_variant=variant)).to(device)
    x = draw(5, 16, device=device)
    mask = F.dropout(torch.ones(5, 32, device=device), 0.5)
    assert 0 < (mask == 0).float().mean() < 1
    layer.net[-2].forward = lambda h: h * mask
    drop = lambda h: h * mask.to(h.dtype)  # noqa: E731
    assert_matches(layer, plain(F.gelu, drop) if variant == "none" else gated(F.silu, drop), x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_in_training_only(variant):
    layer = FeedForward(16, dropout=0.5, glu_variant=variant)
    x = draw(5, 16)
    torch.manual_seed(2)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(2)
    assert torch.equal(layer(x), first)
    assert torch.equal(first, _with_seed(2, lambda: layer.net(x)))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.net(x))


def _with_seed(seed, fn):
    torch.manual_seed(seed)
    return fn()


@pytest.mark.parametrize(
    ("variant", "whole", "half"),
    [
        ("swiglu", "GatedMLPFunction", "GatedLinearFunction"),
        ("none", "MLPFunction", "LinearActFunction"),
    ],
)
def test_one_function_unless_dropout_acts(variant, whole, half, device):
    layer = FeedForward(16, mult=1, dropout=0.5, glu_variant=variant).to(device)
    x = draw(3, 16, device=device)
    with fusedmlp.backend("triton"):
        training, evaluating = _graph(layer.train()(x)), _graph(layer.eval()(x))
        layer.net[-2].p = 0.0
        without = _graph(layer.train()(x))
    assert half in training and whole not in training
    assert whole in evaluating and half not in evaluating
    assert whole in without


def _graph(y):
    """Names of the autograd nodes behind y, in one string."""
    names, queue = "", [y.grad_fn]
    while queue:
        node = queue.pop()
        names += node.name() + " "
        queue += [parent for parent, _ in node.next_functions if parent is not None]
    return names


@pytest.mark.parametrize(
    ("variant", "count"),
    [("none", 33_088), *((variant, 49_728) for variant in GATES)],
)
def test_parameter_counts(variant, count):
    assert sum(p.numel() for p in FeedForward(64, glu_variant=variant).parameters()) == count
    normed = FeedForward(64, glu_variant=variant, pre_norm=True)
    assert sum(p.numel() for p in normed.parameters()) == count + 64


def test_defaults_and_structure():
    layer = FeedForward(8)
    assert layer.glu_variant == "none"
    assert layer.pre_norm is None
    assert [type(m) for m in layer.net] == [nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
    assert layer.net[2].p == 0.0
    assert layer.net[0].weight.shape == (32, 8)
    assert layer.proj is layer.net[0]
    assert list(layer.state_dict()) == [
        "net.0.weight",
        "net.0.bias",
        "net.3.weight",
        "net.3.bias",
    ]


@pytest.mark.parametrize("variant", GATES)
def test_gated_structure(variant):
    layer = FeedForward(8, mult=2.6, dropout=0.25, glu_variant=variant.upper())
    assert layer.glu_variant == variant
    assert [type(m) for m in layer.net] == [GATES[variant][0], nn.Dropout, nn.Linear]
    assert layer.net[1].p == 0.25
    assert layer.proj is layer.net[0].proj
    assert layer.proj.weight.shape == (40, 8)
    assert list(layer.state_dict()) == [
        "net.0.proj.weight",
        "net.0.proj.bias",
        "net.2.weight",
        "net.2.bias",
    ]


def of_mlp_utils(layer):
    """The layer's state as mlp_utils writes it: each first projection a second time, as `proj`."""
    state = per_expert_state_dict(layer)
    for name in list(state):
        before, found, leaf = name.rpartition("net.0.")
        if found and "mask" not in leaf:
            state[f"{before}proj.{leaf.removeprefix('proj.')}"] = state[name]
    return state


@pytest.mark.parametrize(
    "make",
    [
        lambda: FeedForward(8, 2),
        lambda: FeedForward(8, 2, glu_variant="swiglu", pre_norm=True),
        lambda: FeedForward(8, 2, glu_variant="mswiglu"),
        lambda: SwitchFFN(8, 2, ff_kwargs={"glu_variant": "geglu"}),
        lambda: SwitchFFN(8, 2, ff_kwargs={"mult": 1}),
        lambda: FastFeedForward(8, 1, glu_variant="mglu", has_master_leaf=True),
    ],
    ids=("plain", "gated", "masked", "switch", "switch plain", "tree"),
)
def test_checkpoints_of_mlp_utils_load(make):
    layer, fresh = make(), pickle.loads(pickle.dumps(make()))
    state = of_mlp_utils(layer)
    kept = dict(state)
    aliases = sorted(set(state) - set(per_expert_state_dict(layer)))
    assert aliases
    fresh.load_state_dict(state)
    assert state == kept, "the caller's dict is left alone"
    for name, value in layer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name

    for alias in aliases:
        different = {**state, alias: state[alias] + 1}
        with pytest.raises(RuntimeError, match=rf"Unexpected key.*{re.escape(alias)}"):
            make().load_state_dict(different)


def test_checkpoints_of_mlp_utils_load_on_meta():
    with torch.device("meta"):
        layer, state = FeedForward(8), of_mlp_utils(FeedForward(8))
    layer.load_state_dict(state, assign=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_init_is_kaiming_normal(variant):
    torch.manual_seed(0)
    layer = FeedForward(128, glu_variant=variant)
    for linear in (layer.proj, layer.net[-1]):
        std = (2 / linear.in_features) ** 0.5
        assert linear.weight.std().item() == pytest.approx(std, rel=0.05)
        assert linear.weight.abs().max() > 3 * std, "a uniform draw ends at 1.73 std"
        assert not linear.bias.any()


def test_norm_layers():
    x = draw(5, 16)
    layer = randomise_(FeedForward(16, glu_variant="swiglu", pre_norm=True))
    eps = torch.finfo(torch.float32).eps

    def rms(p, x):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * p["pre_norm.weight"]

    assert isinstance(layer.pre_norm, nn.RMSNorm)
    assert_matches(layer, lambda p, x: gated(F.silu)(p, rms(p, x)), x)

    layer = randomise_(FeedForward(16, pre_norm=True, norm_layer=nn.LayerNorm))

    def norm(p, x):
        return F.layer_norm(x, (16,), p["pre_norm.weight"], p["pre_norm.bias"])

    assert_matches(layer, lambda p, x: plain(F.gelu)(p, norm(p, x)), x)
    assert FeedForward(16, norm_layer=nn.LayerNorm).pre_norm is None


@pytest.mark.parametrize("name", ("foo", "Foo", "swiglu2", ""))
def test_unknown_variant(name):
    with pytest.raises(ValueError, match=f"FeedForward: Unknown GLU variant: {name.lower()};"):
        FeedForward(8, glu_variant=name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 0}, ValueError, "FeedForward: dim must be at least 1, got 0"),
        ({"dim": 8.0}, TypeError, "FeedForward: dim must be an int, got 8.0"),
        ({"mult": 0.1}, ValueError, r"FeedForward: mult must .* at least 1, got 0.1 \* 8"),
        ({"mult": float("nan")}, ValueError, "FeedForward: mult must be finite"),
        ({"mult": float("inf")}, ValueError, "FeedForward: mult must be finite"),
        ({"mult": "4"}, TypeError, "FeedForward: mult must be a number, got '4'"),
        ({"dropout": 1.5}, ValueError, r"FeedForward: dropout must be in \[0, 1\], got 1.5"),
        ({"glu_variant": None}, TypeError, "FeedForward: glu_variant must be a str, got None"),
        ({"activation": nn.GELU()}, TypeError, "FeedForward: activation must be .* a callable"),
        ({"activation": lambda: 3}, TypeError, "FeedForward: activation .* which made 3"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FeedForward(**{"dim": 8, **arguments})


def test_unused_activation_is_announced():
    with pytest.warns(UserWarning, match="FeedForward: activation .*SiLU.* is not used"):
        FeedForward(8, glu_variant="geglu", activation=nn.SiLU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeedForward(8, glu_variant="geglu", activation=nn.GELU)
        FeedForward(8, activation=nn.SiLU)


def test_replaced_projections_are_refused_and_reparametrised_ones_work():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x):
            return 2 * F.linear(x, self.weight, self.bias)

    layer = FeedForward(8, glu_variant="swiglu")
    nn.utils.parametrizations.weight_norm(layer.net[2])
    torch.testing.assert_close(layer(draw(3, 8)), layer.net(draw(3, 8)))
    layer.net[2] = Adapter(layer.net[2])
    with pytest.raises(
        TypeError,
        match="FeedForward: every projection must be .* got test_layers_feedforward.Adapter",
    ):
        layer(draw(3, 8))


def test_hooks_on_the_layer_run():
    layer = FeedForward(8)
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer(draw(3, 8))
    assert seen == [(3, 8)]


@pytest.mark.parametrize("variant", ("none", "swiglu"))
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_autocast(variant, dropout):
    layer = FeedForward(16, dropout=dropout, glu_variant=variant, pre_norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(draw(5, 16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_leading_dims_and_keyword():
    layer = FeedForward(16, glu_variant="geglu")
    x = draw(2, 3, 4, 16)
    y = layer(x=x)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x.view(-1, 16)).view(x.shape), y)
    assert layer(x[:0]).shape == (0, 3, 4, 16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips(variant):
    make = functools.partial(FeedForward, 8, glu_variant=variant, pre_norm=True, dropout=0.1)
    assert_round_trips(randomise_(make()), make(), draw(5, 8))


@pytest.mark.parametrize("variant", ("none", "swiglu"))
def test_initialises_from_meta(variant):
    assert_initialises_from_meta(
        lambda: FeedForward(
            64, glu_variant=variant, pre_norm=True, norm_layer=nn.LayerNorm, activation=nn.GELU
        )
    )
    assert_initialises_from_meta(lambda: FeedForward(64, activation=nn.PReLU))


def test_a_norm_that_cannot_be_initialised_says_so():
    class Scale(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(dim))

        def forward(self, x):
            return x * self.scale

    layer = FeedForward(8, pre_norm=True, norm_layer=Scale)
    assert layer(draw(3, 8)).shape == (3, 8)
    with pytest.raises(TypeError, match="FeedForward: Scale must have reset_parameters"):
        layer.init_weights_()


@pytest.mark.parametrize("variant", ("none", "swiglu"))
def test_is_cheap(variant):
    layer = FeedForward(64, mult=2, glu_variant=variant)

    def composed(x):
        value, gate = layer.proj(x).chunk(2, -1)
        return layer.net[-1](layer.net[-2](value * F.silu(gate)))

    assert_cheap(layer, layer.net if variant == "none" else composed)


def test_documented_example():
    from fusedmlp.layers.feedforward import FeedForward

    ffn = FeedForward(
        dim=256,
        mult=4,
        glu_variant="swiglu",
    )
    x = draw(2, 3, 256)
    torch.testing.assert_close(ffn(x), gated(F.silu)(dict(ffn.named_parameters()), x))


def test_an_alias_without_its_own_is_reported():
    layer = FeedForward(8)
    alias = {"proj.weight": torch.zeros_like(layer.net[0].weight)}
    wrong = layer.load_state_dict(dict(alias), strict=False)
    assert "proj.weight" in wrong.unexpected_keys and "net.0.weight" in wrong.missing_keys
