"""MLPs of other libraries, by their own classes."""

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward as Diffusers
from torch import nn
from x_transformers.x_transformers import FeedForward as XTransformers

import fusedmlp

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
# block -> op and activation
BLOCKS = {
    **{
        f"diffusers {name}": (lambda name=name: Diffusers(32, activation_fn=name), op, activation)
        for name, op, activation in (
            ("gelu", "mlp", "gelu"),
            ("gelu-approximate", "mlp", "gelu_tanh"),
            ("geglu", "gated_mlp", "gelu"),
            ("geglu-approximate", "mlp", "quick_gelu"),
            ("swiglu", "gated_mlp", "silu"),
            ("linear-silu", "mlp", "silu"),
        )
    },
    **{
        f"x-transformers {' '.join(o)}": (lambda o=o: XTransformers(32, **o), op, activation)
        for o, op, activation in (
            ({}, "mlp", "gelu"),
            ({"glu": True}, "gated_mlp", "gelu"),
            ({"glu": True, "swish": True}, "gated_mlp", "silu"),
            ({"relu_squared": True}, "mlp", "relu_sq"),
            ({"post_act_ln": True}, "mlp", "gelu"),
        )
    },
}


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, training):
    make, op, activation = BLOCKS[name]
    torch.manual_seed(0)
    model = nn.ModuleDict({"ff": make()}).train(training)
    plain = copy.deepcopy(model)
    (entry,) = fusedmlp.patch(model).patched
    assert entry.op == op and entry.detail.startswith(f"activation {activation!r}")
    results = []
    for m in (model, plain):
        x = X.clone().requires_grad_()
        torch.manual_seed(1)
        y = m["ff"](x)
        grads = torch.autograd.grad(y.square().sum(), [x, *m.parameters()], allow_unused=True)
        results.append([y, *(g for g in grads if g is not None)])
    torch.testing.assert_close(*results)
