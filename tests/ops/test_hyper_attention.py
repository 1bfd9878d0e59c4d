"""The kernels of hyper_attention against its reference, beyond what every Case goes through."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from compiled import in_compiler
from hyper_checks import check, chunks_executed, core_inputs, perturbed
from layer_checks import draw
from op_checks import opcheck

import fusedmlp
from fusedmlp import hyper_attention
from fusedmlp.kernels.arch import arch_for
from fusedmlp.kernels.device import pretend
from fusedmlp.kernels.hyper import (
    backward as hyper_backward,
    chunks,
    gradients as hyper_gradients,
    hyper_attention as hyper_forward,
)
from fusedmlp.kernels.hyper.band import turned
from fusedmlp.ops import hyper_attention as op
from fusedmlp.testing import evaluate

SMALL = {"B": 1, "H": 1, "T": 37, "L": 40, "dq": 5, "dv": 6}


def only(inputs, *mixings, diag=True):
    """`inputs` with these mixings alone."""
    gone = [f"{x}{n}" for n in (1, 2) if n not in mixings for x in ("c", "u", "vt", "d")]
    gone += [] if diag else ["d1", "d2"]
    return {k: t for k, t in inputs.items() if k not in gone}


CALLS = [  # two tiles, or one
    ("glu", "out_scale", (1, 2), {}, 37),
    ("relu", "l2", (1, 2), {"shortcut1": False}, 37),
    ("relu", "none", (2,), {}, 9),
    ("glu", "out_scale", (1,), {}, 37),
    ("glu", "l2", (2,), {"shortcut2": False}, 9),
    ("relu", "out_scale", (), {}, 37),
]


@pytest.mark.parametrize("kind, norm, mixings, options, T", CALLS, ids=str)
def test_kinds_norms_and_switches(kind, norm, mixings, options, T, device, on_triton):
    inputs = core_inputs(**{**SMALL, "T": T}, kind=kind, dtype=torch.float32)
    inputs = {k: t.to(device) for k, t in only(inputs, *mixings, diag=not options).items()}
    check(inputs, kind=kind, norm=norm, **options)


@pytest.mark.parametrize(
    "kind, H, dtype", (("glu", 1, torch.bfloat16), ("relu", 2, torch.float16)), ids=str
)
def test_sixteen_bits(kind, H, dtype, device, on_triton):
    inputs = core_inputs(**{**SMALL, "H": H}, kind=kind, dtype=dtype)
    check({k: t.to(device) for k, t in inputs.items()}, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mixings", ((1, 2), (1,), (2,), ()), ids=str)
@pytest.mark.parametrize("norm", ("out_scale", "l2", "none"))
@pytest.mark.parametrize("kind", ("glu", "relu"))
def test_everything(kind, norm, mixings, dtype, device, on_triton):
    inputs = core_inputs(B=1, H=2, T=40, L=43, dq=17, dv=20, r1=18, r2=3, kind=kind, dtype=dtype)
    check({k: t.to(device) for k, t in only(inputs, *mixings).items()}, kind=kind, norm=norm)


@pytest.mark.parametrize("T, L", ((1, 1), (1, 5), (9, 9)))
def test_lengths(T, L, device, on_triton):
    inputs = core_inputs(**{**SMALL, "T": T, "L": L}, dtype=torch.float32)
    grads = check({k: t.to(device) for k, t in inputs.items()})
    for name in ("du1", "dd1", "du2", "dd2"):
        assert not grads[name][:, : L - T].any()  # lags that never occur
    for name in ("dvt1", "dvt2"):
        assert not grads[name][..., : L - T].any()


def test_wide_heads_and_large_ranks(device, on_triton):
    """More than one step of q's width, part of v's, and 16 ranks."""
    inputs = core_inputs(B=1, H=1, T=33, L=40, dq=20, dv=40, r1=20, r2=17, dtype=torch.float32)
    check({k: t.to(device) for k, t in inputs.items()})


@pytest.mark.parametrize("kind", ("glu", "relu"))
@pytest.mark.parametrize("norm", ("none", "out_scale"))
def test_scores_of_exactly_zero(kind, norm, device, on_triton):
    """Rows whose query is 0, of the gate alone or of both: relu'(0) = 0, and no division by 0."""
    inputs = core_inputs(**{**SMALL, "T": 9}, kind=kind, dtype=torch.float32)
    inputs["q"][:, :1, 2:5] = 0
    inputs["q"][:, :, 4] = 0
    check({k: t.to(device) for k, t in only(inputs, 2).items()}, kind=kind, norm=norm)


