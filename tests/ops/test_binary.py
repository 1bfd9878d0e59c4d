"""One-bit weights through the reference and the kernels, by the one tolerance rule."""

import itertools

import op_checks
import pytest
import torch
import torch.nn.functional as F
from op_checks import DTYPES, check, opcheck, strided

from fusedmlp import (
    BinaryWeight,
    binary_gated_linear,
    binary_gated_mlp,
    binary_linear,
    quantize_binary,
)
from fusedmlp.ops import (
    binary_gated_linear as gated_op,
    binary_gated_mlp as mlp_op,
    binary_linear as op,
)
from fusedmlp.testing import binary, doubled, evaluate

MINE = {case.name: case for case in binary.cases()}
LINEAR, GATED, MLP = (MINE[f"binary_{n}"] for n in ("linear", "gated_linear", "gated_mlp"))
LINEAR_BIAS, RECOMPUTE = MINE["binary_linear-bias"], MINE["binary_gated_mlp-recompute-bias"]
each_case = pytest.mark.parametrize("case", MINE.values(), ids=MINE)
blocks = pytest.mark.parametrize("case", (LINEAR, MLP), ids=lambda c: c.name)


def draw(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def test_formula_by_hand():
    """y = sum of s (2 sum_{b = 1} x - sum x) over groups."""
    w, x = draw(5, 384, dtype=torch.float64), draw(3, 384, dtype=torch.float64)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for n, g in itertools.product(range(5), range(3)):
        at = slice(128 * g, 128 * g + 128)
        scale = w[n, at].abs().mean().half()
        expected[:, n] += scale * (2 * x[:, at][:, w[n, at] >= 0].sum(1) - x[:, at].sum(1))
    torch.testing.assert_close(binary_linear(x, quantize_binary(w)), expected)


@pytest.mark.parametrize("case", (LINEAR_BIAS, RECOMPUTE), ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((37, 256, 136), torch.bfloat16), ((35, 136, 77), torch.float16),
     ((3, 384, 88), torch.float32)],
    ids=str,
)  # fmt: skip
def test_kernel_matches_reference(case, shape, dtype, device, on_triton):
    """Widths off a group and off every block; a prime number of rows; K in parts."""
    check(case, case.inputs(*shape, dtype, device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 256, 136), (35, 136, 77), (3, 384, 88), (1, 128, 1)])
@each_case
def test_every_kernel_matches_reference(case, shape, dtype, device, on_triton):
    check(case, case.inputs(*shape, dtype, device))


@pytest.mark.parametrize("rows", (17, 3))
def test_scales_of_another_dtype(rows, on_triton, device):
    inputs = LINEAR.inputs(rows, 200, 40, torch.float16, device)
    inputs["s_weight"] = inputs["s_weight"].float() * 1.0001
    check(LINEAR, inputs)


@each_case
def test_reference_passes_gradcheck(case):
    """The gradients of x, the scales and the biases."""
    inputs = doubled(case.inputs(2, 130, 3, torch.float64))
    leaves = {k: t.requires_grad_() for k, t in inputs.items() if t.is_floating_point()}
    assert torch.autograd.gradcheck(
        lambda *ts: case.run({**inputs, **dict(zip(leaves, ts, strict=True))}),
        tuple(leaves.values()),
        fast_mode=True,
    )


@each_case
def test_no_rows(case, device, each_backend):
    inputs = case.inputs(0, 6, 10, torch.float32, device)
    out = case.fake_output(0, 6, 10)
    results = evaluate(case.run, inputs, torch.zeros(out.shape, device=device))
    assert results["out"].shape == out.shape
    for name, t in inputs.items():
        if t.is_floating_point():
            assert results[f"d{name}"].shape == t.shape and not results[f"d{name}"].any()


@pytest.mark.parametrize("case", (RECOMPUTE,), ids=lambda c: c.name)
def test_second_backward_and_reruns_are_bit_equal(case, device, on_triton):
    inputs = case.inputs(17, 130, 40, torch.bfloat16, device)
    leaves = {k: t.requires_grad_() for k, t in inputs.items() if t.is_floating_point()}
    before = {k: t.detach().clone() for k, t in inputs.items()}
    out = case.run(inputs)
    dy = torch.randn_like(out)
    first = torch.autograd.grad(out, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(out, list(leaves.values()), dy)
    with torch.no_grad():
        assert torch.equal(case.run(inputs), out)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(t, inputs[k]) for k, t in before.items())


@pytest.mark.parametrize("rows", (33, 3))
@pytest.mark.parametrize("how", ("wide rows", "every other row", "transposed"))
def test_strides_are_read_in_place(how, rows, device, on_triton):
    inputs = LINEAR_BIAS.inputs(rows, 136, 40, torch.float32, device)
    apart = {k: strided(inputs[k], how) for k in ("x", "b_weight")}
    check(LINEAR_BIAS, inputs | apart, wanted=("x", "b_weight"))


def test_rows_four_gigabytes_apart(device):
    op_checks.rows_far_apart(LINEAR, device)


