"""The masked GLU classes in both modes against plain PyTorch, and FeedForward made of them."""

import pytest
import torch
from layer_checks import (
    DTYPES,
    Stranger,
    assert_initialises_from_meta,
    assert_matches,
    assert_round_trips,
    draw,
    randomise_,
    stranger,
)
from torch import nn

from fusedmlp import PackedMasks, freeze_masks
from fusedmlp.layers import (
    MGLU,
    BilinearMGLU,
    FeedForward,
    GeMGLU,
    MaskedGLU,
    ReMGLU,
    SwiMGLU,
    SwitchFFN,
)
from fusedmlp.layers.feedforward import MASKED_VARIANTS
from fusedmlp.layers.per_expert import per_expert_state_dict

ACTS = {
    MGLU: (nn.Sigmoid, torch.sigmoid),
    BilinearMGLU: (nn.Identity, lambda g: g),
    ReMGLU: (nn.ReLU, lambda g: g.clamp(min=0)),
    SwiMGLU: (nn.SiLU, lambda g: g * torch.sigmoid(g)),
    GeMGLU: (nn.GELU, lambda g: g * 0.5 * (1 + torch.erf(g / 2**0.5))),
}
ELEMENT = {"mask_mode": "element", "num_masks": 2}


def straight_through(mask, surrogate, hard):
    return hard.to(mask.dtype) + surrogate - surrogate.detach()


def channel(act):
    def compute(p, x):
        v = x @ p["proj.weight"].T + p.get("proj.bias", 0)
        m = straight_through(p["mask"], p["mask"].sigmoid(), p["mask"] >= 0)
        return m * v * act(v) + (1 - m) * v

    return compute


def element(act):
    def compute(p, x):
        w = p["proj.weight"]
        masks = straight_through(p["mask"], p["mask"], p["mask"] > 0)
        return sum(act(x @ (m * w).T) * (x @ w.T - x @ (m * w).T) for m in masks)

    return compute


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", (True, False))
def test_channel_matches_formula(bias, dtype):
    layer = randomise_(SwiMGLU(24, 10, bias=bias)).to(dtype)
    assert_matches(layer, channel(ACTS[SwiMGLU][1]), draw(3, 5, 24, dtype=dtype))


@pytest.mark.parametrize("cls", ACTS)
def test_each_activation_in_both_modes(cls):
    act = ACTS[cls][1]
    assert_matches(randomise_(cls(24, 10)), channel(act), draw(15, 24))
    assert_matches(randomise_(cls(24, 10, **ELEMENT)), element(act), draw(15, 24))


@pytest.mark.parametrize("mode", ({}, ELEMENT), ids=("channel", "element"))
def test_runs_on_each_backend(mode, each_backend, device):
    layer = randomise_(SwiMGLU(16, 8, **mode)).to(device)
    formula = element if mode else channel
    assert_matches(layer, formula(ACTS[SwiMGLU][1]), draw(5, 16, device=device))


def test_channels_gate_themselves_or_pass():
    layer = BilinearMGLU(1, 3, bias=False)
    with torch.no_grad():
        layer.proj.weight.copy_(torch.tensor([[2.0], [2.0], [2.0]]))
        layer.mask.copy_(torch.tensor([0.0, -0.1, 3.0]))  # 0 counts as on
    assert layer(torch.tensor([[1.5]])).tolist() == [[9.0, 3.0, 9.0]]


def test_channel_masks_learn():
    layer = SwiMGLU(4, 3)
    layer(draw(5, 4)).sum().backward()
    assert layer.mask.grad.all()


@pytest.mark.parametrize("cls", ACTS)
def test_parameters(cls):
    shapes = lambda m: {k: tuple(p.shape) for k, p in m.named_parameters()}  # noqa: E731
    assert shapes(cls(dim_in=6, dim_out=4)) == {
        "mask": (4,), "proj.weight": (4, 6), "proj.bias": (4,)
    }  # fmt: skip
    assert shapes(cls(6, 4, mask_mode="element", num_masks=3)) == {
        "mask": (3, 4, 6), "proj.weight": (4, 6)
    }  # fmt: skip
    assert type(cls(6, 4).activation) is ACTS[cls][0]