@pytest.mark.parametrize("heads, tiles", ((1, 1), (8, 3), (5, 4), (2, 9), (1, 40)))
@pytest.mark.parametrize("most", (1, 4, 8, 132))
def test_chunks_hold_every_row_once(heads, tiles, most):
    found = chunks.chunks_of(heads, tiles, most)
    places = [
        (head, row)
        for c in found
        for head in range(c.first, c.first + c.heads)
        for row in range(c.low, c.high)
    ]
    assert sorted(places) == [(h, j) for h in range(heads) for j in range(tiles)]
    whole = {(c.low, c.high) == (0, tiles) for c in found}
    assert whole == {tiles <= most or tiles == 1}
    # No more than `most` rows of the mean length, or a row where that is less.
    kept = max(sum(j + 1 for j in range(c.low, c.high)) * c.heads for c in found)
    assert kept <= max(tiles, most * (tiles + 1) / 2)


@pytest.mark.interpreter
@pytest.mark.parametrize("most", (1, 4, 6), ids=("rows", "a head", "two heads"))
def test_chunks_and_segments(most, on_triton, monkeypatch):
    """Backward by part of a head, by heads; and rows in segments of two tiles."""
    monkeypatch.setattr(hyper_gradients, "multiprocessors", lambda device: most)
    for module in (chunks, hyper_backward):
        monkeypatch.setattr(module, "SEGMENT", tl.constexpr(2))
    inputs = core_inputs(**{**SMALL, "H": 3, "T": 70, "L": 70}, dtype=torch.float32)
    check(inputs)


@pytest.mark.parametrize("most, T, chunks", ((3, 200, 8), (40, 1100, 1)), ids=("rows", "segments"))
def test_compiled_chunks_and_segments(most, T, chunks):
    """The same as Triton emits it: 4 row tiles of a head, one a chunk; 18 of two heads, the longest
    of which are two segments."""
    ran = in_compiler(chunks_executed, "sm_90", most, T)
    assert ran["backward.gate_kernel"] == ran["backward.scores_kernel"] == chunks


@pytest.mark.interpreter
def test_tiles_of_hopper(on_triton):
    """Two tiles of 64 rows, whose ranks are padded to more than the next power of 2."""
    inputs = core_inputs(**{**SMALL, "T": 70, "L": 70}, dtype=torch.bfloat16)
    with pretend(arch_for(90), 3):
        check(inputs)


@triton.jit
def _turns(out, work):
    for index in tl.range(tl.program_id(0), work, tl.num_programs(0)):
        tl.store(out + turned(index, work), tl.program_id(0))


@pytest.mark.interpreter
def test_rows_are_handed_out_in_turns(on_triton, monkeypatch):
    """Eight pieces to three blocks, and four row tiles to the two blocks of one multiprocessor."""
    taken = torch.full((8,), -1, dtype=torch.int32)
    _turns[(3,)](taken, 8)
    assert taken.tolist() == [0, 1, 2, 2, 1, 0, 0, 1]
    monkeypatch.setattr(hyper_forward, "multiprocessors", lambda device: 1)
    check(core_inputs(**{**SMALL, "T": 100, "L": 100}, kind="glu", dtype=torch.float32))


def test_batches_and_heads_stay_apart(device, on_triton):
    inputs = core_inputs(B=2, H=2, T=9, L=12, dtype=torch.float32)
    check({k: t.to(device) for k, t in inputs.items()})
    shared = [k for k in inputs if k[0] in "ud" or k[:2] == "vt"]
    whole = hyper_attention(**inputs)
    one = {k: t if k in shared else t[1] for k, t in inputs.items()}
    torch.testing.assert_close(hyper_attention(**one), whole[1], rtol=0, atol=0)


def test_strides_are_read_in_place(device, on_triton):
    """Heads beside each other as projections leave them, parameters transposed, dy of no stride."""
    inputs = core_inputs(**SMALL, dtype=torch.float32)

    def strided(name, t):
        if name in ("q", "k", "v", "c1", "c2"):
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        return t.mT.contiguous().mT if t.dim() == 3 else t.repeat_interleave(2, -1)[:, ::2]

    laid = {k: strided(k, t).to(device) for k, t in inputs.items()}
    check(laid, dy=torch.ones((), device=device).expand(inputs["v"].shape))


