"""One expert of a stack: views that train the stack, and masks frozen for all experts at once."""

import copy
import pickle

import pytest
import torch
from layer_checks import draw, randomise_

import fusedmlp
from fusedmlp.layers import SwitchFFN
from fusedmlp.layers.per_expert import per_expert_state_dict

DIM = 16


def switch(variant="swiglu", experts=3, **kwargs):
    ff_kwargs = {"mult": 1.5, "glu_variant": variant, **kwargs}
    return randomise_(SwitchFFN(DIM, experts, None, ff_kwargs=ff_kwargs))


def masked(experts=3):
    return switch("mswiglu", experts, mask_mode="element", num_masks=2)


@pytest.mark.parametrize("make", (switch, masked))
def test_an_expert_alone_trains_its_part_of_the_stack(make):
    layer = make()
    layer.experts[1](draw(4, DIM)).sum().backward()
    stacks = dict(layer.experts.named_parameters())
    for name, p in layer.experts[1].named_parameters():
        stacked = stacks[name.replace(".", "_")]
        assert stacked.grad[1].any() and not stacked.grad[[0, 2]].any(), name
        assert torch.equal(p.grad, stacked.grad[1])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    "options",
    (
        {"variant": "mswiglu"},
        {"variant": "mswiglu", "mask_mode": "element", "num_masks": 2},
        {"dropout": 0.5},
    ),
    ids=("channel masks", "element masks", "dropout"),
)
def test_autocast_of_router_and_experts(options, dtype):
    """The router's probabilities come in autocast's dtype, beside an x of float32."""
    layer, x = switch(**options), draw(5, DIM).requires_grad_()
    with torch.autocast("cpu", dtype):
        y, aux = layer(x)
    assert y.dtype == dtype
    (y.float().square().sum() + aux).backward()
    grads = (x.grad, *(p.grad for p in layer.parameters()))
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
    if "dropout" not in options:
        bound = 10 * torch.finfo(dtype).eps * y.float().norm()
        assert (y.float() - layer(x)[0]).norm() <= bound


def test_an_expert_alone_is_no_leaf():
    experts = switch().experts
    with torch.no_grad():
        expert = experts[0]
    with pytest.raises(RuntimeError, match="only change requires_grad flags of leaf"):
        expert.requires_grad_(False)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        torch.optim.SGD(experts[0].parameters(), 0.1)


def test_freezing_the_masks_of_all_experts():
    layer, x = masked(), draw(6, DIM)
    y, _ = layer(x)
    layer.experts.freeze_masks()
    assert torch.equal(layer(x)[0], y)
    assert not any("mask" in name for name, _ in layer.named_parameters())
    assert torch.equal(
        layer.experts[2].net[0].packed.planes, layer.experts.net_0_packed.planes[48:]
    )
    layer(x)[0].sum().backward()
    assert layer.experts.get_parameter("net_0_proj_weight").grad.any()

    state = per_expert_state_dict(layer)
    ours = {k.removeprefix("experts.1.") for k in state if k.startswith("experts.1.")}
    assert ours == set(layer.experts[1].state_dict())
    fresh = masked()
    fresh.experts.freeze_masks()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1)
    fresh.load_state_dict(copy.deepcopy(state))
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], y)

    width = "experts.1.net.0.packed._extra_state"
    with pytest.raises(
        ValueError, match=r"1.net.0.packed.planes must be masks of width 16, got width 12"
    ):
        fresh.load_state_dict({**state, width: torch.tensor(12)})
    with pytest.raises(RuntimeError, match=f"Missing key.*{width}"):
        fresh.load_state_dict({k: v for k, v in state.items() if k != width})


def test_freezing_the_masks_of_one_expert():
    """Whoever reads the templates of stacks finds it frozen too, on meta."""
    layer, x = masked(1), draw(6, DIM)
    y, _ = layer(x)
    layer.experts.freeze_masks()
    assert torch.equal(layer(x)[0], y)
    glu = layer.experts._template[0].net[0]
    assert glu.packed.planes.is_meta
    assert glu.packed.planes.shape == layer.experts.net_0_packed.planes.shape


def test_freezing_refusals():
    with pytest.raises(RuntimeError, match="StackedExperts: freeze_masks.. needs experts with a "
                                           "masked glu_variant, got 'swiglu'"):  # fmt: skip
        switch().experts.freeze_masks()
    with pytest.raises(RuntimeError, match="freeze_masks.. needs mask_mode='element'"):
        switch("mswiglu").experts.freeze_masks()
    layer = masked()
    layer.experts.freeze_masks()
    with pytest.raises(RuntimeError, match="freeze_masks.. needs logits, got frozen"):
        layer.experts.freeze_masks()
    with fusedmlp.backend("reference"):
        assert layer.experts[0](draw(2, DIM)).shape == (2, DIM)
