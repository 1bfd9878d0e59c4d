"""What holds for every layer of `fusedmlp.layers`, whatever it computes; the names of mlp_utils.

A layer without a line in MAKERS fails here.
"""

import importlib
import inspect
import pickle
import re

import pytest
import torch
from layer_checks import (
    DTYPES,
    Stranger,
    assert_compiles,
    assert_initialises_from_meta,
    assert_round_trips,
    draw,
    one,
    randomise_,
)
from layer_makers import MAKERS, D
from torch import nn

import fusedmlp
from fusedmlp import layers
from fusedmlp.layers import masked_glu
from fusedmlp.layers.glu import GLUBase
from fusedmlp.layers.parts import block

# Their forward is that of another one here, all but the activation's name.
TWINS = ("Bilinear", "ReGLU", "SwiGLU", "GeGLU", "BilinearMGLU", "ReMGLU", "GeMGLU", "MaskedGLU",
         "GELUMLP", "SiLUMLP", "SwitchFFN masked", "FastFeedForward")  # fmt: skip


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def x_of(dtype=torch.float32):
    return draw(2, 4, D, dtype=dtype)


def test_no_layer_is_left_out():
    assert {name.split()[0] for name in MAKERS} == set(layers.__all__)
    for name, built in MAKERS.items():
        layer = built()
        assert type(layer).__name__ == name.split()[0]
        assert next(iter(inspect.signature(layer.forward).parameters)) == "x"


def test_round_trips(make):
    layer = randomise_(make())
    if next(layer.parameters(), None) is not None:
        assert_round_trips(layer, make(), x_of())
    else:  # L2Norm
        assert not layer.state_dict()
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x_of()), layer(x_of()))