# What the gradient of one tensor alone launches.
DZ2 = ("dz2_kernel", "sum_kernel")
WEIGHTS = ("scores_kernel", "gate_kernel")
GATED = ("coefficient_kernel", *DZ2, *WEIGHTS, "sum_kernel")
MIXED = (*GATED, "slots_kernel")
ALONE = {
    "q": (*MIXED, "dq_kernel"), "k": (*MIXED, "columns_kernel"),
    "v": (*WEIGHTS, "slots_kernel", "columns_kernel"), "c1": GATED, "c2": DZ2,
    **dict.fromkeys(("u1", "vt1", "d1"), MIXED),
    **dict.fromkeys(("u2", "vt2", "d2"), (*DZ2, *WEIGHTS, "slots_kernel")),
}  # fmt: skip


def test_every_single_gradient(device, on_triton, launched):
    """Bit for bit what it is among all, and nothing is launched for the others."""
    inputs = core_inputs(**{**SMALL, "T": 9}, dtype=torch.float32)
    inputs = {k: t.to(device) for k, t in inputs.items()}
    dy = torch.randn_like(inputs["v"])
    full = evaluate(lambda t: hyper_attention(**t), inputs, dy)
    for name in inputs:
        before = len(launched)
        part = evaluate(lambda t: hyper_attention(**t), inputs, dy, (name,))
        torch.testing.assert_close(part[f"d{name}"], full[f"d{name}"], rtol=0, atol=0)
        names = ("_h1_kernel", "_out_kernel", *ALONE[name])
        assert tuple(launched[before:]) == names, name


def test_rows_of_zeros_and_a_clamped_norm(device, on_triton):
    inputs = core_inputs(**{**SMALL, "T": 9}, dtype=torch.float32)
    inputs["q"] = inputs["q"].clone()
    inputs["q"][:, :, 2:5] = 0
    grads = check({k: t.to(device) for k, t in inputs.items()})
    assert not grads["out"][:, :, 2:5].any()
    check({k: t.to(device) for k, t in inputs.items()}, eps=10.0)


def test_large_scores(device, on_triton):
    inputs = core_inputs(**{**SMALL, "T": 9}, dtype=torch.float32)
    check({k: (90 * t.sign() if k in "qk" else t).to(device) for k, t in inputs.items()})


@pytest.mark.parametrize("bad, T", ((float("nan"), 35), (float("inf"), 9)))
def test_bad_rows_stay_where_causality_puts_them(bad, T, device, on_triton):
    inputs = core_inputs(**{**SMALL, "T": T}, dtype=torch.float32)
    clean = hyper_attention(**inputs)
    # Not v: 0 times a NaN of the same tile is NaN, in PyTorch's dense product as here.
    for name in ("q", "k"):
        dirty = {**inputs, name: inputs[name].clone()}
        dirty[name][:, :, 7] = bad
        out = hyper_attention(**dirty)
        assert torch.equal(out[:, :, :7], clean[:, :, :7]), name
        assert not out[:, :, 7].isfinite().all(), name
        if name == "q":
            assert torch.equal(out[:, :, 8:], clean[:, :, 8:])