@blocks
def test_zero_stride_upstream_gradient(case, device, on_triton):
    inputs = case.inputs(9, 24, 40, torch.float32, device)
    dy = torch.ones((), device=device).expand(case.fake_output(9, 24, 40).shape)
    check(case, inputs, dy=dy)


def test_single_gradients(device, on_triton):
    inputs = RECOMPUTE.inputs(3, 12, 20, torch.float32, device)
    dy = draw(3, 12, device=device)
    full = evaluate(RECOMPUTE.run, inputs, dy)
    names = [k for k, t in inputs.items() if t.is_floating_point()]
    for name in names:
        part = evaluate(RECOMPUTE.run, inputs, dy, (name,))
        for key in part:
            torch.testing.assert_close(part[key], full[key], rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("rows", (35, 5))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_bad_rows_stay_in_their_rows(bad, rows, device, on_triton):
    inputs = GATED.inputs(rows, 136, 48, torch.float32, device)
    dy = torch.ones(rows, 48, device=device)
    clean = evaluate(GATED.run, inputs, dy, ("x",))
    inputs["x"][3] = bad
    dirty = evaluate(GATED.run, inputs, dy, ("x",))
    others = [i for i in range(rows) if i != 3]
    for key in clean:
        assert torch.equal(clean[key][others], dirty[key][others])
    assert not dirty["out"][3].isfinite().all()


@pytest.mark.parametrize("value", (-90.0, 90.0))
def test_large_values(value, on_triton, device):
    inputs = GATED.inputs(2, 128, 16, torch.float32, device)
    inputs["x"] = torch.full_like(inputs["x"], value)
    check(GATED, inputs, wanted=("x",), activation="gelu")


@pytest.mark.parametrize("activation", op_checks.FEW)
def test_activations(activation, on_triton, device):
    inputs = MLP.inputs(17, 128, 40, torch.float32, device, activation=activation)
    check(MLP, inputs, activation=activation)


def test_sizes_of_one_and_none(device, on_triton):
    for shape in ((1, 1, 1), (17, 1, 33), (17, 33, 1)):
        check(LINEAR, LINEAR.inputs(*shape, torch.float32, device))
    for M, D, H in ((3, 0, 2), (20, 0, 2), (3, 4, 0)):
        inputs = LINEAR.inputs(M, D, H, torch.float32, device)
        results = evaluate(LINEAR.run, inputs, torch.ones(M, H, device=device))
        assert results["out"].shape == (M, H) and not results["out"].any()
        assert results["dx"].shape == (M, D) and not results["dx"].any()


@blocks
def test_leading_dimensions(case, device, each_backend):
    inputs = case.inputs(12, 16, 24, torch.float32, device)
    flat = case.run(inputs)
    shaped = case.run({**inputs, "x": inputs["x"].view(2, 3, 2, 16)})
    assert shaped.shape == (2, 3, 2, flat.shape[-1])
    torch.testing.assert_close(shaped.flatten(0, 2), flat, rtol=0, atol=0)
    assert case.run({**inputs, "x": inputs["x"][0]}).shape == flat.shape[-1:]


def frozen(case, *size, device):
    """Inputs whose scales, like the signs, get no gradient."""
    inputs = case.inputs(*size, torch.float32, device)
    return {k: t for k, t in inputs.items() if k != "x"}, inputs["x"]


def test_memory_plan(device, on_triton):
    """g and u alone are kept; recompute keeps nothing; a linear with frozen scales nothing."""
    M, D, H = 33, 16, 64
    for case, expected in ((LINEAR, 0), (GATED, 2 * M * H), (MLP, 2 * M * H), (RECOMPUTE, 0)):
        rest, x = frozen(case, M, D, H, device=device)
        arguments, kept = {t.data_ptr() for t in (*rest.values(), x)}, {}

        def pack(t, kept=kept, arguments=arguments):
            if t.data_ptr() not in arguments:
                kept[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            assert case.run({**rest, "x": x.requires_grad_()}).requires_grad
        assert sum(kept.values()) == 4 * expected, case.name


@pytest.mark.parametrize("name", ("linear", "gated_linear", "gated_mlp"))
def test_a_bias_alone_has_second_derivatives(name, device, each_backend):
    x, bias = draw(3, 128, device=device), draw(24, device=device).requires_grad_()
    gate, up = (quantize_binary(draw(24 + i, 128, device=device)[:24]) for i in range(2))
    down = quantize_binary(draw(16, 24, device=device), pad=True)
    run = {
        "linear": lambda: binary_linear(x, gate, bias),
        "gated_linear": lambda: binary_gated_linear(x, gate, up, bias),
        "gated_mlp": lambda: binary_gated_mlp(x, gate, up, down, bias),
    }[name]
    (plain,) = torch.autograd.grad(run().square().sum(), bias)
    (first,) = torch.autograd.grad(run().square().sum(), bias, create_graph=True)
    torch.testing.assert_close(first, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    (second,) = torch.autograd.grad(first.sum(), bias)
    assert second.isfinite().all() and second.any()


@blocks
def test_autocast(case, device, each_backend):
    """x is cast; scales are not."""
    rest, x = frozen(case, 6, 16, 24, device=device)
    dy = torch.ones(case.fake_output(6, 16, 24).shape, device=device, dtype=torch.float16)

    def run(leaves):
        with torch.autocast(device, torch.float16):
            return case.run({**rest, **leaves})

    mixed = evaluate(run, {"x": x}, dy)
    plain = evaluate(lambda t: case.run({**rest, **t}), {"x": x.half()}, dy)
    assert mixed["out"].dtype == torch.float16 and mixed["dx"].dtype == torch.float32
    for key in mixed:
        torch.testing.assert_close(mixed[key].half(), plain[key], rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles_to_one_graph(dynamic, device, each_backend):
    torch._dynamo.reset()
    gate, up = (quantize_binary(draw(24 + i, 128, device=device)[:24]) for i in range(2))
    down = quantize_binary(draw(16, 24, device=device), pad=True)
    run = lambda x: binary_gated_mlp(x, gate, up, down)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs, dy = {"x": draw(6, 128, device=device)}, draw(6, 16, device=device)
    eager = evaluate(lambda t: run(**t), inputs, dy)
    for key, t in evaluate(lambda t: compiled(**t), inputs, dy).items():
        torch.testing.assert_close(t, eager[key])


@pytest.mark.parametrize("view", ("contiguous", "strided"))
def test_opcheck(view, device):
    def t(*shape):
        wide = torch.randn(*shape[:-1], 2 * shape[-1], device=device)
        return wide[..., ::2] if view == "strided" else wide[..., : shape[-1]].contiguous()

    w, down = (
        quantize_binary(draw(24, 128, device=device)),
        quantize_binary(draw(16, 128), pad=True),
    )
    q, s = w.qweight, w.scales
    x, dy, b = t(5, 128), t(5, 24), t(24)
    calls = [
        (op.fwd, x, q, s, b),
        (op.dx, dy, q, s, None, None, None, 128),
        (op.dx, dy, q, s, dy, q, s, 128),
        (op.ds, dy, x, q, torch.float16),
        (gated_op.fwd, x, q, s, q, s, b, b, "gelu", True, True),
        (gated_op.fwd, x, q, s, q, s, None, None, "gelu", True, False),
        (gated_op.fwd, x, q, s, q, s, None, None, "gelu", False, True),
        (mlp_op.bwd, t(5, 16), down.qweight.to(device), down.scales.to(device),
         torch.randn(2, 5, 128, device=device), "silu", view == "strided"),
    ]  # fmt: skip
    for checked, *args in calls:
        opcheck(checked, args, test_utils=("test_schema", "test_faketensor"))
    opcheck(op.fwd, calls[0][1:], test_utils=("test_aot_dispatch_dynamic",))


def test_inference_stores_h_alone(device, on_triton, monkeypatch):
    seen = []
    fwd = gated_op.fwd
    monkeypatch.setattr(gated_op, "fwd", lambda *a: seen.append(a[-2:]) or fwd(*a))
    rest, x = frozen(MLP, 4, 8, 8, device=device)
    MLP.run({**rest, "x": x})
    with torch.no_grad():
        MLP.run({**rest, "x": x.requires_grad_()})
    assert seen == [(True, False), (True, False)]


def test_padding_is_not_read(each_backend, device):
    """Whatever the bits past the width are."""
    w, x = quantize_binary(draw(8, 70, device=device), pad=True), draw(3, 70, device=device)
    other = BinaryWeight(w.qweight.clone(), w.scales, 70)
    other.qweight[:, 3] = 0x5A5A5A5A
    dy = draw(3, 8, device=device)
    for key in ("out", "dx"):
        one, two = (
            evaluate(lambda t, w=w: binary_linear(t["x"], w), {"x": x}, dy)[key] for w in (w, other)
        )
        assert torch.equal(one, two)
    expected = F.linear(x, w.dequantize(torch.float32))
    torch.testing.assert_close(binary_linear(x, w), expected)


def test_gate_and_up_are_told_apart(each_backend, device):
    gate, up = quantize_binary(draw(8, 128, device=device)), quantize_binary(draw(8, 256)[:, :128])
    up, x = up.to(device), draw(3, 128, device=device)
    expected = F.silu(binary_linear(x, gate)) * binary_linear(x, up)
    torch.testing.assert_close(binary_gated_linear(x, gate, up), expected)


@pytest.mark.parametrize("autocast", (False, True))
def test_scales_are_not_rounded_to_bfloat16(autocast):
    """The reference is as exact as the kernels of few rows: off by its result's rounding."""
    w, x = quantize_binary(draw(24, 256)), draw(5, 256).bfloat16()
    exact = (x.double() @ w.dequantize(torch.float64).t()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = binary_linear(x, w)
    assert y.dtype == torch.bfloat16
    assert (y == exact).float().mean() > 0.98  # the others are ties
