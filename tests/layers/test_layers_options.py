"""What an option of a layer does alone and beside others: what is random acts in training alone,
every loss has a weight of its own, a limit is the number that is documented."""

import inspect
import itertools
import math

import pytest
import torch
from layer_checks import Stranger, draw, one, randomise_
from layer_makers import MAKERS
from torch import nn

from fusedmlp import layers

D, SAMPLES = 16, 8
# Experts, and blocks: computed in one call, and for each reason that one call is none.
KINDS = {
    "fused": {"glu_variant": "swiglu"},
    "plain": {},
    "norm": {"glu_variant": "swiglu", "pre_norm": True},
    "stranger": {"activation": Stranger},
    "channel masks": {"glu_variant": "mswiglu"},
    "element masks": {"glu_variant": "mreglu", "mask_mode": "element"},
}
OF_TREES = ("fused", "plain", "norm", "stranger", "channel masks")  # it takes no mask_mode

# "layer option variant" -> the layer with a value for the option.
RANDOM = {
    **{f"FeedForward dropout {name}": lambda p, kind=kind: layers.FeedForward(D, 2, p, **kind)
       for name, kind in KINDS.items()},
    **{f"SwitchFFN ff_kwargs {name}": lambda p, kind=kind: layers.SwitchFFN(
           D, 2, ff_kwargs={"mult": 2, "dropout": p, **kind})
       for name, kind in KINDS.items()},
    **{f"FastFeedForward dropout {name} {soft}": lambda p, kind=KINDS[name], soft=soft:
           layers.FastFeedForward(D, 1, None, 2, p, **kind, soft_routing_during_train=soft)
       for name in OF_TREES for soft in (True, False)},
    "FastFeedForward region_leak": lambda p: layers.FastFeedForward(D, 2, mult=1, region_leak=p),
    "SwitchFFN jitter": lambda p: layers.SwitchFFN(D, 2, ff_kwargs={"mult": 1}, jitter=p),
    **{f"MLP dropout {mode} {act.__name__}": lambda p, mode=mode, act=act: layers.MLP(
           D, dropout=p, norm_mode=mode, act_fn=act)
       for mode in ("none", "pre", "post") for act in (nn.GELU, Stranger)},
    **{f"GatingMechanism dropout {norm}": lambda p, norm=norm: layers.GatingMechanism(
           D, bottleneck_dim=8, dropout=p, use_norm=norm) for norm in (True, False)},
    "GMLP drop_path": lambda p: layers.GMLP(D, 8, 4, 2, drop_path=p),
    **{f"PointwiseMLP dropout_cfg {act} {backend}": lambda p, act=act, backend=backend:
           layers.PointwiseMLP(D, act, nn.Dropout(p), backend=backend)
       for act in ("gelu", "swiglu") for backend in ("torch", "fused")},
}  # fmt: skip


def test_every_random_option_is_in_the_walk():
    words = ("dropout", "drop_path", "dropout_cfg", "jitter", "region_leak", "ff_kwargs")
    found = {
        (name, option)
        for name in layers.__all__
        for option in inspect.signature(getattr(layers, name)).parameters
        if option in words
    }
    assert found == {tuple(row.split()[:2]) for row in RANDOM}


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_acts_in_training_alone(name):
    """In eval the layer is that without the option, bit for bit from call to call."""
    layer, without = randomise_(RANDOM[name](0.5)), RANDOM[name](0.0)
    with torch.no_grad():
        for p, other in zip(without.parameters(), layer.parameters(), strict=True):
            p.copy_(other)
    x = draw(SAMPLES, 4, D)
    torch.manual_seed(0)
    first, second = one(layer.train()(x)), one(layer(x))
    assert not torch.equal(first, second)
    first, second = one(layer.eval()(x)), one(layer(x))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, one(without.eval()(x)))
    first, second = one(without.train()(x)), one(without(x))
    assert torch.equal(first, second)
    state = torch.get_rng_state()
    layer.eval()(x), without.train()(x)
    assert torch.equal(torch.get_rng_state(), state), "numbers are drawn for nothing"


# The largest of each option that is a probability or a width of noise; below 1 where 1 is refused.
BELOW = math.nextafter(1, 0)
LARGEST = {
    "FeedForward dropout fused": 1.0, "FastFeedForward dropout fused True": 1.0,
    "FastFeedForward region_leak": 1.0, "SwitchFFN jitter": 1.0, "MLP dropout none GELU": BELOW,
    "GatingMechanism dropout True": BELOW, "GMLP drop_path": BELOW,
}  # fmt: skip
ALL_MAY_GO = [["FeedForward", "dropout"], ["FastFeedForward", "dropout"],
              ["PointwiseMLP", "dropout_cfg"]]  # fmt: skip


