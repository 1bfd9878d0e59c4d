"""What every layer says of a bad x, net or argument: one error that names layer and argument."""

import inspect
import re

import pytest
import torch
from layer_checks import Stranger, draw
from torch import nn

import fusedmlp
from fusedmlp import layers
from fusedmlp.layers.glu import GLUBase
from fusedmlp.layers.gmlp import GMLPBlock, SpatialGatingUnit
from fusedmlp.layers.init_weights import (
    apply_initialization,
    create_initializer,
    initialize_weights,
)
from fusedmlp.layers.ngpt import NormLinear, Scale

D = 8
# Layers that pass x to a module of PyTorch's first; (2, 4, 8) is right for all of them.
DIRECT = {
    "MLP": lambda: layers.MLP(D),
    "MLP pre": lambda: layers.MLP(D, pre_norm=True),
    "MLP plain": lambda: layers.MLP(D, use_norm=False),
    "MLP residual": lambda: layers.MLP(D, residual=True),
    "GatingMechanism": lambda: layers.GatingMechanism(D, bottleneck_dim=4),
    "GatingMechanism pre": lambda: layers.GatingMechanism(D, bottleneck_dim=4, pre_norm=True),
    "PointwiseMLP": lambda: layers.PointwiseMLP(D, "swiglu"),
    "PointwiseMLP fused": lambda: layers.PointwiseMLP(D, "gelu", backend="fused"),
    "FeedForward": lambda: layers.FeedForward(D, pre_norm=True),
    "FeedForward fused": lambda: layers.FeedForward(D),
    "FeedForward gated": lambda: layers.FeedForward(D, glu_variant="swiglu"),
    "FeedForward masked": lambda: layers.FeedForward(D, glu_variant="mglu", mask_mode="element"),
    "FeedForward unknown": lambda: layers.FeedForward(D, activation=Stranger),
    "GLUBase": lambda: layers.glu.GLUBase(D, D, Stranger()),
    "SwiGLU": lambda: layers.SwiGLU(D, D),
    "SwiMGLU": lambda: layers.SwiMGLU(D, D),
    "SwiMGLU masks": lambda: layers.SwiMGLU(D, D, mask_mode="element"),
    "NGPT": lambda: layers.NGPT(D),
    "BinaryLinear": lambda: layers.BinaryLinear(D, D, pad=True),
    "GMLP": lambda: layers.GMLP(D, D, 4, 1),
    "GMLPBlock": lambda: GMLPBlock(D, D, 4),
    "SpatialGatingUnit": lambda: SpatialGatingUnit(D, 4),
}


@pytest.fixture(params=DIRECT)
def named(request):
    return request.param.split()[0], DIRECT[request.param]()


def test_x_of_another_width_dtype_or_type(named):
    owner, layer = named
    sequence = owner in ("GMLP", "GMLPBlock", "SpatialGatingUnit")
    width = "x must be (" if sequence else f"x must have last dimension {D}, got shape (2, 4, 7)"
    for x, error, message in (
        (draw(2, 4, D - 1), ValueError, width),
        (draw(2, 4, D).half(), TypeError, "x must be torch.float32, got torch.float16"),
        (torch.ones(2, 4, D, dtype=torch.int64), TypeError, "x must be torch.float32, got torch."),
        ([1.0, 2.0], TypeError, "x must be a tensor, got list"),
    ):
        with pytest.raises(error, match=f"^{owner}: {re.escape(message)}"):
            layer(x)


def test_hooks_change_no_error(named):
    for module in named[1].modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda *_: None)
    test_x_of_another_width_dtype_or_type(named)


@pytest.mark.parametrize("name", ("SwiGLUMLP", "ReluSquaredMLP", "GELUMLP", "SiLUMLP"))
def test_a_layer_whose_modules_are_called_names_itself(name):
    """And not the op that it would call, which says what is wrong else."""
    layer = getattr(layers, name)(D)
    next(layer.children()).register_forward_hook(lambda *_: None)
    test_x_of_another_width_dtype_or_type((name, layer))


def test_x_in_any_floating_dtype_under_autocast(named):
    _, layer = named
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert layer(draw(2, 4, D, dtype=dtype)).shape == (2, 4, D)
        with pytest.raises(TypeError, match="x must be floating, got torch.int64"):
            layer(torch.ones(2, 4, D, dtype=torch.int64))


def test_a_replaced_linear_takes_what_it_takes():
    class Counting(nn.Linear):
        """As a quantised linear does: weights of a dtype that x does not have."""

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    layer = layers.MLP(D, output_norm=False, norm_mode="none", act_fn=Stranger)
    layer.model[0] = Counting(D, 4 * D, dtype=torch.float64)
    assert layer(draw(2, D)).dtype == torch.float32


@pytest.mark.parametrize("layer", (SpatialGatingUnit(D, 4), GMLPBlock(D, 16, 4)))
def test_a_sequence_of_another_length(layer):
    owner = type(layer).__name__
    with pytest.raises(
        ValueError, match=rf"^{owner}: x must be \(\.\.\., 4, 8\): seq_len, dim; got"
    ):
        layer(draw(2, 5, D))
    assert layer(draw(3, 2, 4, D)).shape == (3, 2, 4, D)


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


