"""What every layer says of a bad x, net or argument: one error that names layer and argument."""

import re

import pytest
import torch
from layer_checks import draw
from torch import nn

from fusedmlp import layers
from fusedmlp.layers.gmlp import GMLPBlock, SpatialGatingUnit

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
    "FeedForward unknown": lambda: layers.FeedForward(D, activation=nn.Mish),
    "GLUBase": lambda: layers.glu.GLUBase(D, D, nn.Mish()),
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


def test_x_in_any_floating_dtype_under_autocast(named):
    _, layer = named
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert layer(draw(2, 4, D, dtype=dtype)).shape == (2, 4, D)


def test_a_replaced_linear_takes_what_it_takes():
    class Counting(nn.Linear):
        """As a quantised linear does: weights of a dtype that x does not have."""

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    layer = layers.MLP(D, output_norm=False, norm_mode="none", act_fn=nn.Mish)
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
