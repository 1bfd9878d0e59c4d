"""Gates and activations by their names in the dense layers: every row of the table, with
parameters, in what takes a gate, and one error in what takes none."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from layer_checks import assert_compiles, assert_matches, assert_round_trips, draw, randomise_

import fusedmlp
from fusedmlp.layers import (
    GMLP,
    MLP,
    FastFeedForward,
    FeedForward,
    GatingMechanism,
    MaskedGLU,
    SwitchFFN,
)
from fusedmlp.layers.glu import GLUBase
from fusedmlp.reference.activations import ACTIVATIONS, resolve

GATES = [name for name, row in ACTIVATIONS.items() if row.up is not None]
PLAIN = [name for name in ACTIVATIONS if name not in GATES]
# Where clamps bite on what is drawn.
SET = ("swiglu_oai(limit=0.5, alpha=1.3)", "clamped_swiglu(limit=0.5)", "swiglu_step(limit=0.25)",
       "softcap_swiglu(gate_cap=0.5, up_cap=0.75)", "situ(beta=0.5, beta_up=0.75)",
       "scaled_swiglu(gate_scale=0.5, up_scale=2.0)", "leaky_relu(negative_slope=0.3)",
       "elu(alpha=0.5)", "softplus(beta=2.0)", "clipped_gelu(limit=0.25)")  # fmt: skip


def test_every_row_with_parameters_is_set():
    with_some = {name for name, row in ACTIVATIONS.items() if row.parameters}
    assert with_some == {spelling.partition("(")[0] for spelling in SET}


def gated(spelling):
    row = resolve(spelling)

    def compute(p, x):
        v, g = F.linear(x, p["net.0.proj.weight"], p["net.0.proj.bias"]).chunk(2, -1)
        return F.linear(row.phi(g) * row.psi(v), p["net.2.weight"], p["net.2.bias"])

    return compute


@pytest.mark.parametrize("spelling", (*ACTIVATIONS, *SET))
def test_a_gated_block_is_its_formula(spelling):
    layer = randomise_(FeedForward(16, mult=1.5, glu_variant=spelling))
    assert_matches(layer, gated(spelling), draw(7, 16))
    assert f"fused as {spelling!r}" in fusedmlp.explain(layer)
    assert f"fused as {spelling!r}" in repr(layer)


@pytest.mark.parametrize("spelling", ("swiglu_oai(limit=0.5)", "situ"))
def test_a_gated_block_is_its_formula_on_each_backend(spelling, each_backend):
    layer = randomise_(FeedForward(16, mult=1.5, glu_variant=spelling))
    assert_matches(layer, gated(spelling), draw(7, 16))


@pytest.mark.parametrize("spelling", (*PLAIN, "clipped_gelu(limit=0.25)"))
def test_a_plain_block_is_its_formula(spelling):
    layer = randomise_(FeedForward(16, mult=1.5, activation=spelling))
    row = resolve(spelling)

    def compute(p, x):
        h = row.phi(F.linear(x, p["net.0.weight"], p["net.0.bias"]))
        return F.linear(h, p["net.3.weight"], p["net.3.bias"])

    assert_matches(layer, compute, draw(7, 16))


def test_a_spelling_is_made_canonical():
    """In any case and order; parameters at their defaults are left out."""
    glu = FeedForward(8, glu_variant="SwiGLU_OAI( alpha=2, limit=7)").net[0]
    assert glu.activation.activation == "swiglu_oai(alpha=2.0)"
    assert repr(glu.activation) == "NamedActivation('swiglu_oai(alpha=2.0)')"
    assert GLUBase(8, 8, "clamped_swiglu(limit=7.0)").activation.activation == "clamped_swiglu"


def kept(spelling, **options):
    return FeedForward(16, mult=2, glu_variant=spelling, **options)


@pytest.mark.parametrize("spelling", ("swiglu_oai(limit=0.5)", "gelu_tanh"))
def test_round_trips_and_compiles(spelling):
    assert_round_trips(randomise_(kept(spelling)), kept(spelling), draw(2, 4, 16))
    assert_compiles(randomise_(kept(spelling)), draw(2, 4, 16))


def test_a_checkpoint_of_another_gate_loads():
    """The gate is no parameter: names are those of "swiglu"."""
    state = FeedForward(16, mult=2, glu_variant="swiglu").state_dict()
    kept("swiglu_oai").load_state_dict(state)


@pytest.mark.parametrize("where", ("net.0", "net.0.proj", "net.0.activation", "net.2", "none"))
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_hooks_and_dropout_change_nothing(where, dropout):
    layer = randomise_(kept("swiglu_oai(limit=0.5)", dropout=dropout))
    hooked = copy.deepcopy(layer)
    seen = []
    if where != "none":
        hooked.get_submodule(where).register_forward_hook(lambda m, a, y: seen.append(m))
    results = []
    for one in (layer, hooked):
        torch.manual_seed(3)
        results.append(one(draw(5, 16)))
    torch.testing.assert_close(*results)
    assert bool(seen) == (where != "none")


@pytest.mark.parametrize("mode, masks", (("channel", 1), ("element", 2)))
def test_a_masked_unit_takes_both_factors(mode, masks):
    layer = randomise_(MaskedGLU(16, 12, "swiglu_oai(limit=0.5)", mask_mode=mode, num_masks=masks))
    row, x, w = resolve("swiglu_oai(limit=0.5)"), draw(5, 16), layer.proj.weight
    if mode == "channel":
        v, m = layer.proj(x), (layer.mask >= 0).float()
        expected = m * row.phi(v) * row.psi(v) + (1 - m) * v
    else:
        m = (layer.mask > 0).float()
        expected = sum(row.phi(x @ (one * w).T) * row.psi(x @ ((1 - one) * w).T) for one in m)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("fused", (True, False))
def test_experts_take_a_gate(fused):
    """In one call, and one by one where each has a norm."""
    kwargs = {"mult": 2, "glu_variant": "swiglu_oai(limit=0.5)", "pre_norm": not fused}
    layer = randomise_(SwitchFFN(16, 2, None, ff_kwargs=kwargs)).eval()
    assert ("in one call, fused as 'swiglu_oai(limit=0.5)'" in fusedmlp.explain(layer)) == fused
    x = draw(6, 16)
    prob, expert = layer.router(x).softmax(-1).max(-1)
    each = [one(x) for one in layer.experts]
    expected = torch.stack(
        [p * each[e][t] for t, (p, e) in enumerate(zip(prob, expert, strict=True))]
    )
    torch.testing.assert_close(layer(x)[0], expected)
    tree = FastFeedForward(16, 1, mult=1, glu_variant="situ", has_master_leaf=True)
    assert tree(x).shape == x.shape


# Layers of one projection, by the argument that takes an activation.
PLAIN_LAYERS = {
    "FeedForward: activation": lambda a: FeedForward(8, activation=a),
    "MLP: act_fn": lambda a: MLP(8, act_fn=a),
    "GatingMechanism: act_fn": lambda a: GatingMechanism(8, bottleneck_dim=4, act_fn=a),
    "GMLP: gate_activation": lambda a: GMLP(8, 8, 4, 1, gate_activation=a),
}


@pytest.mark.parametrize(
    "where, gate", list(itertools.product(PLAIN_LAYERS, (*GATES, "situ(beta=2)")))
)
def test_plain_layers_refuse_gates(where, gate):
    with pytest.raises(ValueError) as error:
        PLAIN_LAYERS[where](gate)
    assert str(error.value) == (
        f"{where} must be a function of one tensor here, where there is no up projection; got "
        f"{gate!r}, a gate: give w_up, or take another activation"
    )


@pytest.mark.parametrize("where", PLAIN_LAYERS)
def test_plain_layers_take_names(where):
    layer = PLAIN_LAYERS[where]("quick_gelu")
    assert layer(draw(2, 4, 8)).shape == (2, 4, 8)
    assert "quick_gelu" in repr(layer)


def test_a_gate_of_one_tensor_says_so():
    with pytest.raises(ValueError, match="NamedActivation: activation must be a function of one t"):
        GLUBase(8, 8, "situ").activation(draw(8))


@pytest.mark.parametrize("spelling, message", [
    ("swiglu_oai(limit=-1)", "must be 'swiglu_oai' with a limit of 0 or more"),
    ("swiglu_oai(beta=1)", "must be 'swiglu_oai', or that with some of its parameters limit"),
    ("silu(alpha=1)", "must be 'silu' alone, which has no parameters"),
    ("swiglu_oai(", "must be 'swiglu_oai', or that with"),
])  # fmt: skip
def test_bad_parameters(spelling, message):
    for owner, make in (
        ("FeedForward: glu_variant", lambda: FeedForward(8, glu_variant=spelling)),
        ("GLUBase: activation", lambda: GLUBase(8, 8, spelling)),
        ("MaskedGLU: activation", lambda: MaskedGLU(8, 8, spelling)),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value).startswith(f"{owner} {message}")
        assert str(error.value).endswith(f"; got {spelling!r}")


def test_an_unknown_variant_lists_what_there_is():
    with pytest.raises(ValueError, match="Unknown GLU variant: no; .* swiglu, .* swiglu_oai, "):
        FeedForward(8, glu_variant="no")
