"""What stands around a module inside a layer runs: its weight may come from there."""

import copy

import pytest
import torch
from layer_checks import draw, one, randomise_
from layer_makers import MAKERS, D
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm

from fusedmlp import layers
from fusedmlp.hyperglu import HyperMLP
from fusedmlp.layers.parts.around import bare, hooked

ALL = {
    **MAKERS,
    "HyperMLP": lambda: HyperMLP(D, block_size=8, op1_rank=2, op2_rank=2),
    "packed": lambda: layers.BinaryGatedMLP(D, 128, pad=True).pack(),
    "PointwiseMLP fused": lambda: layers.PointwiseMLP(D, "swiglu", nn.Identity(), backend="fused"),
    "PointwiseMLP plain": lambda: layers.PointwiseMLP(D, "silu", backend="fused"),
    "NGPT scaled": lambda: layers.NGPT(D, paper=True),
}
# Two products with halves of the projection's weight are no call of it.
HALVES = ("SwiMGLU", "FeedForward masked")


def inner_modules(layer):
    """Those inside that compute with parameters, or a function alone; no mere holders."""
    return {
        name: m
        for name, m in layer.named_modules()
        if m is not layer and (m._parameters or not m._modules) and not m._buffers
    }


def hook(register):
    return lambda module, seen: getattr(module, register)(lambda *args: seen.append(args)).remove


def on_instance(module, seen):
    """A forward that is set on the instance."""
    own = module.forward
    module.forward = lambda *args: (seen.append(args), own(*args))[1]
    return lambda: delattr(module, "forward")


# What may stand around a module: (module, what it has seen) -> what takes it away.
AROUND = {
    "forward": hook("register_forward_hook"),
    "before forward": hook("register_forward_pre_hook"),
    "backward": hook("register_full_backward_hook"),
    "before backward": hook("register_full_backward_pre_hook"),
    "instance": on_instance,
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ALL)
def test_every_hook_inside_runs(name, around):
    """One kind at a time, on one module at a time."""
    layer = randomise_(ALL[name]()).eval()
    x = draw(2, 4, D).requires_grad_()
    y = one(layer(x))
    for path, module in inner_modules(layer).items():
        if path == "routers" and "backward" in around:
            continue  # a hard choice gives them no gradient
        seen = []
        remove = AROUND[around](module, seen)
        _runs(name, layer, path, x, y, seen)
        remove()
    assert torch.equal(one(layer(x)), y)


def _runs(name, layer, path, x, y, seen):
    if name in HALVES and path.rpartition(".")[2] in ("proj", "activation"):
        with pytest.raises(
            TypeError, match="must be without hooks and .* in element mode, .* got one th"
        ):
            layer(x)
        return
    again = one(layer(x))
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-5)
    again.sum().backward()
    assert seen, path


GATED = (lambda: layers.FeedForward(D, 2, glu_variant="swiglu"), lambda: layers.FeedForward(D, 2),
         lambda: layers.MLP(D, norm_mode="none", dropout=0.0), lambda: layers.SwiGLUMLP(D),
         lambda: layers.Top1MoE(D, 8, 2, shared_hidden=8),
         lambda: layers.TopKMoE(D, 8, 4, 2, gated=False, shared_hidden=8),
        )  # fmt: skip


@pytest.mark.parametrize("make", GATED)
def test_weights_that_a_hook_makes_are_the_weights(make):
    """Pruned weights that were loaded since, and gradients of what a spectral norm divides."""
    layer = randomise_(make())
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        prune.l1_unstructured(linear, "weight", 0.5)
    layer.load_state_dict({k: t if k.endswith("_mask") else 2 * t
                           for k, t in layer.state_dict().items()})  # fmt: skip
    y = one(layer(draw(3, D)))
    for linear in linears:
        prune.remove(linear, "weight")
    torch.testing.assert_close(one(layer(draw(3, D))), y)

    spectral_norm(linears[0])
    for _ in range(2):
        one(layer(draw(3, D))).square().sum().backward()
    assert linears[0].weight_orig.grad.any()


class Halved(nn.Module):
    def forward(self, w):
        return w / 2


class Tagged(torch.Tensor):
    """A subclass without a rule of its own."""


@pytest.mark.parametrize("make", GATED)
def test_a_parametrization_and_a_subclass_are_the_weights(make):
    layer = randomise_(make()).eval()
    halved = copy.deepcopy(layer)
    for linear in (m for m in halved.modules() if isinstance(m, nn.Linear)):
        linear.weight.data.div_(2)
    x = draw(3, D)
    for linear in [m for m in layer.modules() if type(m) is nn.Linear]:
        parametrize.register_parametrization(linear, "weight", Halved())
    torch.testing.assert_close(one(layer(x)), one(halved(x)))
    one(layer(x)).sum().backward()
    wrapped = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    assert all(m.parametrizations.weight.original.grad is not None for m in wrapped)

    y = one(halved(x))
    for linear in (m for m in halved.modules() if isinstance(m, nn.Linear)):
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Tagged))
    torch.testing.assert_close(one(halved(x)).as_subclass(torch.Tensor), y)


def test_what_stands_around_a_module_has_a_name():
    """Each kind of hook alone, and a forward of the instance's own."""
    plain = nn.Linear(2, 2)
    assert hooked(plain) is None and bare(plain, None)
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook",
                 "full_backward_pre_hook"):  # fmt: skip
        module = nn.Linear(2, 2)
        getattr(module, f"register_{kind}")(lambda *_: None)
        assert hooked(module) == "has hooks" and not bare(plain, module), kind
    plain.forward = plain.forward
    assert hooked(plain) == "has a forward of its own, set on the instance" and not bare(plain)