def test_no_parameter_is_left_uninitialised(make, monkeypatch):
    """torch.empty is filled with NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        layer = make()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, p in (*layer.named_parameters(), *layer.named_buffers()):
        assert p.isfinite().all(), name


def test_initialises_from_meta(make):
    if next(make().parameters(), None) is not None:
        assert_initialises_from_meta(make)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in TWINS else ()) for n in MAKERS]
)
def test_compiles_to_one_graph(name):
    assert_compiles(MAKERS[name](), x_of())


@pytest.mark.parametrize("training", (True, False))
def test_dtype_is_kept(make, training):
    for dtype in DTYPES:
        layer = make().to(dtype).train(training)
        out = layer(x_of(dtype))
        y = out[0] if isinstance(out, tuple) else out
        assert y.dtype == dtype and y.shape[:2] == (2, 4) and y.isfinite().all()
        if y.requires_grad:
            y.sum().backward()


# --- explain()


@pytest.mark.parametrize(
    "layer",
    [
        lambda a: layers.FeedForward(8, activation=a),
        lambda a: layers.MLP(8, act_fn=a, use_norm=False),
        lambda a: layers.GatingMechanism(8, bottleneck_dim=4, act_fn=a, use_norm=False),
        lambda a: GLUBase(8, 8, a()),
        lambda a: layers.SwitchFFN(8, 2, ff_kwargs={"activation": a}),
    ],
    ids=("FeedForward", "MLP", "GatingMechanism", "GLUBase", "SwitchFFN"),
)
@pytest.mark.parametrize(
    "activation, name", [(nn.SiLU, "silu"), (fusedmlp.Gelu2, "gelu2"), (fusedmlp.ReluNelu, None),
                         (Stranger, None)],
)  # fmt: skip
def test_explain_says_where_an_activation_runs(layer, activation, name):
    made, kind = layer(activation).eval(), activation.__name__
    (line,) = [s for s in fusedmlp.explain(made).splitlines() if re.search(EXPLAINED, s)]
    alone = rf"{kind} in PyTorch|, {kind},|one by one in PyTorch"
    fused = rf"fused as '{name}'|Linear \+ {kind}"
    assert re.search(alone if name is None else fused, line), line
    assert one(made(draw(2, 3, 8))).shape == (2, 3, 8)


EXPLAINED = r"^(the layer|model|gate|experts) \("


def explained(layer):
    """What explain() says of the layer beyond what it says without."""
    return fusedmlp.explain(layer).removeprefix(fusedmlp.explain()).strip()


def test_explain_has_a_line_for_every_layer(make):
    layer = make()
    assert bool(explained(layer)) == any(True for _ in layer.parameters())


def packed():
    return layers.BinaryGatedMLP(128, 128).pack()


@pytest.mark.parametrize(
    "layer, text",
    [
        (lambda: layers.NGPT(8), "(SwiGLU): one gated_mlp, 'silu', of weights normalised in Py"),
        (lambda: layers.NGPT(8, nn.Linear(8, 8)), "(NGPT): norms and step in PyTorch"),
        (lambda: layers.GMLP(8, 8, 4, 1), "blocks.0.1 (GMLPBlock): one gated_act, 'gelu', betw"),
        (lambda: layers.MGLU(8, 8), "the layer (MGLU): Sigmoid in PyTorch"),
        (lambda: layers.MGLU(8, 8, mask_mode="element"), "(MGLU): Sigmoid fused as 'sigmoid'"),
        (lambda: layers.FeedForward(8, glu_variant="mswiglu"), "net.0 (SwiMGLU): SiLU in PyTorch"),
        (lambda: layers.PathWeightedFFF(8, 2, 8), "one tree_path, then 3 times route_to and moe_l"),
        (lambda: layers.PointwiseMLP(8, "gelu"), "every call in PyTorch, 'gelu': backend='torch'"),
        (lambda: layers.PointwiseMLP(8, "glu", backend="fused"), "one gated_mlp, 'sigmoid'"),
        (lambda: layers.PointwiseMLP(8, "silu", nn.Dropout(0.5), backend="fused"),
         "linear_act, 'silu', then Dropout and a linear in PyTorch"),
        (lambda: layers.SwiGLUMLP(8), "one gated_mlp, 'silu'"),
        (lambda: layers.ReluSquaredMLP(8), "one mlp, 'relu_sq'"),
        (lambda: layers.Top1MoE(8, 8, 2), "top1_route, one moe_mlp, 'silu'"),
        (lambda: layers.TopKMoE(8, 8, 4, 2), "topk_route, one moe_mlp, 'silu'"),
        (lambda: layers.BinaryGatedMLP(128, 128), "the layer (BinaryGatedMLP): one gated_mlp, "),
        (packed, "the layer (BinaryGatedMLP): one binary_gated_mlp, 'silu'"),
        (packed, "gate_proj (BinaryLinear): packed weight"),
    ],
)  # fmt: skip
def test_explain_says_which_calls_are_fused(layer, text):
    assert text in explained(layer())


CALLS = ("gated_mlp", "gated_linear", "mlp", "linear_act", "masked_gated_mlp",
         "masked_gated_linear")  # fmt: skip


ELEMENT = ({"glu_variant": "mswiglu", "mask_mode": "element"},
           {"glu_variant": "mglu", "mask_mode": "element", "num_masks": 4})  # fmt: skip
PLAIN = ({}, {"activation": Stranger}, {"glu_variant": "swiglu"}, {"glu_variant": "mswiglu"})


@pytest.mark.parametrize("dropout", (0.0, 0.5))
@pytest.mark.parametrize(
    "options, frozen, hook",
    [
        *((options, False, hook) for options in PLAIN for hook in ("", "net.0")),
        *((options, frozen, "") for options in ELEMENT for frozen in (False, True)),
    ],
    ids=str,
)
def test_explain_names_the_call_that_a_block_makes(options, frozen, dropout, hook, monkeypatch):
    """As it is now: frozen or not, with dropout at work or not, with hooks."""
    layer = layers.FeedForward(8, 2, dropout, **options)
    if frozen:
        fusedmlp.freeze_masks(layer)
    if hook:
        layer.get_submodule(hook).register_forward_hook(lambda *_: None)
    (line,) = [s for s in explained(layer).splitlines() if s.startswith("the layer (FeedForward)")]
    called = []

    def spied(module, name):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: called.append(name) or own(*a, **k))

    for module in (block, masked_glu):
        for name in CALLS:
            if hasattr(module, name):
                spied(module, name)
    layer(draw(3, 8))
    assert re.findall(rf"\b({'|'.join(CALLS)})\b", line) == called[:1], line
    if "mask_mode" in options:
        count = options.get("num_masks", 1)
        kind = "frozen bits" if frozen else "logits"
        assert f"{count} mask{'s' if count > 1 else ''} of {kind}" in line


HOLDERS = {
    "FeedForward": lambda: layers.FeedForward(8, **ELEMENT[0]),
    "SwitchFFN": lambda: layers.SwitchFFN(8, 2, ff_kwargs=ELEMENT[0]),
    "ResidualWrapper": lambda: layers.ResidualWrapper(layers.FeedForward(8, **ELEMENT[0])),
    "NGPT": lambda: layers.NGPT(8, layers.FeedForward(8, **ELEMENT[0])),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_layer_that_holds_masks_freezes_them(name):
    layer = HOLDERS[name]().eval()
    x = draw(3, 8)
    y = one(layer(x))
    assert layer.freeze_masks()
    assert "frozen bits" in explained(layer)
    assert torch.equal(one(layer(x)), y)


def test_a_layer_without_masks_says_what_to_freeze():
    wanted = r"^freeze_masks: model must have a masked layer with mask_mode='element', got none in"
    for layer in (layers.FeedForward(8), layers.SwitchFFN(8, 2), layers.NGPT(8)):
        with pytest.raises(RuntimeError, match=wanted):
            layer.freeze_masks()


def test_explain_says_what_masks_of_experts_are():
    made = layers.SwitchFFN(8, 2, ff_kwargs={"glu_variant": "mswiglu", "mask_mode": "element"})
    assert "each: one masked_gated_mlp, 'silu', 1 mask of logits" in explained(made)
    fusedmlp.freeze_masks(made)
    assert "each: one masked_gated_mlp, 'silu', 1 mask of frozen bits" in explained(made)


@pytest.mark.parametrize("layer", ("x", layers.SwiGLU))
def test_explain_wants_a_layer(layer):
    wanted = r"^explain: layer must be an nn\.Module or None, or a function of fusedmlp, got "
    with pytest.raises(TypeError, match=wanted):
        fusedmlp.explain(layer)


def test_explain_passes_over_another_packages_path():
    class Tree(nn.Identity):
        def path(self, x):
            return x

    foreign = nn.Identity()
    foreign.path = "weights.bin"
    assert explained(foreign) == explained(Tree()) == ""


def test_explain_lists_every_op():
    ops = {name for name in fusedmlp.__all__ if _is_op(getattr(fusedmlp, name))} | {"pack_masks"}
    (line,) = [s for s in fusedmlp.explain().splitlines() if s.startswith("ops: ")]
    beside = {"jitter", "load_balancing_loss", "router_z_loss", "update_router_bias"}
    assert ops - beside == set(line[5:].split(", "))


def _is_op(found):
    return inspect.isfunction(found) and found.__module__.startswith("fusedmlp.ops.")


# --- repr()

# What a layer and the modules inside it say of themselves; they are silent where nothing stands.
WORDS = {
    "GLU": "GLU(Sigmoid fused as 'sigmoid')",
    "Bilinear": "Bilinear(Identity fused as 'identity')",
    "ReGLU": "ReGLU(ReLU fused as 'relu')",
    "SwiGLU": "SwiGLU(SiLU fused as 'silu')",
    "GeGLU": "GeGLU(GELU fused as 'gelu')",
    "FeedForward": "FeedForward(GELU fused as 'gelu')",
    "FeedForward gated": "SwiGLU(SiLU fused as 'silu')",
    "FeedForward unknown": "FeedForward(Stranger in PyTorch)",
    "MLP": "FusedSequential(runs Linear, RMSNorm, GELU, Dropout, Linear, RMSNorm)",
    "MLP pre": "FusedSequential(runs RMSNorm, Linear, PReLU, Dropout, Linear, RMSNorm)",
    "GatingMechanism": "FusedSequential(runs Linear, RMSNorm, GELU, Dropout, Linear + Sigmoid)",
    "ResidualWrapper": "FeedForward(GELU fused as 'gelu')",
    "NGPT": f"NGPT(paper=False) L2Norm(dim=-1, norm_eps=0.0) Scale({D}, init=0.5, scale={D**-0.5})",
    "NGPT all": "NGPT(paper=True) L2Norm(dim=-1, norm_eps=0.1) Scale(85, init=1.0, scale=1.0) "
    f"Scale(85, init={D**0.5}, scale=1.0) Scale(1, init=0.05, scale=1.0)",
    "L2Norm": "L2Norm(dim=-1, norm_eps=0.0)",
    "GMLP": "GMLP(seq_len=4, drop_path=0.0) SpatialGatingUnit(canonical_gate=False) "
    "SpatialGatingUnit(canonical_gate=False)",
    "GMLP all": "GMLP(seq_len=4, drop_path=0.5) SpatialGatingUnit(canonical_gate=True)",
    "PointwiseMLP": "PointwiseMLP(activation='swiglu', backend='torch')",
    "FastFeedForward all": "SwiGLU(SiLU fused as 'silu')",
    "Top1MoE": "Top1MoE(1 of 2 experts: top1_route, one moe_mlp, 'silu', and one gated_mlp for the "
    "shared expert)",
    "TopKMoE": "TopKMoE(2 of 4 experts: topk_route, one moe_mlp, 'silu')",
    "TopKMoE all": "TopKMoE(2 of 4 experts: topk_route, one moe_mlp, 'swiglu_oai(limit=1.0)', and "
    "one gated_mlp for the shared expert)",
    "BinaryLinear": f"BinaryLinear(in_features={D}, out_features={D}, bias=True, packed=False)",
    "BinaryGatedMLP": "BinaryGatedMLP(activation='silu')"
    + f" BinaryLinear(in_features={D}, out_features=128, bias=False, packed=False)" * 2
    + f" BinaryLinear(in_features=128, out_features={D}, bias=False, packed=False)",
}
# The same of options that no layer of MAKERS has.
OPTIONS = {
    "PointwiseMLP(activation='glu', backend='fused', glu_order='torch')":
        lambda: layers.PointwiseMLP(D, "glu", backend="fused", glu_order="torch"),
    "PointwiseMLP(activation='glu', backend='torch', glu_order='gate_first')":
        lambda: layers.PointwiseMLP(D, "glu"),
    "PointwiseMLP(activation='glu', backend='fused', glu_order='gate_first', recompute=True)":
        lambda: layers.PointwiseMLP(D, "glu", backend="fused", recompute=True),
    "BinaryLinear(in_features=128, out_features=8, bias=False, packed=True) "
    "BinaryWeight(H=8, D=128)": lambda: layers.BinaryLinear(128, 8).pack(),
    "GLUBase(Stranger in PyTorch)": lambda: GLUBase(D, D, Stranger()),
    "L2Norm(dim=1, norm_eps=0.25)": lambda: layers.L2Norm(1, 0.25),
}  # fmt: skip


def words(layer):
    own = [m for m in layer.modules() if type(m).__module__.startswith("fusedmlp")]
    said = [(type(m).__name__, m.extra_repr()) for m in own]
    # test_layers_widths.py is about these.
    return " ".join(
        f"{name}({text})" for name, text in said if text and "multiple of 8" not in text
    )


@pytest.mark.parametrize("name", MAKERS)
def test_repr_says_what_a_layer_is(name):
    assert words(MAKERS[name]()) == WORDS.get(name, "")


@pytest.mark.parametrize("expected", OPTIONS)
def test_repr_says_which_options_it_has(expected):
    assert words(OPTIONS[expected]()) == expected


# --- names


NAMES = {
    "activations": "ReluSquared Gelu2 BSiLU NeLU Sugar StraightThroughEstimator ReluNelu SugarReLU",
    "layers": "FastFeedForward FeedForward GatingMechanism GLU MGLU Bilinear BilinearMGLU GeGLU "
    "GeMGLU ReGLU ReMGLU SwiGLU SwiMGLU GMLP MLP NGPT PathWeightedFFF ResidualWrapper SwitchFFN",
    "layers.feedforward": "FeedForward",
    "layers.gating": "GatingMechanism",
    "layers.glu": "GLU Bilinear ReGLU SwiGLU GeGLU MGLU BilinearMGLU ReMGLU SwiMGLU GeMGLU",
    "layers.mlp": "MLP",
    "layers.gmlp": "GMLP GMLPBlock SpatialGatingUnit",
    "layers.ngpt": "NGPT Scale SwiGLU L2Norm NormLinear",
    "layers.residual": "ResidualWrapper",
    "layers.init_weights": "initialize_weights apply_initialization create_initializer",
    "layers.pointwise": "PointwiseMLP MLP",
    "layers.transformer": "SwiGLUMLP ReluSquaredMLP GELUMLP SiLUMLP",
}
TOP_LEVEL = NAMES["layers"] + " " + NAMES["activations"] + " L2Norm GELU ReLU Sigmoid SiLU"


@pytest.mark.parametrize("module", NAMES)
def test_names_of_mlp_utils(module):
    found = importlib.import_module(f"fusedmlp.{module}")
    for name in NAMES[module].split():
        assert getattr(found, name).__name__ in (name, "PointwiseMLP")


def test_names_at_the_top():
    for name in TOP_LEVEL.split():
        assert name in fusedmlp.__all__ and getattr(fusedmlp, name) is not None