@pytest.mark.parametrize("name, largest", LARGEST.items())
def test_a_probability_at_its_ends_and_beyond(name, largest):
    for p in (0, 0.0, largest):
        assert one(RANDOM[name](p).train()(draw(2, 4, D))).isfinite().all()
    for p in (math.nextafter(0, -1), math.nextafter(largest, 2)):
        with pytest.raises(ValueError, match=rf"^\w+: {name.split()[1]} must be in \[0"):
            RANDOM[name](p)


@pytest.mark.parametrize("name", [n for n in RANDOM if n.split()[:2] in ALL_MAY_GO])
def test_where_all_is_dropped_nothing_but_biases_is_left(name):
    layer = randomise_(RANDOM[name](1.0))
    for key, p in layer.named_parameters():
        if "bias" in key:
            nn.init.zeros_(p)
    x = draw(2, 4, D)
    assert not one(layer.train()(x)).any() and one(layer.eval()(x)).any()


# "layer coefficient" -> the layer with all of its coefficients.
LOSSES = {
    "SwitchFFN": (lambda **c: layers.SwitchFFN(D, 3, ff_kwargs={"mult": 1}, **c),
                  ("loss_coef", "z_loss_coef")),
    "FastFeedForward": (lambda **c: layers.FastFeedForward(D, 2, mult=1, return_aux=True, **c),
                        ("load_balancing_alpha", "hardening_coef")),
}  # fmt: skip


def test_every_loss_is_in_the_walk():
    for name in layers.__all__:
        options = inspect.signature(getattr(layers, name)).parameters
        weights = tuple(o for o in options if o.endswith(("_coef", "_alpha")) and "scalar" not in o)
        assert weights == (LOSSES[name][1] if name in LOSSES else ()), name


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_weight_of_its_own(name):
    """Alone, the others 0, it is linear in its coefficient; together they add up."""
    make, names = LOSSES[name]
    x, state = draw(9, D), randomise_(make(**dict.fromkeys(names, 0.0))).state_dict()

    def aux(**weights):
        layer = make(**{**dict.fromkeys(names, 0.0), **weights}).train()
        layer.load_state_dict(state)
        _, loss = layer(x)
        grad = None
        if loss.requires_grad:
            (grad,) = torch.autograd.grad(loss, next(layer.parameters()))
        return loss.detach(), grad

    assert aux()[0] == 0 and aux()[0].dtype == torch.float32
    alone = {key: aux(**{key: 1.0}) for key in names}
    for key, (loss, grad) in alone.items():
        assert loss > 0 and grad.any(), key
        torch.testing.assert_close(aux(**{key: 3.0})[0], 3 * loss)
    both = aux(**{key: i + 2.0 for i, key in enumerate(names)})
    expected = [sum((i + 2) * part[j] for i, part in enumerate(alone.values())) for j in (0, 1)]
    torch.testing.assert_close(both, tuple(expected))


# tokens, experts, factor -> what an expert takes: max(1, floor(tokens / experts * factor))
CAPACITIES = [(7, 2, 1.0, 3), (5, 2, 1.0, 2), (10, 3, 1.25, 4), (11, 4, 0.7, 1), (1, 4, 1.0, 1),
              (8, 2, 0.999, 3), (8, 2, 1.0, 4), (3, 2, 100.0, 150)]  # fmt: skip
LIMITED = {
    "Top1MoE": lambda E, factor: layers.Top1MoE(D, 8, E, capacity_factor=factor),
    "TopKMoE": lambda E, factor: layers.TopKMoE(D, 8, E, 1, capacity_factor=factor),
    "SwitchFFN": lambda E, factor: layers.SwitchFFN(
        D, E, factor, ff_kwargs={"mult": 1}, dropped="zero"
    ),
}  # fmt: skip


def test_every_capacity_is_in_the_walk():
    options = {name: inspect.signature(getattr(layers, name)).parameters for name in layers.__all__}
    assert {name for name in options if "capacity_factor" in options[name]} == set(LIMITED)


