"""Every Case through the reference and through the kernels, by the one tolerance rule."""

import dataclasses

import op_checks
import pytest
import torch
from op_checks import FEW, FEW_PLAIN, PLAIN, check, opcheck, saved_bytes

import fusedmlp
from fusedmlp.ops import gated_act, gated_linear, linear_act
from fusedmlp.packing import ORDERS, join_pair, split_pair
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.testing import CASES as EVERY, dense, evaluate

# Other families have files of their own, at sizes that the interpreter bears for them.
CASES = {case.name: case for case in dense.cases()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

BLOCKS = ("gated_linear", "gated_mlp", "linear_act", "mlp")
# Off every block, in both paths: D and H of 8's multiples take TMA descriptors, the others element
# loads; 3 rows of K >= 128 are cut into parts; a prime M.
RAGGED = (35, 67, 101)
SHAPES = [(37, 40, 72), RAGGED, (3, 160, 88), (1, 96, 80)]
# All in bfloat16; fewer in the others, whose tiles `bench gate execute` runs as they are compiled.
CALLS = [(torch.bfloat16, shape) for shape in SHAPES]
CALLS += [(torch.float32, RAGGED), (torch.float32, SHAPES[2]), (torch.float16, RAGGED)]


@pytest.mark.parametrize(("dtype", "shape"), CALLS, ids=str)
@each_case
def test_kernel_matches_reference(case, shape, dtype, device, on_triton):
    check(case, case.inputs(*shape, dtype, device))


TAKE_ONE = {"gated_act": ACTIVATIONS, "gated_mlp-bias": FEW, "linear_act-bias": PLAIN,
            "mlp": FEW_PLAIN}  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name, activation", [(n, a) for n, rows in TAKE_ONE.items() for a in rows])
def test_every_activation(name, dtype, activation, device, on_triton):
    case = CASES[name]
    inputs = case.inputs(33, 48, 64, dtype, device, activation=activation)
    check(case, inputs, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_slope_far_out(activation, device, on_triton):
    """Values at +-90 and around them: nothing overflows, and tails are right to an ulp of the
    result."""
    g = torch.cat([torch.linspace(-90, 90, 721), torch.tensor([-90.0, 90.0, -1e-3, 1e-3])])
    g = g[g != 0].to(device)
    inputs = {"g": g, "u": torch.ones_like(g)}
    check(CASES["gated_act"], inputs, activation=activation, dy=torch.ones_like(g))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_slope_near_zero(activation, device, on_triton):
    g = op_checks.PROBES.to(device)
    inputs = {"g": g, "u": torch.ones_like(g)}
    run = lambda t: CASES["gated_act"].run(t, activation=activation)  # noqa: E731
    results = {k: t.cpu() for k, t in evaluate(run, inputs, torch.ones_like(g)).items()}
    op_checks.assert_precise_near_zero(activation, results["out"], results["dg"])


# Each kernel has an activation's slope in a place of its own.
AT_ZERO = ("gated_act", "gated_linear-bias", "linear_act", "gated_mlp-bias", "mlp", "moe_mlp-bias",
           "moe_mlp-plain-recompute-bias", "binary_gated_linear-bias",
           "masked_gated_linear-1")  # fmt: skip


@pytest.mark.parametrize("name", AT_ZERO)
def test_a_gate_of_exactly_zero(name, device, on_triton):
    """Beside an up projection that is not 0, so that the slope shows in the gradients."""
    case = EVERY[name]
    inputs = case.inputs(5, 16, 24, torch.float32, device)
    for key, t in inputs.items():
        if key in ("g", "b_gate"):
            t.zero_()
        elif key == "b_up":
            t.fill_(1)
        elif key == "x":
            t[:, : 8 if "masks" in inputs else None] = 0
        elif key == "masks":  # they keep what x has not
            t.copy_(torch.where(torch.arange(16, device=device) < 8, 1.0, -1.0))
    check(case, inputs, activation="relu")


@each_case
def test_reference_passes_gradcheck(case):
    op_checks.gradcheck(case)


def test_reference_formulas_by_hand():
    x, wg = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]])
    wu, wd = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0], [-1.0]])
    g, u = -1.5, 4.0
    h = u * g / (1 + torch.tensor(1.5).exp().item())
    out = fusedmlp.gated_mlp(x, wg, wu, wd)
    torch.testing.assert_close(out, torch.tensor([[3 * h, -h]]))
    out = fusedmlp.mlp(x, wu, wd, torch.tensor([-5.0]), activation="relu")
    torch.testing.assert_close(out, torch.zeros(1, 2))


@each_case
def test_no_rows(case, device, each_backend):
    op_checks.no_rows(case, device)


