"""A layer's input of another kind, width or dtype: one clear error, naming the layer."""

import re

import pytest
import torch
from layer_checks import Stranger

from fusedmlp.check.layer import check_x
from fusedmlp.layers import (
    BinaryLinear,
    FastFeedForward,
    PathWeightedFFF,
    SwiMGLU,
    SwitchFFN,
    Top1MoE,
    TopKMoE,
)
from fusedmlp.layers.glu import GLUBase

BAD = [
    ([1.0], TypeError, "Layer: x must be a tensor, got list"),
    (torch.ones(2, 7), ValueError, "Layer: x must have last dimension 8, got shape (2, 7)"),
    (torch.ones(()), ValueError, "Layer: x must have last dimension 8, got shape ()"),
    (torch.ones(2, 8).half(), TypeError, "Layer: x must be torch.float32, got torch.float16"),
    (torch.ones(2, 8).int(), TypeError, "Layer: x must be torch.float32, got torch.int32"),
]


@pytest.mark.parametrize("x, error, message", BAD, ids=[message[9:] for *_, message in BAD])
def test_check_x(x, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check_x("Layer", x, 8, torch.float32)


def test_check_x_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        check_x("Layer", torch.ones(2, 8).half(), 8, torch.float32)
        with pytest.raises(TypeError, match="^Layer: x must be floating, got torch.int32$"):
            check_x("Layer", torch.ones(2, 8).int(), 8, torch.float32)


LAYERS = {
    "BinaryLinear": lambda: BinaryLinear(8, 4, pad=True),
    "FastFeedForward": lambda: FastFeedForward(8, 1),
    "GLUBase": lambda: GLUBase(8, 4, Stranger()),
    "PathWeightedFFF": lambda: PathWeightedFFF(8, 1, 8),
    "SwiMGLU": lambda: SwiMGLU(8, 4),
    "SwitchFFN": lambda: SwitchFFN(8, 2),
    "Top1MoE": lambda: Top1MoE(8, 8, 2),
    "TopKMoE": lambda: TopKMoE(8, 8, 2, 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_check_their_input(name):
    layer = LAYERS[name]()
    with pytest.raises(TypeError, match=f"^{name}: x must be torch.float32, got torch.float16$"):
        layer(torch.ones(2, 8).half())
    with pytest.raises(ValueError, match=rf"^{name}: x must .*8.*got .*\(2, 7\)$"):
        layer(torch.ones(2, 7))
    with pytest.raises(TypeError, match=f"^{name}: x must be a tensor, got NoneType$"):
        layer(None)
