"""The hidden width of every layer, its biases, what keeps it off fast loads; and recompute."""

import inspect
import pickle
import re

import layer_makers
import pytest
import torch
from layer_checks import Stranger, draw, one, randomise_
from layer_makers import MAKERS, D
from torch import nn

import fusedmlp
from fusedmlp import layers
from fusedmlp.layers import ngpt
from fusedmlp.layers.parts.widths import Default, off_fast_loads

# layer -> (its factor's name, the width at D = 32 and a factor of 1.7).
SCALED = {
    layers.FeedForward: ("mult", 54),
    layers.MLP: ("hidden_factor", 54),
    layers.PointwiseMLP: ("expansion_factor", 54),
    layers.FastFeedForward: ("mult", 54),
    layers.GatingMechanism: ("bottleneck_factor", 54),
    ngpt.SwiGLU: ("mult", 36),
}
NEEDED = {
    layers.PointwiseMLP: {"activation": "gelu", "backend": "fused"},
    layers.FastFeedForward: {"depth": 1},
}


def width_of(layer):
    """Columns of the last matrix, which takes what lies between the projections."""
    named = layer.named_parameters()
    return [p for n, p in named if p.dim() > 1 and not n.endswith("bias")][-1].shape[-1]


def test_every_layer_that_scales_a_width_is_here():
    factors = {"mult", "hidden_factor", "expansion_factor", "bottleneck_factor"}
    takers = {
        cls
        for cls in (*(getattr(layers, name) for name in layers.__all__), ngpt.SwiGLU)
        if factors & inspect.signature(cls).parameters.keys()
    }
    assert takers == SCALED.keys()


@pytest.mark.parametrize("cls", SCALED, ids=lambda cls: cls.__name__)
def test_a_width_is_rounded_up_or_given(cls):
    factor, width = SCALED[cls]
    make = lambda **options: cls(D, **NEEDED.get(cls, {}), **options)  # noqa: E731
    assert width_of(make(**{factor: 1.7})) == width
    assert width_of(make(**{factor: 1.7}, multiple_of=8)) == -(-width // 8) * 8
    assert width_of(make(**{factor: 1.7}, multiple_of=1)) == width
    for bad, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"{cls.__name__}|FeedForward: multiple_of must be "):
            make(**{factor: 1.7}, multiple_of=bad)
    own = "bottleneck_dim" if cls is layers.GatingMechanism else "hidden"
    assert width_of(make(**{own: 48})) == 48
    with pytest.raises(ValueError, match=f"{own} and multiple_of must not be given together"):
        make(**{own: 48}, multiple_of=8)
    if own == "hidden":
        # At its default too: who writes both cannot mean both.
        for value in (1.7, float(inspect.signature(cls).parameters[factor].default)):
            with pytest.raises(ValueError, match=f"hidden and {factor} must not be given together"):
                make(**{factor: value}, hidden=48)
        with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
            make(hidden=0)


@pytest.mark.parametrize("cls", [layers.SwiGLUMLP, layers.GELUMLP], ids=lambda cls: cls.__name__)
def test_a_transformers_width_is_given(cls):
    assert cls(D, hidden=48).c_proj.weight.shape == (D, 48)
    with pytest.raises(TypeError, match=f"{cls.__name__}: hidden must be an int, got 4.5"):
        cls(D, hidden=4.5)


def test_the_default_net_of_ngpt():
    assert width_of(layers.NGPT(D)) == 85
    assert width_of(layers.NGPT(D, multiple_of=64)) == 128
    assert width_of(layers.NGPT(D, hidden=96)) == 96
    with pytest.raises(ValueError, match="NGPT: hidden, multiple_of and recompute must be left al"):
        layers.NGPT(D, nn.Linear(D, D), hidden=96)


def test_a_default_is_a_number_like_another():
    for value in (4, 2.0):
        default = Default(value)
        assert default == value and repr(default) == repr(value)
        assert isinstance(pickle.loads(pickle.dumps(default)), Default)


# ---- biases

# A layer with biases by default -> how many are left without: what is no projection's own.
WITHOUT = {
    "FeedForward": 0, "FeedForward gated": 0, "FeedForward masked": 0, "MLP": 0,
    "GatingMechanism": 0, "FastFeedForward": 1, "PathWeightedFFF": 0, "GMLP": 2,
}  # fmt: skip
BIASES = re.compile(r"(^|[._])(bias|b\d?s|b_\w+)$")


def biases(layer):
    """Those of matrices; a norm's and an activation's are none."""
    norms = (nn.LayerNorm, nn.PReLU)
    inside = {id(p) for m in layer.modules() if isinstance(m, norms) for p in m.parameters()}
    own = (n for n, p in layer.named_parameters() if id(p) not in inside)
    return [name for name in own if BIASES.search(name)]