def test_initial_masks():
    torch.manual_seed(0)
    assert SwiMGLU(50, 2000).mask.std().item() == pytest.approx(1, rel=0.05)
    logits = SwiMGLU(50, 200, **ELEMENT).mask
    assert logits.std().item() == pytest.approx(0.01, rel=0.05)
    assert (logits > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_freezing_changes_no_number(each_backend, device):
    layer = randomise_(SwiMGLU(20, 12, **ELEMENT)).to(device)
    x = draw(5, 20, device=device)
    y = layer(x)
    assert torch.equal(layer.eval()(x), y)
    layer.freeze_masks()
    assert torch.equal(layer(x), y)
    assert list(dict(layer.named_parameters())) == ["proj.weight"]
    assert isinstance(layer.packed, PackedMasks)
    assert sorted(layer.state_dict()) == ["packed._extra_state", "packed.planes", "proj.weight"]
    leaf = x.requires_grad_()
    assert torch.autograd.grad(layer(leaf).sum(), [leaf, layer.proj.weight])[0].any()


def test_frozen_layers_round_trip():
    layer, fresh = (randomise_(SwiMGLU(20, 12, **ELEMENT)) for _ in range(2))
    with torch.no_grad():
        fresh.mask.neg_()
    for each in (layer, fresh):
        each.freeze_masks()
    assert_round_trips(layer, fresh, draw(5, 20))


def test_freezing_refusals():
    with pytest.raises(RuntimeError, match="SwiMGLU: freeze_masks.. needs mask_mode='element'"):
        SwiMGLU(4, 4).freeze_masks()
    layer = SwiMGLU(4, 4, **ELEMENT)
    layer.freeze_masks()
    with pytest.raises(RuntimeError, match="SwiMGLU: freeze_masks.. needs logits, got frozen"):
        layer.freeze_masks()
    with pytest.raises(RuntimeError, match="SwiMGLU: reset_parameters.. needs logits, got frozen"):
        layer.reset_parameters()
    broken = SwiMGLU(4, 4, **ELEMENT)
    with torch.no_grad():
        broken.mask[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="pack_masks: logits must be finite, got 1"):
        broken.freeze_masks()


@pytest.mark.parametrize("mode", ({}, ELEMENT), ids=("channel", "element"))
def test_round_trips_and_meta(mode):
    layer, fresh = randomise_(SwiMGLU(12, 6, **mode)), SwiMGLU(12, 6, **mode)
    assert_round_trips(layer, fresh, draw(5, 12))
    assert_initialises_from_meta(lambda: SwiMGLU(64, 64, **mode))


def test_other_activations():
    layer = randomise_(MaskedGLU(12, 6, Stranger()))
    assert_matches(layer, channel(stranger), draw(5, 12))
    layer = SwiMGLU(12, 6, **ELEMENT)
    layer.activation = Stranger()
    with pytest.raises(TypeError, match="SwiMGLU: activation must be one with a kernel in element"):
        layer(draw(5, 12))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_mode": "row"}, ValueError, "mask_mode must be one of channel, element, got 'row'"),
        ({"num_masks": 2}, ValueError, "num_masks must be 1 in channel mode, got 2"),
        (ELEMENT | {"num_masks": 17}, ValueError, "num_masks must be from 1 to 16, got 17"),
        (ELEMENT | {"num_masks": 0}, ValueError, "num_masks must be at least 1, got 0"),
        (ELEMENT | {"bias": True}, ValueError, "bias must be False or None in element mode"),
        ({"activation": 3}, TypeError, "activation must be an nn.Module or an .*, got 3"),
        (ELEMENT | {"activation": Stranger()}, TypeError, "activation must be one with a kernel"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=f"MaskedGLU: {message}"):
        MaskedGLU(4, 4, **{"activation": nn.SiLU(), **options})


def test_documented_example():
    from fusedmlp.layers.glu import SwiMGLU

    swimglu = SwiMGLU(
        dim_in=256,
        dim_out=512,
        bias=True,
    )
    assert swimglu.mask.shape == (512,)
    assert swimglu(draw(2, 256)).shape == (2, 512)


@pytest.mark.parametrize("name", MASKED_VARIANTS)
def test_feedforward_variants(name):
    layer = FeedForward(64, 4, glu_variant=name.upper())
    assert sum(p.numel() for p in layer.parameters()) == 33344
    assert layer.proj.weight.shape == (256, 64)
    cls = type(layer.net[0])
    layer = randomise_(FeedForward(16, 2, glu_variant=name))
    act = ACTS[cls][1]

    def formula(p, x):
        inner = {k.removeprefix("net.0."): v for k, v in p.items()}
        return channel(act)(inner, x) @ p["net.2.weight"].T + p["net.2.bias"]

    assert_matches(layer, formula, draw(5, 16))


def test_feedforward_over_elements(each_backend, device):
    layer = FeedForward(16, 2, glu_variant="mswiglu", **ELEMENT).to(device)
    randomise_(layer)

    def formula(p, x):
        inner = {k.removeprefix("net.0."): v for k, v in p.items()}
        h = element(ACTS[SwiMGLU][1])(inner, x)
        return h @ p["net.2.weight"].T + p["net.2.bias"]

    x = draw(5, 16, device=device)
    assert_matches(layer, formula, x)
    y = layer(x)
    layer.net[0].freeze_masks()
    assert torch.equal(layer(x), y)


def test_feedforward_dropout_and_bad_options():
    layer = randomise_(FeedForward(16, 2, dropout=1.0, glu_variant="mswiglu", **ELEMENT))
    x = draw(5, 16)
    torch.testing.assert_close(layer(x), layer.net[2].bias.expand(5, 16))
    assert not torch.equal(layer.eval()(x), layer.train()(x))
    with pytest.raises(ValueError, match="FeedForward: mask_mode and num_masks must be left alone"):
        FeedForward(16, 2, glu_variant="swiglu", num_masks=2)


def masked_model():
    masked = {"glu_variant": "mswiglu", "mask_mode": "element"}
    return nn.Sequential(
        FeedForward(16, num_masks=2, **masked),
        nn.Linear(16, 16),
        SwitchFFN(16, num_experts=2, ff_kwargs=masked),
    )


def test_a_model_is_frozen_whole():
    torch.manual_seed(0)
    model, x = masked_model().eval(), torch.randn(3, 16)
    y, _ = model(x)
    assert freeze_masks(model) == ["0.net.0", "2.experts"]
    assert torch.equal(model(x)[0], y)
    assert freeze_masks(model) == []  # they are frozen already
    again = masked_model().eval()
    freeze_masks(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x)[0], y)


