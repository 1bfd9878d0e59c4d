"""What every layer does in float64, on the meta device and in a FakeTensorMode."""

import pytest
import torch
from layer_checks import draw, one, randomise_
from test_layers_every import MAKERS, D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedmlp import freeze_masks, layers


def frozen(name):
    layer = {**MAKERS, "SwitchFFN element": element_masks}[name]()
    freeze_masks(layer)
    return layer


def element_masks():
    return layers.SwitchFFN(
        D, 2, ff_kwargs={"mult": 1, "glu_variant": "mglu", "mask_mode": "element"}
    )


WALK = {
    **MAKERS,
    "Top1MoE sigmoid": lambda: layers.Top1MoE(D, 16, 2, score="sigmoid", scaled="input"),
    "Top1MoE capacity": lambda: layers.Top1MoE(D, 16, 2, capacity_factor=0.5),
    "TopKMoE capacity": lambda: layers.TopKMoE(D, 16, 4, 2, capacity_factor=0.5),
    "FastFeedForward hard": lambda: layers.FastFeedForward(
        D, 2, mult=1, soft_routing_during_train=False
    ),
    "packed": lambda: layers.BinaryGatedMLP(D, 128, pad=True).pack(),
    "frozen": lambda: frozen("FeedForward masked"),
    "frozen experts": lambda: frozen("SwitchFFN element"),
}


class Narrowing(TorchDispatchMode):
    """Notes each op that takes float64 and gives a narrower floating dtype, but for constants."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken, given = (
            [t.dtype for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
            for tree in ((args, kwargs), out)
        )
        constant = "aten.new_" in str(func) or "_like" in str(func)
        if torch.float64 in taken and not constant:
            self.found += [(str(func), d) for d in given
                           if d.is_floating_point and d != torch.float64]  # fmt: skip
        return out


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", WALK)
def test_float64_stays_float64(name, training):
    """Forward and backward compute nothing in less, but for the float16 that one-bit scales are."""
    layer = randomise_(WALK[name]()).train(training)
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = draw(2, 4, D)
    torch.manual_seed(0)
    single = one(layer(x))
    layer.double()
    torch.manual_seed(0)
    with Narrowing() as narrowing:
        leaf = x.double().requires_grad_()
        y = one(layer(leaf))
        y.sum().backward()
    assert y.dtype == leaf.grad.dtype == torch.float64
    # The layer in float32 is off by float32's rounding, and so the two are of one function.
    torch.testing.assert_close(single.double(), y, rtol=1e-4, atol=1e-5)
    scales = {torch.float16} if "Binary" in name else set()
    assert {dtype for _, dtype in narrowing.found} == scales, narrowing.found


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", WALK)
def test_meta_and_fake_tensors_run(name, training):
    """A model is sized on them before it has memory."""
    x = torch.randn(2, 4, D)
    layer = WALK[name]().train(training)
    expected = one(layer(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = one(layer(mode.from_tensor(x).requires_grad_()))
        y.sum().backward()
    assert y.shape == expected.shape and y.dtype == expected.dtype
    with FakeTensorMode():  # built there, and given a state
        made = WALK[name]().train(training)
        made.load_state_dict(WALK[name]().state_dict())
        y = one(made(torch.randn(2, 4, D, requires_grad=True)))
        y.sum().backward()
    assert y.shape == expected.shape and y.dtype == expected.dtype
    with torch.device("meta"):
        made = WALK[name]().train(training)
    for on_meta in (made, layer.to("meta")):
        y = one(on_meta(x.to("meta").requires_grad_()))
        y.sum().backward()
        assert y.is_meta and y.shape == expected.shape and y.dtype == expected.dtype