@pytest.mark.parametrize("name", MAKERS)
def test_biases_can_be_left_out(name):
    layer = MAKERS[name]()
    if biases(layer) and not isinstance(layer, (layers.SwitchFFN, layers.ResidualWrapper)):
        assert "bias" in inspect.signature(type(layer)).parameters, name


@pytest.mark.parametrize("name", WITHOUT)
def test_without_biases(name, monkeypatch):
    cls = getattr(layers, name.split()[0])
    own = cls.__init__
    given = {"bias": False}
    monkeypatch.setattr(cls, "__init__", lambda self, *a, **o: own(self, *a, **{**o, **given}))
    layer = randomise_(MAKERS[name]())
    assert len(biases(layer)) == WITHOUT[name], biases(layer)
    x = draw(2, 4, D)
    one(layer(x)).sum().backward()
    other = MAKERS[name]()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(one(other.eval()(x)), one(layer.eval()(x)))
    layer.init_weights_()


def test_experts_without_biases():
    switch = layers.SwitchFFN(D, 2, ff_kwargs={"mult": 1, "bias": False})
    assert not biases(switch)
    switch(draw(8, D))[0].sum().backward()


# ---- what keeps a layer off fast loads


def slow(layer):
    return re.findall(r"(\w+ \d+) of \S+(?: and \d+ more)? is no multiple of 8", repr(layer))


@pytest.mark.parametrize("name", MAKERS)
def test_repr_and_explain_name_a_slow_width(name, monkeypatch):
    """A layer whose matrices a kernel reads names the width once, and any other layer never."""
    monkeypatch.setattr(layer_makers, "D", 44)
    layer = MAKERS[name]().eval()
    text = fusedmlp.explain(layer).removeprefix(fusedmlp.explain())
    read = re.search(r"fused as|one (masked_)?(gated_)?mlp|one moe_mlp|Linear \+ |moe_linear", text)
    assert ("width 44" in text) == bool(read), text
    assert slow(layer).count("width 44") == bool(read), repr(layer)


@pytest.mark.parametrize("name", MAKERS)
def test_fast_widths_are_not_named(name):
    if name not in ("NGPT", "NGPT all", "GLU"):  # NGPT's own are 8/3 of it
        assert not slow(MAKERS[name]()), name


def test_a_slow_width_in_repr():
    block = layers.FeedForward(64, mult=8 / 3, glu_variant="swiglu")
    assert slow(block) == ["width 170"]
    assert "; 176 would have vector or TMA loads" in repr(block)
    assert not slow(layers.FeedForward(64, mult=8 / 3, multiple_of=8, glu_variant="swiglu"))
    assert slow(layers.SwiGLU(64, 170)) == ["width 170"]
    assert not slow(layers.FeedForward(63, activation=Stranger))


def test_a_slow_stride():
    block = layers.SwiGLUMLP(64)
    block.c_up.weight = nn.Parameter(torch.randn(192, 68)[:, :64])
    line = "stride 68 of c_up.weight is no multiple of 8: in 16 bits kernels take element loads"
    assert line in repr(block) and line in fusedmlp.explain(block)
    block.c_up.weight = nn.Parameter(torch.randn(192, 128)[:, ::2])
    assert "layout of c_up.weight has no contiguous dimension" in repr(block)
    block.c_up.weight = nn.Parameter(torch.randn(64, 192).T)
    assert not slow(block)


def test_rows_of_one_matrix_have_no_stride():
    """Where there is one, it matters to nobody how far apart they are."""
    for rows, found in ((1, []), (2, ["stride 68 of w"]), (3, ["stride 68 of w"])):
        for size in (torch.empty(rows, 68)[:, :64], torch.empty(2, rows, 68)[..., :64].mT):
            (*lines,) = off_fast_loads([("w", size)])
            assert [line.partition(" is ")[0] for line in lines] == found


def test_names_of_one_width_are_counted():
    names = [("a", 12), ("b", 8), ("c", 12), ("d", 12), ("a", 12)]
    counted = {2: "width 12 of a", 3: "width 12 of a and 1 more", 5: "width 12 of a and 2 more"}
    for count, words in counted.items():
        (line,) = off_fast_loads(names[:count])
        assert line.startswith(f"{words} is no multiple of 8: in 16 bits")
        assert line.endswith("; 16 would have vector or TMA loads")


def test_the_report_names_a_slow_width():
    model = nn.Sequential(nn.Linear(64, 170), nn.GELU(), nn.Linear(170, 64))
    (entry,) = fusedmlp.patch(model).patched
    line = "width 170 of 2.weight is no multiple of 8"
    assert line in str(entry) and line in repr(model) and line in fusedmlp.explain(model)
    fast = nn.Sequential(nn.Linear(64, 176), nn.GELU(), nn.Linear(176, 64))
    assert "multiple of 8" not in str(fusedmlp.patch(fast)) + repr(fast)


# ---- recompute


