"""The GLU classes against v * act(g) in plain PyTorch, and the names of activation modules."""

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
from fusedmlp.layers import GLU, Bilinear, GeGLU, ReGLU, SwiGLU
from fusedmlp.layers.glu import GLUBase
from fusedmlp.layers.parts.activation import name_of
from fusedmlp.reference.activations import ACTIVATIONS, MODULES

ACTS = {
    GLU: (nn.Sigmoid, torch.sigmoid),
    Bilinear: (nn.Identity, lambda g: g),
    ReGLU: (nn.ReLU, lambda g: g.clamp(min=0)),
    SwiGLU: (nn.SiLU, lambda g: g * torch.sigmoid(g)),
    GeGLU: (nn.GELU, lambda g: g * 0.5 * (1 + torch.erf(g / 2**0.5))),
}
# In 16 bits a relu's pre-activation may round across 0, where no gradient is the right one.
SMOOTH = [cls for cls in ACTS if cls is not ReGLU]


def formula(act, swap=False):
    def compute(p, x):
        value, gate = (x @ p["proj.weight"].T + p.get("proj.bias", 0)).chunk(2, -1)
        if swap:
            value, gate = gate, value
        return value * act(gate)

    return compute


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    ("cls", "dtype"),
    [(cls, d) for cls in SMOOTH for d in DTYPES] + [(ReGLU, torch.float32)],
)
def test_matches_formula(cls, dtype, bias):
    layer = randomise_(cls(24, 10, bias=bias)).to(dtype)
    assert_matches(layer, formula(ACTS[cls][1]), draw(3, 5, 24, dtype=dtype))


@pytest.mark.parametrize("cls", ACTS)
def test_runs_on_each_backend(cls, each_backend, device):
    layer = randomise_(cls(16, 8)).to(device)
    assert_matches(layer, formula(ACTS[cls][1]), draw(5, 16, device=device))


def test_comparison_tells_the_halves_apart():
    layer = randomise_(SwiGLU(24, 10))
    with pytest.raises(AssertionError, match="out: max error"):
        assert_matches(layer, formula(ACTS[SwiGLU][1], swap=True), draw(15, 24))


@pytest.mark.parametrize("cls", ACTS)
def test_parameters_and_activation(cls):
    layer = cls(dim_in=6, dim_out=4)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"proj.weight": (8, 6), "proj.bias": (8,)}
    assert list(cls(6, 4, bias=False).state_dict()) == ["proj.weight"]
    assert type(layer.activation) is ACTS[cls][0]


def test_standalone_init_is_nn_linears():
    torch.manual_seed(1)
    layer = SwiGLU(64, 32)
    torch.manual_seed(1)
    linear = nn.Linear(64, 64)
    assert torch.equal(layer.proj.weight, linear.weight)
    assert torch.equal(layer.proj.bias, linear.bias)


def test_leading_dims_keyword_and_strides():
    layer = randomise_(GeGLU(12, 6))
    x = draw(2, 3, 4, 12)
    y = layer(x=x)
    assert y.shape == (2, 3, 4, 6)
    torch.testing.assert_close(layer(x[0, 1]), y[0, 1])
    torch.testing.assert_close(layer(x[0, 1, 2]), y[0, 1, 2])
    assert_matches(layer, formula(ACTS[GeGLU][1]), draw(4, 12, 5).transpose(1, 2))
    assert layer(x[:0]).shape == (0, 3, 4, 6)


def test_eval_equals_training():
    layer = SwiGLU(12, 6)
    x = draw(5, 12)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_other_activations_run_in_pytorch():
    layer = randomise_(GLUBase(12, 6, Stranger()))
    assert_matches(layer, formula(stranger), draw(5, 12))
    swapped = randomise_(SwiGLU(12, 6))
    swapped.activation = nn.Tanh()
    assert_matches(swapped, formula(torch.tanh), draw(5, 12))


def test_autocast_gives_its_dtype_and_the_parameters_their_own():
    layer = SwiGLU(12, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(draw(5, 12))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((0, 4), ValueError, r"SwiGLU: dim_in must be at least 1, got 0"),
        ((4, -1), ValueError, r"SwiGLU: dim_out must be at least 1, got -1"),
        ((4.0, 4), TypeError, r"SwiGLU: dim_in must be an int, got 4\.0"),
        ((4, True), TypeError, r"SwiGLU: dim_out must be an int, got True"),
    ],
)
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        SwiGLU(*args)


def test_bad_calls():
    with pytest.raises(TypeError, match="GLUBase: activation must be an nn.Module or an .* got 3"):
        GLUBase(4, 4, 3)
    layer = SwiGLU(12, 6)
    layer.proj = nn.Bilinear(12, 12, 12)
    with pytest.raises(TypeError, match=r"SwiGLU: every projection must be an nn.Linear.*Bilinear"):
        layer(draw(5, 12))


def test_round_trips():
    assert_round_trips(SwiGLU(12, 6), SwiGLU(12, 6), draw(5, 12))


def test_initialises_from_meta():
    assert_initialises_from_meta(lambda: SwiGLU(64, 64))
    assert_initialises_from_meta(lambda: GLUBase(64, 64, nn.PReLU()))


def test_is_cheap():
    layer = SwiGLU(64, 64)

    def plain(x):
        value, gate = layer.proj(x).chunk(2, -1)
        return value * F.silu(gate)

    assert_cheap(layer, plain)


def test_documented_example():
    from fusedmlp.layers.glu import SwiGLU

    swiglu = SwiGLU(
        dim_in=256,
        dim_out=512,
        bias=True,
    )
    assert swiglu(draw(2, 256)).shape == (2, 512)
    assert sum(p.numel() for p in swiglu.parameters()) == 256 * 1024 + 1024


@pytest.mark.parametrize(
    "name, module",
    [(n, kind(**ACTIVATIONS[n].settings)) for kind, names in MODULES.items() for n in names],
    ids=str,
)
def test_a_row_computes_its_modules(name, module):
    assert name_of(module) == name
    x = draw(50, 3)
    torch.testing.assert_close(ACTIVATIONS[name].reference(x), module(x))


def test_activation_names_of_defaults_and_strangers():
    assert name_of(nn.GELU()) == "gelu"
    assert name_of(nn.GELU("tanh")) == "gelu_tanh"
    assert name_of(nn.SiLU(inplace=True)) == "silu"
    assert name_of(fusedmlp.ReluSquared(signed=True)) == "relu_sq"
    for base in (nn.SiLU, fusedmlp.Gelu2):

        class Scaled(base):
            def forward(self, x):
                return 2 * super().forward(x)

        assert name_of(Scaled()) is None
    assert name_of(Stranger()) is None


def test_layers_are_reachable_from_the_package():
    import fusedmlp.layers

    for name in fusedmlp.layers.__all__:
        assert issubclass(getattr(fusedmlp.layers, name), nn.Module)
