"""PointwiseMLP: both backends against its equations; widths, FLOPs, initial values, messages."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from layer_checks import (
    DTYPES,
    assert_cheap,
    assert_initialises_from_meta,
    assert_matches,
    assert_round_trips,
    draw,
    randomise_,
)
from torch import nn

from fusedmlp.layers.pointwise import MLP, PointwiseMLP

PLAIN = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
ACTIVATIONS = (*PLAIN, "glu", "swiglu")
BACKENDS = ("torch", "fused")


def formula(activation, glu_order="gate_first", drop=lambda h: h):
    def compute(p, x):
        z = F.linear(x, p["layer1.weight"], p.get("layer1.bias"))
        if activation in PLAIN:
            h = PLAIN[activation](z)
        else:
            a, b = z.chunk(2, -1)
            if activation == "swiglu":
                h = a / (1 + (-a).exp()) * b
            elif glu_order == "gate_first":
                h = torch.sigmoid(a) * b
            else:
                h = F.glu(z)
        return F.linear(drop(h), p["layer2.weight"], p.get("layer2.bias"))

    return compute


# In 16 bits a relu's pre-activation may round across 0, where no gradient is the right one.
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [(a, d) for a in ACTIVATIONS for d in DTYPES if a != "relu" or d is torch.float32],
)
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_formula(activation, backend, bias, dtype):
    layer = randomise_(PointwiseMLP(18, activation, bias=bias, backend=backend)).to(dtype)
    assert_matches(layer, formula(activation), draw(2, 3, 4, 18, dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_runs_on_each_backend(activation, each_backend, device):
    layer = randomise_(PointwiseMLP(12, activation, bias=True, backend="fused")).to(device)
    assert_matches(layer, formula(activation), draw(5, 12, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ("gate_first", "torch"))
def test_glu_order(order, backend):
    layer = randomise_(PointwiseMLP(12, "glu", backend=backend, glu_order=order))
    x = draw(5, 12)
    assert_matches(layer, formula("glu", order), x)
    other = {"gate_first": "torch", "torch": "gate_first"}[order]
    with pytest.raises(AssertionError, match="out: max error"):
        assert_matches(layer, formula("glu", other), x)


@pytest.mark.parametrize("activation", ("glu", "swiglu"))
def test_gate_is_the_first_half(activation):
    """By hand: the first half of layer1 gives 2, the second 3."""
    layer = PointwiseMLP(1, activation, expansion_factor=1, bias=True)
    with torch.no_grad():
        layer.layer1.weight.zero_()
        layer.layer1.bias.copy_(torch.tensor([2.0, 3.0]))
        layer.layer2.weight.fill_(1)
    sigmoid = 1 / (1 + math.exp(-2))
    expected = 3 * sigmoid * (2 if activation == "swiglu" else 1)
    assert layer(torch.zeros(1, 1)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", (0.0, 0.5))
def test_fused_agrees_with_torch_under_dropout(activation, p):
    """Same weights, same random state: same mask, output and gradients, in either mode."""
    layers = [
        randomise_(PointwiseMLP(16, activation, nn.Dropout(p), bias=True, backend=backend))
        for backend in BACKENDS
    ]
    x = draw(3, 5, 16)
    for training in (True, False):
        results = []
        for layer in layers:
            torch.manual_seed(4)
            leaf = x.clone().requires_grad_()
            y = layer.train(training)(leaf)
            grads = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
            results.append((y, *grads))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    if p:
        drop = lambda h: F.dropout(h, p)  # noqa: E731
        for layer in layers:
            torch.manual_seed(4)
            y = layer.train()(x)
            torch.manual_seed(4)
            expected = formula(activation, drop=drop)(dict(layer.named_parameters()), x)
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("dim", "factor", "activation", "tokens", "flops"),
    [
        (64, 1.0, "glu", 128, 3_162_112),
        (64, 2.0, "gelu", 128, 4_210_688),
        (384, 1.0, "glu", 1024, 906_756_096),
        (768, 8 / 3, "swiglu", 2048, 19_335_741_440),
        (65, 4 / 3, "swiglu", 10, 337_120),
    ],
)
def test_flop_count(dim, factor, activation, tokens, flops):
    for bias in (False, True):
        layer = PointwiseMLP(dim, activation, nn.Dropout, factor, bias)
        assert layer.flop_count(tokens) == flops
        assert layer.flop_count(num_tokens=0) == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", (False, True))
def test_structure(activation, bias):
    layer = PointwiseMLP(dim=65, activation=activation, expansion_factor=4 / 3, bias=bias)
    wide = 2 if activation in ("glu", "swiglu") else 1
    assert layer.hidden_dim == 86
    assert layer.activation == activation
    assert layer.is_glu_variant is (wide == 2)
    assert layer.backend == "torch"
    assert layer.layer1.weight.shape == (86 * wide, 65)
    assert layer.layer2.weight.shape == (65, 86)
    keys = ["layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias"]
    assert list(layer.state_dict()) == (keys if bias else keys[::2])
    weights = layer.layer1.weight.numel() + layer.layer2.weight.numel()
    assert weights == (wide + 1) * 65 * 86
    assert f"activation={activation!r}, backend='torch'" in repr(layer)


def test_default_width_and_alias():
    assert MLP is PointwiseMLP
    assert PointwiseMLP(10, "gelu").hidden_dim == 20


def test_init_methods_are_curried_and_biases_zero():
    calls = []

    def constant(value):
        def outer(features):
            calls.append((value, features))
            return lambda weight: nn.init.constant_(weight, value)

        return outer

    layer = PointwiseMLP(
        8, "swiglu", bias=True, init_method_in=constant(1.0), init_method_out=constant(2.0)
    )
    assert calls == [(1.0, 32), (2.0, 8)]
    assert (layer.layer1.weight == 1).all()
    assert (layer.layer2.weight == 2).all()
    assert not layer.layer1.bias.any()
    assert not layer.layer2.bias.any()


def test_default_init_is_nn_linears_with_zero_bias():
    torch.manual_seed(1)
    layer = PointwiseMLP(8, "gelu", bias=True)
    torch.manual_seed(1)
    first, second = nn.Linear(8, 16), nn.Linear(16, 8)
    assert torch.equal(layer.layer1.weight, first.weight)
    assert torch.equal(layer.layer2.weight, second.weight)
    assert not layer.layer1.bias.any()
    assert not layer.layer2.bias.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"activation": "stranger"},
            ValueError,
            "activation must be one of relu, gelu, silu, glu, ",
        ),
        ({"activation": "GELU"}, ValueError, "swiglu, got 'GELU'"),
        (
            {"backend": "quack"},
            ValueError,
            "got 'quack'; use backend=\"fused\", which is what quack",
        ),
        ({"backend": "cuda"}, ValueError, 'backend must be "torch" or "fused", got \'cuda\''),
        (
            {"glu_order": "second"},
            ValueError,
            'glu_order must be "gate_first" or "torch", got \'se',
        ),
        ({"glu_order": "torch"}, ValueError, 'glu_order must be "gate_first" unless activation is'),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": "64"}, TypeError, "dim must be an int, got '64'"),
        ({"expansion_factor": 0.1}, ValueError, "expansion_factor must .* got 0.1 \\* 8"),
        ({"expansion_factor": None}, TypeError, "expansion_factor must be a number, got None"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        PointwiseMLP(**{"dim": 8, "activation": "gelu", **arguments})
    assert str(caught.value).startswith("PointwiseMLP: ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_spatial_axes(backend):
    layer = PointwiseMLP(8, "swiglu", None, backend=backend)
    x = draw(2, 3, 4, 5, 8)
    y = layer(x=x)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x[1, 2]), y[1, 2])
    images = draw(2, 8, 4, 5).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(images), layer(images.contiguous()))
    with pytest.raises(ValueError, match="PointwiseMLP: x must have last dimension 8, got shape"):
        layer(draw(2, 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    layer = PointwiseMLP(16, "glu", nn.Dropout(0.5), bias=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(draw(5, 16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trips(backend):
    make = lambda: PointwiseMLP(8, "glu", nn.Dropout(0.5), backend=backend)  # noqa: E731
    assert_round_trips(make(), make(), draw(5, 8))


def test_initialisers_survive_a_copy_and_stay_behind_in_a_pickle():
    ones = lambda features: nn.init.ones_  # noqa: E731
    layer = PointwiseMLP(8, "gelu", init_method_in=ones)
    twin = copy.deepcopy(randomise_(layer))
    twin.init_weights_()
    assert (twin.layer1.weight == 1).all()
    loaded = pickle.loads(pickle.dumps(layer))
    assert torch.equal(loaded.layer1.weight, layer.layer1.weight)
    with pytest.raises(RuntimeError, match="PointwiseMLP: init_method_in .* was pickled"):
        loaded.init_weights_()


def test_initialises_from_meta():
    assert_initialises_from_meta(lambda: PointwiseMLP(64, "swiglu", bias=True))
    small = lambda features: lambda w: nn.init.normal_(w, std=features**-0.5 / 10)  # noqa: E731
    assert_initialises_from_meta(
        lambda: PointwiseMLP(64, "gelu", init_method_in=small, init_method_out=small)
    )
    assert_initialises_from_meta(lambda: PointwiseMLP(64, "gelu", nn.PReLU))


@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
def test_fused_is_cheap(activation):
    layer = PointwiseMLP(64, activation, backend="fused")
    plain = PointwiseMLP(64, activation, backend="torch")
    plain.load_state_dict(layer.state_dict())
    assert_cheap(layer, plain)


def test_documented_call():
    """The constructor as documented, positional up to dropout_cfg, other arguments by name."""
    mlp = MLP(
        64,
        "swiglu",
        {"__target__": "torch.nn.Identity"},
        expansion_factor=4 / 3,
        bias=False,
        backend="torch",
        init_method_in=None,
        init_method_out=None,
    )
    x = draw(2, 5, 6, 64)
    a, b = mlp.layer1(x).chunk(2, -1)
    torch.testing.assert_close(mlp(x), mlp.layer2(F.silu(a) * b))
    assert sum(p.numel() for p in mlp.parameters()) == 3 * 64 * 85