def saved(layer, x):
    """Bytes that backward keeps of a call, parameters and x left out."""
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}
    note = lambda t: kept.update({t.untyped_storage().data_ptr(): t.nbytes}) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = one(layer(x))
    return sum(n for at, n in kept.items() if at not in own), y


# Layers that may save x alone, with what makes the block one call.
SPARING = {
    "FeedForward": lambda r: layers.FeedForward(D, recompute=r),
    "FeedForward gated": lambda r: layers.FeedForward(D, glu_variant="swiglu", recompute=r),
    "FeedForward masked": lambda r: layers.FeedForward(
        D, glu_variant="mswiglu", mask_mode="element", recompute=r),
    "MLP": lambda r: layers.MLP(D, norm_mode="none", dropout=0.0, recompute=r),
    "GatingMechanism": lambda r: layers.GatingMechanism(
        D, bottleneck_dim=64, use_norm=False, dropout=0.0, recompute=r),
    "PointwiseMLP": lambda r: layers.PointwiseMLP(D, "swiglu", backend="fused", recompute=r),
    "PointwiseMLP plain": lambda r: layers.PointwiseMLP(D, "gelu", backend="fused", recompute=r),
    "NGPT": lambda r: layers.NGPT(D, recompute=r),
    **{name: lambda r, name=name: getattr(layers, name)(D, recompute=r)
       for name in ("SwiGLUMLP", "ReluSquaredMLP", "GELUMLP", "SiLUMLP")},
    "TopKMoE": lambda r: layers.TopKMoE(D, 64, 4, 2, recompute=r),
    "Top1MoE": lambda r: layers.Top1MoE(D, 64, 4, recompute=r),
    "SwitchFFN": lambda r: layers.SwitchFFN(D, 2, ff_kwargs={"recompute": r}),
    "FastFeedForward": lambda r: layers.FastFeedForward(
        D, 1, recompute=r, soft_routing_during_train=False),
    "BinaryGatedMLP": lambda r: layers.BinaryGatedMLP(128, 256, recompute=r),
}  # fmt: skip


def test_every_layer_with_a_block_can_recompute():
    """A layer whose call reaches an op that takes `recompute` takes it, or an argument for it."""
    blocks = r"one (masked_)?gated_mlp|one mlp|one moe_mlp|experts in one call|\+ Linear"
    for name, make in MAKERS.items():
        layer, kind = make().eval(), name.split()[0]
        fused = re.search(blocks, fusedmlp.explain(layer))
        if fused and kind not in ("ResidualWrapper", "SwitchFFN"):
            assert "recompute" in inspect.signature(type(layer)).parameters, name
    takers = {name.split()[0] for name in SPARING} - {"SwitchFFN"}
    assert takers == {
        name for name in layers.__all__
        if "recompute" in inspect.signature(getattr(layers, name)).parameters
    }  # fmt: skip


@pytest.mark.parametrize("name", SPARING)
def test_recompute_saves_less_and_changes_no_number(name):
    plain, sparing = SPARING[name](False), SPARING[name](True)
    assert "recompute" not in repr(plain) and "recompute=True" in repr(sparing)
    randomise_(plain)
    sparing.load_state_dict(plain.state_dict())
    assert "recompute=True" in repr(pickle.loads(pickle.dumps(sparing)))
    width = 128 if name == "BinaryGatedMLP" else D
    results = []
    for layer in (plain, sparing):
        x = draw(16, width).requires_grad_()
        count, y = saved(layer, x)
        grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()], allow_unused=True)
        results.append((count, y, *(g for g in grads if g is not None)))
    (more, *expected), (less, *ours) = results
    assert less < more
    for a, b in zip(expected, ours, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.FeedForward(D, activation=Stranger, recompute=True),
        lambda: layers.FeedForward(D, glu_variant="mswiglu", recompute=True),
        lambda: layers.MLP(D, norm_mode="post", recompute=True),
        lambda: layers.MLP(D, norm_mode="none", act_fn=Stranger, recompute=True),
        lambda: layers.GatingMechanism(D, bottleneck_dim=8, recompute=True),
        lambda: layers.PointwiseMLP(D, "gelu", recompute=True),
    ],
)
def test_recompute_is_refused_where_nothing_is_fused(make):
    with pytest.raises(ValueError, match="recompute must be False where .* got True; "):
        make()


def test_the_report_says_how_many_bytes_are_spared():
    make = lambda: layers.SwiGLUMLP(64, hidden=192)  # noqa: E731

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(64, 192), nn.Linear(64, 192)
            self.down = nn.Linear(192, 64)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    model = nn.Sequential(Block(), Block()).bfloat16()
    report = fusedmlp.patch(model, recompute=True)
    assert [entry.spared for entry in report.patched] == [2 * 192 * 2] * 2
    assert "; 1,536 bytes a token less are saved for backward" in str(report)
    assert "2 H values a token less (768 bytes)" in str(report)
    assert "bytes" not in str(fusedmlp.patch(nn.Sequential(Block())))
    assert "recompute" not in repr(make())
