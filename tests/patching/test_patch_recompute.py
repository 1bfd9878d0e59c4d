"""patch(model, recompute=True): the input alone is saved, and the numbers are the same."""

import copy

import pytest
import torch
from patch_blocks import MLP, GatedMLP, Model, Packed

import fusedmlp

T, H = 10, 12


def saved(model, x):
    """Bytes of what is saved for backward beside parameters, each memory once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(t):
        if (pointer := t.untyped_storage().data_ptr()) not in own:
            sizes[pointer] = t.numel() * t.itemsize
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(sizes.values()), y


@pytest.mark.parametrize("make", (GatedMLP, Packed), ids=lambda make: make.__name__)
def test_it_saves_x_alone(make, each_backend):
    torch.manual_seed(0)
    block = make()
    plain, ours = copy.deepcopy(block), block
    fusedmlp.patch(plain)
    (entry,) = fusedmlp.patch(ours, recompute=True).patched
    assert entry.detail.endswith("saves x alone, 2 H values a token less")
    x = torch.randn(T, 8, requires_grad=True)
    before, after = saved(plain, x), saved(ours, x)
    if each_backend == "triton":
        assert before[0] - after[0] == 4 * T * 2 * H
    assert after[0] == x.numel() * 4 < before[0]
    grads = []
    for model, (_, y) in ((plain, before), (ours, after)):
        grads.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    torch.testing.assert_close(*grads)


def test_what_has_nothing_to_recompute():
    model = Model(MLP(), GatedMLP())
    plain, gated = fusedmlp.patch(model, recompute=True).patched
    assert "saves x" not in plain.detail and "saves x" in gated.detail
    assert fusedmlp.patch(model).patched == (plain, gated)
    fusedmlp.unpatch(model)
    assert "saves x" not in str(fusedmlp.patch(model))
    with pytest.raises(TypeError, match="patch: recompute must be True or False, got 'yes'"):
        fusedmlp.patch(model, recompute="yes")