def test_result_is_saved_once_and_nothing_square(device, on_triton):
    """Beyond the arguments: out, h1, h2, n. Twice the length, twice the bytes."""

    def kept(T):
        inputs = core_inputs(**{**SMALL, "T": T}, dtype=torch.float32)
        leaves = {k: t.to(device).requires_grad_() for k, t in inputs.items()}
        ours = {t.data_ptr() for t in leaves.values()}
        found = {}

        def pack(t):
            if t.data_ptr() not in ours:
                found[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hyper_attention(**leaves)
        return sum(found.values())

    assert kept(9) == 4 * 9 * (6 + 2 * 3 + 2 + 1)
    assert kept(18) == 2 * kept(9)


def test_a_result_changed_in_place_is_refused(device, on_triton):
    inputs = core_inputs(**{**SMALL, "T": 5}, dtype=torch.float32)
    out = hyper_attention(**{k: t.requires_grad_() for k, t in inputs.items()})
    with pytest.raises(RuntimeError, match="modified inplace"):
        out.mul_(2).sum().backward()


@pytest.mark.parametrize("mixings", ((1, 2), ()), ids=str)
def test_opcheck(mixings, device):
    inputs = only(core_inputs(B=1, H=1, T=5, L=6, dtype=torch.float32), *mixings)
    tensors = [inputs[n].to(device) if n in inputs else None for n in op.NAMES]
    options = (True, True, True, 1e-12)
    utils = ("test_schema", "test_faketensor")
    opcheck(op.fwd, (*tensors, *options), test_utils=utils)
    out, h1, h2, n = op.fwd(*tensors, *options)
    wanted = [i % 3 != 2 for i in range(11)]
    opcheck(op.bwd, (out, out, *tensors, h1, h2, n, *options, wanted), test_utils=utils)


@pytest.mark.parametrize("options", ({}, {"attn_kind": "relu", "bias": True}), ids=str)
def test_layer_on_the_kernels(options, device, on_triton):
    """HyperGLU takes them by itself, and its gradients are the PyTorch path's."""
    layer = perturbed(dtype=torch.float32, std=0.1, **options).to(device)
    x = draw(1, 21, 24, device=device).requires_grad_()
    inputs = [x, *layer.parameters()]
    with fusedmlp.backend("reference"):
        expected = layer(x)
        grads = torch.autograd.grad(expected.sum(), inputs)
    calls = []
    original = op.fwd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "fwd", lambda *a: calls.append(a) or original(*a))
        y = layer(x)
        ours = torch.autograd.grad(y.sum(), inputs)
    assert len(calls) == 1
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_rare_options_run_in_pytorch(device, on_triton):
    layer = perturbed(dtype=torch.float32, aligner_kind="identity").to(device)
    x = draw(1, 9, 24, device=device)
    with fusedmlp.backend("reference"):
        expected = layer(x)
    assert torch.equal(layer(x), expected)


def test_compiles_to_one_graph(device, each_backend):
    """Where sizes are symbols in the kernels' case, which is the harder one."""
    torch._dynamo.reset()
    dynamic = each_backend == "triton"
    inputs = core_inputs(B=1, H=1, T=6, L=9, dtype=torch.float32)
    dy = torch.randn_like(inputs["v"])

    def run(leaves):
        return hyper_attention(**leaves)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = evaluate(run, inputs, dy)
    for key, t in evaluate(compiled, inputs, dy).items():
        torch.testing.assert_close(t, eager[key])


def test_autocast(device, each_backend):
    """Results in the autocast dtype, gradients in the parameters' own."""
    inputs = core_inputs(B=1, H=1, T=6, L=9, dtype=torch.float32)
    half = {k: t.bfloat16() for k, t in inputs.items()}
    dy = torch.randn_like(half["v"])

    def run(leaves):
        with torch.autocast(device, torch.bfloat16):
            return hyper_attention(**leaves)

    plain = evaluate(lambda t: hyper_attention(**t), half, dy)
    for key, t in evaluate(run, inputs, dy).items():
        assert t.dtype == (torch.bfloat16 if key == "out" else torch.float32)
        torch.testing.assert_close(t.bfloat16(), plain[key], rtol=0, atol=0)