@pytest.mark.parametrize("case", [CASES[n] for n in BLOCKS], ids=BLOCKS)
def test_leading_dimensions(case, device, each_backend):
    op_checks.leading_dimensions(case, device)


# Rows further apart, and each argument with strides of its own: test_strides.py.
@pytest.mark.parametrize("how", ("every other row", "transposed"))
@pytest.mark.parametrize(
    "name", ("gated_act", "gated_act-up_gate", *BLOCKS, "gated_mlp-bias", "mlp-recompute-bias")
)
@pytest.mark.parametrize("shape", [(33, 40, 56), (3, 130, 31)], ids=str)
def test_strides_are_read_in_place(name, shape, how, device, on_triton):
    op_checks.strides(CASES[name], shape, how, device)


@pytest.mark.parametrize("name", ("gated_act", "gated_linear", "linear_act"))
def test_rows_four_gigabytes_apart(name, device):
    op_checks.rows_far_apart(CASES[name], device)


@pytest.mark.parametrize("name", ("gated_act", *BLOCKS))
def test_zero_stride_upstream_gradient(name, device, on_triton):
    op_checks.zero_stride_gradient(CASES[name], device)


@pytest.mark.parametrize(
    "name",
    ("gated_act", "gated_linear-bias", "gated_linear-up_gate-bias", "gated_mlp-bias",
     "gated_mlp-gate_up-bias", "gated_mlp-recompute-bias", "linear_act-bias", "mlp-bias",
     "mlp-recompute-bias"),
)  # fmt: skip
def test_every_subset_of_gradients(name, device, on_triton):
    op_checks.every_subset_of_gradients(CASES[name], device)


# `bench gate execute` wants the same bits of every Case, in three orders of all that is left open.
@pytest.mark.parametrize("name", ("gated_act", "gated_mlp-recompute-bias", "mlp-bias"))
def test_second_backward_and_reruns_are_bit_equal(name, device, on_triton):
    op_checks.reruns(CASES[name], device)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("gated_act", *BLOCKS))
def test_bad_rows_stay_in_their_rows(name, bad, device, on_triton):
    op_checks.bad_rows(CASES[name], bad, device)


@pytest.mark.parametrize("name", ("gated_act", *BLOCKS))
def test_nan_in_gives_nan_out(name, device, on_triton):
    """For every activation: a NaN must not be swallowed by a comparison."""
    case = CASES[name]
    for activation in PLAIN if case.op in ("linear_act", "mlp") else ACTIVATIONS:
        inputs = case.inputs(2, 16, 16, torch.float32, device)
        first = next(iter(inputs))
        inputs[first][1, 3] = float("nan")
        assert case.run(inputs, activation=activation)[1].isnan().any(), activation


@pytest.mark.parametrize("name", ("gated_linear-bias", "gated_mlp", "mlp-bias"))
def test_sizes_of_one(name, device, on_triton):
    case = CASES[name]
    for shape in ((1, 1, 1), (17, 1, 33), (17, 33, 1)):
        check(case, case.inputs(*shape, torch.float32, device))


def test_no_depth_and_no_width(device, each_backend):
    """K = 0 is a sum over nothing; H = 0 a tensor of nothing."""
    bias = torch.tensor([1.0, -2.0], device=device)
    empty = torch.ones(2, 0, device=device)
    out = fusedmlp.gated_linear(torch.ones(3, 0, device=device), empty, empty, bias, bias)
    torch.testing.assert_close(out, (torch.nn.functional.silu(bias) * bias).expand(3, 2))
    w, x = torch.ones(0, 4, device=device), torch.ones(3, 4, device=device)
    assert fusedmlp.gated_linear(x, w, w).shape == (3, 0)
    assert not fusedmlp.mlp(x, w, w.t()).any()


@pytest.mark.parametrize("name", ("gated_mlp-bias", "mlp-bias", "linear_act-bias"))
def test_gradients_through_reference_double_backward(name):
    """On the reference autograd goes on: a second derivative exists."""
    case = CASES[name]
    inputs = case.inputs(2, 3, 4, torch.float64)
    leaves = [t.requires_grad_() for t in inputs.values()]
    names = list(inputs)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: case.run(dict(zip(names, tensors, strict=True))), leaves
    )


def test_memory_plan(device, on_triton):
    """A gated block keeps g and u and nothing else; recompute keeps nothing."""
    M, D, H = 33, 16, 64
    expected = {"gated_mlp": 2 * M * H, "gated_mlp-recompute-bias": 0, "mlp": M * H,
                "mlp-recompute-bias": 0, "gated_linear": 2 * M * H}  # fmt: skip
    for name, elements in expected.items():
        case = CASES[name]
        assert saved_bytes(case, case.inputs(M, D, H, torch.float32, device)) == 4 * elements, name