@pytest.mark.parametrize("tokens, experts, factor, capacity", CAPACITIES)
@pytest.mark.parametrize("name", LIMITED)
def test_capacity_is_the_documented_floor(name, tokens, experts, factor, capacity):
    """Where all tokens choose expert 0, the first so many are kept, and no other."""
    layer = randomise_(LIMITED[name](experts, factor))
    nn.init.zeros_(layer.router.weight)
    y = one_result(layer(draw(tokens, D)))
    kept = torch.arange(tokens) < capacity
    assert torch.equal(y.any(1), kept)


def one_result(out):
    return out[0] if isinstance(out, tuple) else out


SATURATED = {
    **{f"SwitchFFN {kind}": lambda kind=kind: layers.SwitchFFN(
           D, 3, loss_coef=1.0, z_loss_coef=1e-6, ff_kwargs={"mult": 1, **KINDS[kind]})
       for kind in ("fused", "norm")},
    **{f"Top1MoE {score} {scaled}": lambda score=score, scaled=scaled: layers.Top1MoE(
           D, 8, 3, score=score, scaled=scaled)
       for score, scaled in itertools.product(("softmax", "sigmoid"), ("output", "input"))},
    **{f"TopKMoE {score} {norm}": lambda score=score, norm=norm: layers.TopKMoE(
           D, 8, 3, 2, score=score, norm=norm, eps=0.0 if score == "softmax" else 1e-20)
       for score, norm in itertools.product(("softmax", "sigmoid", "sqrtsoftplus"), (True, False))},
    **{f"FastFeedForward {soft}": lambda soft=soft: layers.FastFeedForward(
           D, 2, mult=1, hardening_coef=1.0, load_balancing_alpha=1.0, return_aux=True,
           has_master_leaf=True, soft_routing_during_train=soft) for soft in (True, False)},
    "PathWeightedFFF": lambda: layers.PathWeightedFFF(D, 2, D),
}  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scale", (0.0, 1e4))
@pytest.mark.parametrize("name", SATURATED)
def test_saturated_and_undecided_routers(name, scale, dtype):
    """Probabilities of exactly 0 and 1, or all alike: results, losses and gradients are finite."""
    layer = randomise_(SATURATED[name]()).to(dtype)
    with torch.no_grad():
        for key, p in layer.named_parameters():
            if "router" in key or key in ("w1s", "b1s"):
                p.mul_(scale)
    for training in (True, False):
        x = draw(6, D, dtype=dtype).requires_grad_()
        out = layer.train(training)(x)
        outs = out if isinstance(out, tuple) else (out,)
        assert all(t.isfinite().all() for t in outs)
        sum(t.float().sum() for t in outs).backward()
        grads = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
        assert all(t.isfinite().all() for t in grads)


LEARNED = {
    "GatingMechanism PReLU": lambda: layers.GatingMechanism(D, bottleneck_dim=8, act_fn=nn.PReLU)
}


@pytest.mark.parametrize("name", (*MAKERS, *LEARNED))
def test_initial_values_again(name):
    """Every parameter gets them, whatever it was before."""
    layer = {**MAKERS, **LEARNED}[name]()
    if next(layer.parameters(), None) is None:  # L2Norm
        return
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
    layer.init_weights_()
    assert not [key for key, p in layer.named_parameters() if (p == 7.0).any()]


# Weights are uniform within factor / sqrt(columns) where a layer says so; others have other rules.
LINEAR = ("GLU", "Bilinear", "ReGLU", "SwiGLU", "GeGLU", "MGLU", "BilinearMGLU", "ReMGLU", "GeMGLU",
          "MaskedGLU", "PathWeightedFFF", "PointwiseMLP", "Top1MoE", "TopKMoE")  # fmt: skip
SCRIPT = ("SwiGLUMLP", "ReluSquaredMLP", "GELUMLP", "SiLUMLP")
UNIFORM = {**dict.fromkeys(LINEAR, 1), **dict.fromkeys(SCRIPT, 3**0.5)}


@pytest.mark.parametrize("name", MAKERS)
def test_initial_weights_lie_alike_on_both_sides_of_zero(name):
    torch.manual_seed(0)
    layer = MAKERS[name]()
    for key, p in layer.named_parameters():
        if p.dim() < 2 or not p.any():
            continue
        assert p.mean().abs() <= 5 * p.std() / p.numel() ** 0.5, key
        if (factor := UNIFORM.get(name)) is not None and p.numel() >= 512:
            bound = factor * p.shape[-1] ** -0.5
            assert 0.97 * bound < p.max() <= bound and 0.97 * bound < -p.min() <= bound, key