def test_freezing_a_model_is_refused_before_anything_is_frozen():
    model = masked_model()
    with torch.no_grad():
        model[2].experts.net_0_mask[1, 0, 3] = torch.nan
    with pytest.raises(ValueError, match="finite, got some in 2.experts .* nothing was frozen"):
        freeze_masks(model)
    assert model[0].net[0].packed is None
    with pytest.raises(RuntimeError, match="with mask_mode='element', got none in MGLU"):
        freeze_masks(MGLU(8, 8))
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        freeze_masks("model")


@pytest.mark.parametrize("one_by_one", [False, True], ids=["stacked", "one-by-one"])
def test_loading_says_what_to_freeze(one_by_one):
    frozen, logits = masked_model(), masked_model()
    freeze_masks(frozen)
    states = [
        per_expert_state_dict(model) if one_by_one else model.state_dict()
        for model in (frozen, logits)
    ]
    with pytest.raises(RuntimeError) as raised:
        logits.load_state_dict(states[0])
    first = "freeze first, by fusedmlp.freeze_masks(model), then load the state_dict"
    for name in ("0.net.0", "2.experts"):
        assert f"{name}: the state_dict has frozen masks and the layer has logits: {first}" in str(
            raised.value
        )
    with pytest.raises(RuntimeError) as raised:
        frozen.load_state_dict(states[1])
    assert str(raised.value).count("load into a model that is not frozen, then freeze it") == 2
