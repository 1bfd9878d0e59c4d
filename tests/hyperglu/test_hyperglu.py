"""HyperGLU: the layer's formula, options, checkpoints' names, causality, memory, errors."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hyper_checks import by_loops, config, perturbed
from layer_checks import assert_compiles, assert_initialises_from_meta, assert_round_trips, draw

from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig, HyperMLP
from fusedmlp.testing import assert_close_to


def layer_by_hand(layer, x, mask=None):
    """The steps of the module's docstring, with the core as loops."""
    c, p = layer.config, dict(layer.named_parameters())
    phi = torch.sigmoid if c.gate_act == "sigmoid" else lambda t: t
    B, T, D = x.shape

    def linear(name, t):
        return F.linear(t, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def conv(name, t):
        if not c.use_kv_conv:
            return t
        w, K = p[f"{name}.conv.weight"][:, 0], c.conv_kernel_size
        rows = [sum(w[:, j] * t[:, i - (K - 1) + j] for j in range(K) if i - (K - 1) + j >= 0)
                for i in range(T)]  # fmt: skip
        return torch.stack(rows, 1)

    def heads(t, n):
        return t.view(B, T, n, -1).transpose(1, 2)

    Q, H = c.sub_heads, c.n_head
    q, k = heads(linear("q", x), Q), heads(linear("k", conv("conv1", x)), Q)
    v = heads(linear("v", conv("conv2", x)), H)
    if c.use_qk_gate:
        q = q * heads(phi(linear("left_gate", x)), Q)
    if mask is not None:
        k, v = k * mask[:, None, :, None], v * mask[:, None, :, None]
    mixings = {}
    for n, op, use, count in ((1, "op", c.use_op1, Q), (2, "op2", c.use_op2, H)):
        mixings[f"c{n}"] = heads(phi(linear(f"control{n}", x)), count) if use else None
        for ours, theirs in (("u", "U"), ("vt", "Vt"), ("d", "d")):
            mixings[f"{ours}{n}"] = p.get(f"{op}.mix.{theirs}")
    core = by_loops(
        q, k, v, **mixings, kind=c.attn_kind, norm=c.attn_norm, aligner=c.aligner_kind,
        causal=c.do_masking, shortcut1=c.op1_shortcut, shortcut2=c.op2_shortcut,
        mask1=c.op1_do_masking, mask2=c.op2_do_masking, eps=c.norm_eps,
    )  # fmt: skip
    core = core.transpose(1, 2).reshape(B, T, -1)
    if c.use_vo_gate:
        core = core * phi(linear("right_gate", x))
    return linear("c_proj", core)


OPTIONS = [
    {},
    {"attn_kind": "relu", "bias": True},
    {"attn_norm": "l2", "use_kv_conv": False, "use_qk_gate": False},
    {"attn_norm": "none", "gate_act": "none", "use_vo_gate": False},
    {"aligner_kind": "identity"},
    {"aligner_kind": "identity", "do_masking": False},
    {"op1_do_masking": False},
    {"use_op1": False, "op2_use_diag": False, "op2_shortcut": False},
    {"use_op2": False, "op1_use_diag": False},
    {"n_head": 1},
    {"impl_default": "dense"},
    {"conv_kernel_size": 1, "op2_do_masking": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_by_hand(options):
    layer = perturbed(**options)
    x = draw(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer_by_hand(layer, x))


@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[4:5], ids=str)
def test_attention_mask(options):
    layer = perturbed(**options)
    x, mask = draw(2, 11, 24, dtype=torch.float64), torch.ones(2, 11)
    mask[0, :4] = mask[1, 6:9] = 0
    torch.testing.assert_close(layer(x, mask), layer_by_hand(layer, x, mask))
    torch.testing.assert_close(layer(x, mask.bool()), layer(x, mask))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense_and_chunked_agree(options):
    x = draw(2, 19, 24, dtype=torch.float64)
    for chunk in (1, 5, 19, 64):
        layer = perturbed(**{**options, "chunk_T": chunk, "impl_default": "chunked"})
        other = perturbed(**{**options, "impl_default": "dense"})
        torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize("T", (1, 2, 12, 13))
def test_lengths(T):
    layer = perturbed(block_size=13)
    x = draw(1, T, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer_by_hand(layer, x))


SWITCHES = ("do_masking", "use_op1", "use_op2", "op1_do_masking")


@pytest.mark.filterwarnings("ignore:HyperGLUConfig")
@pytest.mark.parametrize("aligner", ("offset", "identity"))
def test_a_prefix_is_kept_by_every_setting_that_says_so(aligner):
    x = draw(1, 9, 24, dtype=torch.float64)
    for on in itertools.product((True, False), repeat=len(SWITCHES)):
        layer = perturbed(aligner_kind=aligner, **dict(zip(SWITCHES, on, strict=True)))
        same = torch.allclose(layer(x[:, :5]), layer(x)[:, :5])
        assert same == layer.config.prefix_consistent, on


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefix_and_future(options):
    """Cutting the input leaves earlier results alone exactly where the configuration says so."""
    layer = perturbed(**options)
    x = draw(1, 17, 24, dtype=torch.float64)
    y = layer(x)
    same = all(torch.allclose(layer(x[:, :n]), y[:, :n]) for n in (1, 9, 16))
    assert same == layer.config.prefix_consistent
    if not options.get("do_masking", True) and options["aligner_kind"] == "identity":
        return
    changed = x.clone()
    changed[:, 9:] += 1
    torch.testing.assert_close(layer(changed)[:, :9], y[:, :9])


LEAKS = (
    {"op2_do_masking": False},
    {"use_op1": False, "op2_do_masking": False},
    {"use_op2": False, "op1_do_masking": False},
)


@pytest.mark.parametrize("options", LEAKS, ids=str)
def test_the_last_unmasked_mixing_leaks_with_identity_and_warns(options):
    name = next(name for name in options if name.endswith("do_masking"))
    with pytest.warns(UserWarning, match=f"{name}=False .* see later tokens") as caught:
        layer = perturbed(aligner_kind="identity", **options)
    assert caught[0].filename.endswith("hyper_checks.py")  # who wrote the configuration
    x = draw(1, 17, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 9:] += 1
    assert not torch.allclose(layer(changed)[:, :9], layer(x)[:, :9])


@pytest.mark.parametrize("options", (
    {"op1_do_masking": False}, {"do_masking": False, "op2_do_masking": False},
    {"aligner_kind": "offset", "op2_do_masking": False},
    {"use_op1": False, "use_op2": False, "op1_do_masking": False, "op2_do_masking": False},
), ids=str)  # fmt: skip
def test_no_warning_without_a_leak(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(**{"aligner_kind": "identity", **options})


def test_offset_without_masking_warns():
    with pytest.warns(UserWarning, match="causal all the same"):
        config(do_masking=False)


def test_slots_of_lags_that_never_occur_get_no_gradient():
    layer = perturbed()
    layer(draw(2, 11, 24, dtype=torch.float64)).square().sum().backward()
    unused = layer.config.block_size - 11
    for op in (layer.op.mix, layer.op2.mix):
        for grad in (op.U.grad, op.Vt.grad.mT, op.d.grad[..., None]):
            assert not grad[:, :unused].any()
            assert grad[:, unused:].abs().amin((0, 2)).gt(0).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("norm", ("out_scale", "l2"))
def test_rows_of_zeros(norm, dtype):
    """norm_eps is 0 in float16: the norm must be taken wider."""
    layer = perturbed(dtype=dtype, attn_norm=norm, bias=False)
    x = draw(1, 9, 24, dtype=dtype)
    x[:, :5] = 0
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and not y[:, 0].any()
    assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_layer_in_every_dtype(dtype):
    exact, eager, ours = (
        perturbed(dtype=d, impl_default=impl, std=0.1)
        for d, impl in ((torch.float64, "dense"), (dtype, "dense"), (dtype, "chunked"))
    )
    exact.load_state_dict({k: t.double() for k, t in ours.state_dict().items()})
    eager.load_state_dict(ours.state_dict())
    x = draw(2, 21, 24, dtype=dtype)
    assert_close_to(ours(x), exact(x.double()), eager(x))


def test_names_shapes_and_count_of_published_checkpoints():
    with torch.device("meta"):
        layer = HyperGLU(HyperGLUConfig(n_embd=1024, n_head=2, block_size=4096))
    shapes = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    assert shapes == {
        "q.weight": (256, 1024), "k.weight": (256, 1024), "v.weight": (1024, 1024),
        "c_proj.weight": (1024, 1024), "left_gate.weight": (256, 1024), "left_gate.bias": (256,),
        "right_gate.weight": (1024, 1024), "right_gate.bias": (1024,),
        "control1.weight": (64, 1024), "control1.bias": (64,),
        "control2.weight": (32, 1024), "control2.bias": (32,),
        "conv1.conv.weight": (1024, 1, 4), "conv2.conv.weight": (1024, 1, 4),
        "op.mix.U": (4, 4096, 16), "op.mix.Vt": (4, 16, 4096), "op.mix.d": (4, 4096),
        "op2.mix.U": (2, 4096, 16), "op2.mix.Vt": (2, 16, 4096), "op2.mix.d": (2, 4096),
    }  # fmt: skip
    assert sum(p.numel() for p in layer.parameters()) == 4_851_040
    bare = HyperGLU(config(use_op1=False, op2_use_diag=False, use_kv_conv=False, bias=True,
                           use_qk_gate=False, use_vo_gate=False))  # fmt: skip
    projections = {f"{n}.{w}" for n in ("q", "k", "v", "c_proj") for w in ("weight", "bias")}
    more = {"control2.weight", "control2.bias", "op2.mix.U", "op2.mix.Vt"}
    assert set(bare.state_dict()) == projections | more


def test_initial_values():
    torch.manual_seed(0)
    layer = HyperGLU(HyperGLUConfig(n_embd=128, n_head=2, block_size=256, op2_init_std=0.5))
    for name, std in (("op.mix.U", 0.02), ("op.mix.Vt", 0.02), ("op2.mix.U", 0.5),
                      ("conv1.conv.weight", 0.02), ("q.weight", 128**-0.5 / 3**0.5),
                      ("control1.bias", 128**-0.5 / 3**0.5)):  # fmt: skip
        assert layer.get_parameter(name).std().item() == pytest.approx(std, rel=0.2), name
    assert not layer.op.mix.d.any() and not layer.op2.mix.d.any()


def test_round_trips_meta_and_compile():
    assert_round_trips(perturbed(dtype=torch.float32), HyperGLU(config()), draw(2, 9, 24))
    big = {"n_embd": 64, "qk_rank": 64, "vo_rank": 64, "block_size": 64,
           "op1_rank": 64, "op2_rank": 64}  # fmt: skip
    assert_initialises_from_meta(lambda: HyperGLU(config(**big, op1_init_std=0.5)))
    assert_compiles(perturbed(chunk_T=4), draw(1, 4, 24, dtype=torch.float64))


def test_autocast_on_the_cpu():
    layer = perturbed(dtype=torch.float32)
    x = draw(2, 9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)


def saved_bytes(layer, x):
    """Bytes that autograd keeps of one forward, each storage once, parameters left out."""
    ours = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x.requires_grad_())
    return sum(kept.values())


def test_chunked_keeps_no_square():
    """Twice the length: dense keeps near four times as much, chunked at most twice (and less)."""

    def kept(impl, T):
        options = {"impl_default": impl, "block_size": 512, "chunk_T": 32}
        return saved_bytes(perturbed(dtype=torch.float32, **options), draw(1, T, 24))

    assert kept("dense", 512) > 3.5 * kept("dense", 256)
    assert kept("chunked", 512) < 2.05 * kept("chunked", 256)
    assert kept("chunked", 512) < kept("dense", 512) / 10


def test_quick_start():
    """Seed 003's call, but for its sizes."""
    cfg = HyperGLUConfig(
        n_embd=64, n_head=8, block_size=64, bias=False, attn_kind="glu", attn_norm="out_scale",
        qk_rank=None, vo_rank=None, do_masking=True, aligner_kind="offset", use_kv_conv=True,
        conv_kernel_size=4, use_rope=False, rope_base=10000.0, gate_act="sigmoid",
        use_qk_gate=True, use_vo_gate=True, use_op1=True, op1_rank=16, op1_per_head=True,
        op1_use_diag=True, op1_shortcut=True, op1_do_masking=True, use_op2=True, op2_rank=16,
        op2_per_head=True, op2_use_diag=True, op2_shortcut=True, op2_do_masking=True,
        impl_default="chunked", chunk_T=1024, norm_eps=1e-12,
    )  # fmt: skip
    assert cfg == HyperGLUConfig(n_embd=64, n_head=8, block_size=64)
    assert (cfg.qk_rank, cfg.vo_rank) == (16, 64)
    layer = HyperGLU(cfg).to(dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert layer(torch.randn(2, 16, 64, dtype=torch.bfloat16)).shape == (2, 16, 64)


def test_hypermlp_is_the_relu_kind():
    layer = HyperMLP(64, block_size=32)
    assert layer.config == HyperGLUConfig(64, 2, 32, attn_kind="relu")
    assert layer.q.weight.shape == (16, 64) and layer.op.mix.U.shape == (2, 32, 16)


def test_flops():
    """The published estimator's terms, at exact causal area: 0.231 and 0.344 TF."""
    with torch.device("meta"):
        for heads, expected in ((2, 0.231), (16, 0.344)):
            layer = HyperGLU(HyperGLUConfig(1024, heads, 4096))
            assert layer.flops(4, 4096) / 1e12 == pytest.approx(expected, abs=6e-4)


BAD = [
    ({"n_head": 0}, ValueError, "n_head must be at least 1, got 0"),
    ({"n_embd": 24.0}, TypeError, "n_embd must be int, got 24.0"),
    ({"bias": 1}, TypeError, "bias must be bool, got 1"),
    ({"op1_rank": True}, TypeError, "op1_rank must be int, got True"),
    ({"qk_rank": "8"}, TypeError, "qk_rank must be int or None, got '8'"),
    ({"qk_rank": 22}, ValueError, "qk_rank must be a positive multiple of 2 n_head = 4, got 22"),
    ({"qk_rank": 23, "attn_kind": "relu"}, ValueError, "multiple of n_head = 2, got 23"),
    ({"vo_rank": 21}, ValueError, "vo_rank must be a positive multiple of n_head = 2, got 21"),
    ({"qk_rank": 12, "use_rope": True}, ValueError, "qk_rank must be an even multiple of 4"),
    ({"attn_kind": "gelu"}, ValueError, "attn_kind must be one of glu, relu, got 'gelu'"),
    ({"attn_norm": None}, ValueError, "attn_norm must be one of out_scale, l2, none, got None"),
    ({"aligner_kind": "left"}, ValueError, "aligner_kind must be one of offset, identity"),
    ({"aligner_impl_eval": "x"}, ValueError, "aligner_impl_eval must be one of padview"),
    ({"gate_act": "tanh"}, ValueError, "gate_act must be one of sigmoid, none"),
    ({"impl_default": "cuda"}, ValueError, "impl_default must be one of dense, chunked, fused"),
    ({"rope_kind": "x"}, ValueError, "rope_kind must be one of official, rotary"),
    ({"op1_per_head": False}, ValueError, "op1_per_head must be True"),
    ({"op2_per_head": False}, ValueError, "op2_per_head must be True"),
    ({"chunk_T": 0}, ValueError, "chunk_T must be at least 1"),
    ({"conv_kernel_size": 0}, ValueError, "conv_kernel_size must be at least 1"),
    ({"norm_eps": 0.0}, ValueError, "norm_eps must be above 0"),
    ({"op1_init_std": -1.0}, ValueError, "op1_init_std must be at least 0"),
    ({"impl_default": "fused", "aligner_kind": "identity"}, ValueError,
     "impl_default must not be 'fused' with aligner_kind='identity'"),
    ({"impl_default": "fused", "op1_do_masking": False}, ValueError, "with op1_do_masking=False"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", BAD, ids=lambda b: str(b)[:40])
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message) as caught:
        config(**options)
    assert str(caught.value).startswith("HyperGLUConfig: ")