def test_runs_are_bit_equal(device, on_triton):
    T = 9 if device == "cpu" else 37  # an interpreter has one order of its own
    inputs = core_inputs(**{**SMALL, "T": T}, kind="relu", dtype=torch.bfloat16)
    leaves = {k: t.to(device).requires_grad_() for k, t in inputs.items()}
    out = hyper_attention(**leaves, kind="relu")
    dy = torch.randn_like(out)
    first = torch.autograd.grad(out, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(out, list(leaves.values()), dy)
    assert torch.equal(out, hyper_attention(**leaves, kind="relu"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_comparison_can_fail(device, on_triton, monkeypatch):
    """A wrong order of lags, and a dropped gradient term, are seen."""
    inputs = core_inputs(**{**SMALL, "T": 9}, dtype=torch.float32)
    flipped = {**inputs, "u2": inputs["u2"].flip(1)}
    fwd = op.fwd
    with monkeypatch.context() as patch:
        patch.setattr(op, "fwd", lambda *a: fwd(*a[:8], flipped["u2"], *a[9:]))
        with pytest.raises(AssertionError, match="out: max error"):
            check(inputs)
    bwd = op.bwd
    with monkeypatch.context() as patch:
        patch.setattr(op, "bwd", lambda do, out, *a: bwd(do, torch.zeros_like(out), *a))
        with pytest.raises(AssertionError, match="dq: max error"):
            check(inputs)


def test_lag_tiles_become_slots():
    """Two tiles of 2 lags, by hand, of two sequences: lags 0..3 are slots L-1..L-4."""
    bands = torch.zeros(2, 1, 2, 2, 1)
    bands[0, 0, 0, :, 0] = torch.tensor([10.0, 1.0])  # lags 1, 0
    bands[0, 0, 1, :, 0] = torch.tensor([1000.0, 100.0])  # lags 3, 2
    bands[1, 0, 0, :, 0] = torch.tensor([20.0, 2.0])
    assert hyper_gradients._fold(bands, 6, 1)[0, :, 0].tolist() == [0, 0, 1000, 100, 30, 3]
    assert hyper_gradients._fold(bands, 3, 1)[0, :, 0].tolist() == [100, 30, 3]


GOOD = core_inputs(B=1, H=2, T=3, L=4, dtype=torch.float32)
BAD = [
    ("q", torch.ones(3), ValueError, r"q must be \(\.\.\., Q, T, dq\), got \(3,\)"),
    ("q", torch.ones(3, 3), ValueError, r"q must be \(\.\.\., Q, T, dq\), got \(3, 3\)"),
    ("q", torch.ones(1, 3, 3, 3), ValueError, r"k must have shape \(1, 3, 3, 3\)"),
    ("q", [1.0], TypeError, "q must be a Tensor, got list"),
    ("q", torch.ones(1, 4, 3, 3, dtype=torch.int64), TypeError, "must have .* dtype"),
    ("k", torch.ones(1, 4, 2, 3), ValueError, r"k must have shape \(1, 4, 3, 3\), got"),
    ("k", None, TypeError, "k must have q's dtype torch.float32, got NoneType"),
    ("v", torch.ones(1, 4, 3, 4), ValueError, r"v must be \(1, 2, 3\) \+ \(dv,\), got"),
    ("c1", torch.ones(1, 4, 3, 9), ValueError, r"c1 must have shape \(1, 4, 3, 3\)"),
    ("c1", None, ValueError, "u1 must be None without c1"),
    ("u1", None, ValueError, "u1 and vt1 must be tensors with c1"),
    ("u1", torch.ones(4, 2, 3), ValueError, r"u1 must be \(4, L, r\) with L >= T = 3"),
    ("u1", torch.ones(4, 4, 0), ValueError, r"u1 must be \(4, L, r\) .*, got \(4, 4, 0\)"),
    ("u2", torch.ones(4, 4, 2), ValueError, r"u2 must be \(2, L, r\)"),
    ("vt2", torch.ones(2, 4, 2), ValueError, r"vt2 must have shape \(2, 2, 4\)"),
    ("d1", torch.ones(4, 5), ValueError, r"d1 must have shape \(4, 4\), got \(4, 5\)"),
    ("d2", torch.ones(2, 4).double(), TypeError, "d2 must have q's dtype"),
    ("kind", "gelu", ValueError, "kind must be 'glu' or 'relu', got 'gelu'"),
    ("norm", None, ValueError, "norm must be 'out_scale', 'l2' or 'none', got None"),
]


@pytest.mark.parametrize("name, value, error, message", BAD, ids=lambda b: str(b)[:30])
def test_one_clear_error(name, value, error, message, each_backend):
    with pytest.raises(error, match=message) as caught:
        hyper_attention(**{**GOOD, name: value})
    assert str(caught.value).startswith("hyper_attention: ")


def test_sub_heads_of_glu_come_in_pairs(each_backend):
    """Of "relu", each is a head."""
    odd = core_inputs(B=1, H=3, T=3, L=3, r1=1, r2=1, dtype=torch.float32, kind="relu")
    assert hyper_attention(**odd, kind="relu").shape == odd["v"].shape
    with pytest.raises(
        ValueError, match="q must have an even number of sub-heads for 'glu', got 3"
    ):
        hyper_attention(**odd)


def test_lengths_of_both_mixings_agree():
    longer = core_inputs(B=1, H=2, T=3, L=5, dtype=torch.float32)
    mixed = {**GOOD, **{k: longer[k] for k in ("u2", "vt2", "d2")}}
    with pytest.raises(ValueError, match="u1 and u2 must have one length L, got 4 and 5"):
        hyper_attention(**mixed)


def test_no_rows_and_no_batch(device, each_backend):
    for B, T in itertools.product((0, 1), (0, 2)):
        if B and T:
            continue
        inputs = core_inputs(B=B, H=1, T=T, L=4, dtype=torch.float32)
        results = evaluate(lambda t: hyper_attention(**t), inputs, torch.zeros_like(inputs["v"]))
        for name, t in inputs.items():
            assert results[f"d{name}"].shape == t.shape and not results[f"d{name}"].any()