def test_packed_weight_gets_one_gradient_buffer(device, on_triton):
    case = CASES["gated_mlp-up_gate-bias"]
    inputs = case.inputs(9, 16, 24, torch.float32, device)
    grads = evaluate(case.run, inputs, torch.ones(9, 16, device=device))
    assert grads["dw_gate"].shape == (48, 16) and grads["dw_gate"].is_contiguous()


@pytest.mark.parametrize("name", ("gated_act", "gated_mlp-bias", "mlp-bias", "linear_act"))
def test_autocast(name, device, each_backend):
    """Results in the autocast dtype, gradients in the parameters' own."""
    case = CASES[name]
    inputs = case.inputs(6, 16, 24, torch.float32, device)
    half = {k: t.bfloat16() for k, t in inputs.items()}
    dy = torch.ones(case.fake_output(6, 16, 24).shape, device=device, dtype=torch.bfloat16)

    def run(leaves):
        with torch.autocast(device, torch.bfloat16):
            return case.run(leaves)

    mixed, plain = evaluate(run, inputs, dy), evaluate(case.run, half, dy)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert case.run(inputs).dtype == torch.float32
    with torch.autocast(device, torch.float16):
        assert case.run({**inputs, **dict(list(half.items())[:1])}).dtype == torch.float16
    assert mixed["out"].dtype == torch.bfloat16
    for key in mixed:
        assert key == "out" or mixed[key].dtype == torch.float32
        torch.testing.assert_close(mixed[key].bfloat16(), plain[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", ("gated_act-gate_up", "gated_mlp-bias", "mlp-recompute-bias"))
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles_to_one_graph(name, dynamic, device, each_backend):
    op_checks.compiles(CASES[name], dynamic, device)


def _opcheck(op, *args):
    opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@each_case
def test_results_may_be_modified_in_place(case, device, each_backend):
    op_checks.modified_in_place(case, device)


@pytest.mark.parametrize("view", ("contiguous", "strided"))
def test_opcheck(view, device):
    def t(*shape):
        wide = torch.randn(*shape[:-1], 2 * shape[-1], device=device)
        return wide[..., ::2] if view == "strided" else wide[..., : shape[-1]].contiguous()

    x, w, b, down, gu, g = t(5, 16), t(24, 16), t(24), t(16, 24), t(2, 5, 24), t(5, 24)
    _opcheck(gated_act.fwd, g, g, "silu")
    for packed in (None, *ORDERS):
        _opcheck(gated_act.bwd, g, g, g, "silu", packed)
        _opcheck(gated_linear.bwd, x, down, gu, "silu", packed, True, True)
    for h, pair in ((True, True), (True, False), (False, True)):
        _opcheck(gated_linear.fwd, x, w, w, b, b, "gelu", h, pair)
        _opcheck(gated_linear.fwd, x, w, w, None, None, "gelu", h, pair)
        _opcheck(linear_act.fwd, x, w, b, "gelu", h, pair)
        _opcheck(linear_act.bwd, x, down, g, "gelu", h, pair)
    _opcheck(linear_act.dz, g, g, "tanh")
    _opcheck(linear_act.act, g, "tanh")


def test_column_sums_come_gate_first_and_are_joined_in_the_packed_order(device, on_triton):
    dy, down, gu = (torch.randn(s, device=device) for s in ((9, 8), (8, 16), (2, 9, 16)))
    for packed in (None, *ORDERS):
        dgu, _, db = gated_linear.bwd(dy, down, gu, "silu", packed, False, True)
        dg, du = split_pair(dgu, packed)
        torch.testing.assert_close(db, torch.stack([dg.sum(0), du.sum(0)]))
        if packed:
            torch.testing.assert_close(join_pair(db, packed), dgu.sum(0))


def test_cases_are_frozen_and_named_after_their_op():
    for name, case in CASES.items():
        assert name.split("-")[0] == case.op == case.reference.__name__
        with pytest.raises(dataclasses.FrozenInstanceError):
            case.name = "other"


def test_inference_keeps_no_preactivation(device, on_triton, monkeypatch):
    """Without gradients the kernels store h alone."""
    seen = []
    fwd = gated_linear.fwd
    monkeypatch.setattr(gated_linear, "fwd", lambda *a: seen.append(a[-2:]) or fwd(*a))
    inputs = CASES["gated_mlp"].inputs(4, 8, 8, torch.float32, device)
    CASES["gated_mlp"].run(inputs)
    with torch.no_grad():
        CASES["gated_mlp"].run({k: t.requires_grad_() for k, t in inputs.items()})
    assert seen == [(True, False), (True, False)]