# what the inner module returns, error, and what the message says of it
RESULTS = [
    (lambda x: x[..., :1], ValueError, "must keep x's shape (2, 4, 8), got (2, 4, 1) from Returning"),
    (lambda x: x[None], ValueError, "must keep x's shape (2, 4, 8), got (1, 2, 4, 8) from Returning"),
    (lambda x: x.sum(), ValueError, "must keep x's shape (2, 4, 8), got () from Returning"),
    (lambda x: [x], TypeError, "got list from Returning"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, message", RESULTS)
@pytest.mark.parametrize("wrap", (lambda m: layers.NGPT(D, m), layers.ResidualWrapper))
def test_nothing_is_broadcast(wrap, make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        wrap(Returning(make))(draw(2, 4, D))


def test_residual_wrapper_adds_tensors_alone():
    for make in (lambda x: (), lambda x: ([x], x)):
        with pytest.raises(
            TypeError, match="ResidualWrapper: module must return a tensor, or a tu"
        ):
            layers.ResidualWrapper(Returning(make))(draw(2, D))
    with pytest.raises(ValueError, match=r"ResidualWrapper: module must keep .* got \(2, 1\)"):
        layers.ResidualWrapper(Returning(lambda x: (x[:, :1], x)))(draw(2, D))
    with pytest.raises(TypeError, match="^ResidualWrapper: x must be a tensor, got list"):
        layers.ResidualWrapper(nn.Identity())([1, 2])


def test_ngpt_takes_a_module_and_its_own_width():
    with pytest.raises(TypeError, match="^NGPT: feedforward_net must be an nn.Module or None, got"):
        layers.NGPT(D, "net")
    with pytest.raises(ValueError, match="^NGPT: x must have last dimension 8, got shape"):
        layers.NGPT(D, nn.Identity())(draw(2, 1))


# --- construction


NUMBER = "must be a number, got "
MAKES = "an activation's name or a callable that makes an nn.Module from no arguments, got "
NORM = "norm_layer must be a callable that makes an nn.Module from its width, got "
FN = "must be an elementwise module or function, got "
NAN = float("nan")
CONSTRUCTIONS = [
    (lambda: layers.MLP(D, dropout="a"), TypeError, f"MLP: dropout {NUMBER}'a'"),
    (lambda: layers.MLP(D, norm_layer=None), TypeError, f"MLP: {NORM}None"),
    (lambda: layers.MLP(D, norm_layer=nn.RMSNorm(D)), TypeError, f"MLP: {NORM}RMSNorm("),
    (lambda: layers.MLP(D, norm_layer=lambda width: None), TypeError, f"MLP: {NORM}"),
    (lambda: layers.MLP(D, act_fn=torch.relu), TypeError,
     f"MLP: act_fn must be an nn.Module, {MAKES}<built-in method relu"),
    (lambda: layers.GatingMechanism(D, bottleneck_dim=4, norm_layer=None), TypeError,
     f"GatingMechanism: {NORM}None"),
    (lambda: layers.GatingMechanism(D, bottleneck_dim=4, dropout=None), TypeError,
     f"GatingMechanism: dropout {NUMBER}None"),
    (lambda: layers.FeedForward(D, dropout="a"), TypeError, f"FeedForward: dropout {NUMBER}'a'"),
    (lambda: layers.FeedForward(D, activation=torch.relu), TypeError,
     f"FeedForward: activation must be {MAKES}<bu"),
    (lambda: layers.FeedForward(D, activation=nn.Softsign()), TypeError,
     f"FeedForward: activation must be {MAKES}Softsign(): give its class, Softsign, or lambda: Sof"),
    (lambda: layers.FeedForward(D, pre_norm=True, norm_layer=None), TypeError,
     f"FeedForward: {NORM}None"),
    (lambda: layers.GMLP(D, D, 4, 1, norm_layer=None), TypeError, f"GMLP: {NORM}None"),
    (lambda: layers.GMLP(D, D, 4, 1, drop_path="a"), TypeError, f"GMLP: drop_path {NUMBER}'a'"),
    (lambda: layers.GMLP(D, D, 4, 1, gate_activation=nn.Tanh()), TypeError,
     f"GMLP: gate_activation must be {MAKES}Tanh("),
    (lambda: SpatialGatingUnit(D, 4, None), TypeError, f"SpatialGatingUnit: {NORM}None"),
    (lambda: SpatialGatingUnit(D, 4, gate_activation=nn.Tanh), TypeError,
     "SpatialGatingUnit: gate_activation must be an nn.Module or None, got <class"),
    (lambda: layers.NGPT(D, norm_eps="a"), TypeError, f"L2Norm: norm_eps {NUMBER}'a'"),
    (lambda: layers.NGPT(D, alpha_m_init="a"), TypeError, f"Scale: init {NUMBER}'a'"),
    (lambda: layers.NGPT(D, alpha_m_scale=NAN), ValueError, "Scale: scale must be finite, got nan"),
    (lambda: fusedmlp.BSiLU("a"), TypeError, f"BSiLU: alpha {NUMBER}'a'"),
    (lambda: fusedmlp.NeLU(None), TypeError, f"NeLU: alpha {NUMBER}None"),
    (lambda: fusedmlp.ReluNelu(NAN), ValueError, "NeLU: alpha must be finite, got nan"),
    (lambda: fusedmlp.Sugar("relu", "nelu"), TypeError, f"Sugar: forward_fn {FN}'relu'"),
    (lambda: fusedmlp.Sugar(nn.ReLU(), nn.SiLU), TypeError, f"Sugar: backward_fn {FN}<class"),
    (lambda: fusedmlp.StraightThroughEstimator(torch.sign, None), TypeError,
     f"StraightThroughEstimator: backward_fn {FN}None"),
    (lambda: initialize_weights(3), TypeError,
     "initialize_weights: module must be an nn.Module, got int"),
    (lambda: initialize_weights(nn.Linear(2, 2).weight), TypeError,
     "initialize_weights: module must be an nn.Module, got Parameter"),
    (lambda: apply_initialization("model"), TypeError,
     "apply_initialization: model must be an nn.Module, got str"),
    (lambda: initialize_weights(nn.Linear(2, 2), scale=NAN), ValueError,
     "initialize_weights: scale must be finite, got nan"),
    (lambda: apply_initialization(nn.Linear(2, 2), scale="1"), TypeError,
     f"apply_initialization: scale {NUMBER}'1'"),
    (lambda: create_initializer("default", scale=-1), ValueError,
     "create_initializer: scale must not be negative, got -1"),
    (lambda: create_initializer("default", nonlinearity="foo"), ValueError,
     "create_initializer: nonlinearity must be a name of torch.nn.init.calculate_gain, got 'foo'"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, message", CONSTRUCTIONS)
def test_a_bad_argument_is_named_at_construction(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        make()


# What a layer asks for beside one width for all.
NEEDED = {
    "FastFeedForward": {"dim": D, "depth": 1, "has_master_leaf": True},
    "GMLP": {"dim": D, "dim_ff": D, "seq_len": 4, "depth": 1},
    "GatingMechanism": {"input_dim": D, "bottleneck_dim": 4},
    "MaskedGLU": {"dim_in": D, "dim_out": D, "activation": nn.Tanh()},
    "PointwiseMLP": {"dim": D, "activation": "gelu"},
    "BinaryLinear": {"in_features": 128, "out_features": D},
    "BinaryGatedMLP": {"dim": 128, "hidden": 128},
    "ResidualWrapper": {"module": nn.Identity()},
    "GLUBase": {"dim_in": D, "dim_out": D, "activation": nn.Tanh()},
}
# L2Norm takes a width as norms do, and needs none; a clip may be past all weights.
UNREAD, ENDLESS = (("L2Norm", "dim"),), ("clip",)


# Those that others are made of, and that may be made alone.
INNER = {kind.__name__: kind for kind in (GMLPBlock, SpatialGatingUnit, NormLinear, Scale, GLUBase)}


def kind_of(name):
    return INNER.get(name) or getattr(layers, name)


def numbers():
    """(layer, what it needs, each of its options that is a number)."""
    for name in (*layers.__all__, *INNER):
        options = inspect.signature(kind_of(name)).parameters
        needed = {
            n: D for n, option in options.items() if option.default is inspect.Parameter.empty
        }
        for option, parameter in options.items():
            kind = str(parameter.annotation)
            number = re.search(r"\b(int|float)\b", kind) and "Callable" not in kind
            if number and (name, option) not in UNREAD:
                yield name, NEEDED.get(name, needed), option


@pytest.mark.parametrize("name, needed, option", list(numbers()))
def test_what_is_no_number_is_refused(name, needed, option):
    """By the layer, or by the part of it that has the option."""
    make = kind_of(name)
    make(**needed)
    if option == "bottleneck_factor":  # which is in the place of another
        needed = {"input_dim": D}
    for bad in (NAN, float("inf"), True, "1", [1]):
        if bad == float("inf") and option in ENDLESS:
            continue
        with pytest.raises((TypeError, ValueError), match=r"^\w+: \w+.* must be .*"):
            make(**{**needed, option: bad})


def sizes():
    for name, needed, option in numbers():
        annotation = str(inspect.signature(kind_of(name)).parameters[option].annotation)
        # Trees have mlp_utils' words for a depth; groups and topk_group are asked for together.
        if "float" not in annotation and not re.search("group|depth", option):
            yield name, needed, option


@pytest.mark.parametrize("name, needed, option", list(sizes()))
def test_sizes_begin_at_1(name, needed, option):
    """By the layer, or by the part of it that has the option."""
    for size in (0, -3):
        with pytest.raises(ValueError, match=rf"^\w+: \w+ must be .* 1\b.*, got {size}"):
            kind_of(name)(**{**needed, option: size})
