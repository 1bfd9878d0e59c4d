"""What only masks meet: the straight-through gradient, bit planes, any number of masks."""

import itertools

import op_checks
import pytest
import torch
import torch.nn.functional as F
from op_checks import check, opcheck, saved_bytes

import fusedmlp
from fusedmlp import masked_gated_linear, masked_gated_mlp, pack_masks, reference
from fusedmlp.ops import masked_gated_linear as op
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.testing import CASES, evaluate, masked
from fusedmlp.weights.masks import pack

LINEAR, MLP, RECOMPUTE = (
    CASES[f"masked_gated_{n}"] for n in ("linear-1", "mlp-1", "mlp-1-recompute-bias")
)
CASE_NAMES = (LINEAR.name, MLP.name)
MINE = {case.name: case for case in masked.cases() if not case.draws}
BITS = CASES["masked_gated_linear-4-bits"]
each_case = pytest.mark.parametrize("case", MINE.values(), ids=MINE)


def draw(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def many(n_m, M, D, H, device, dtype=torch.float32):
    return {
        "x": draw(M, D, dtype=dtype, device=device),
        "w": draw(H, D, dtype=dtype, device=device) / D**0.5,
        "masks": draw(n_m, H, D, dtype=dtype, device=device),
    }


def test_reference_by_hand():
    x, w = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.5, -1.0, 3.0]])
    masks = torch.tensor([[[0.2, -0.1, 0.0]], [[-1.0, 0.3, 2.0]]])
    g1, v1, g2, v2 = 0.5, -5.0, -5.0, 0.5  # a logit of 0 is masked out
    silu = lambda t: F.silu(torch.tensor(t)).item()  # noqa: E731
    expected = silu(g1) * v1 + silu(g2) * v2
    torch.testing.assert_close(masked_gated_linear(x, w, masks), torch.tensor([[expected]]))
    doubled = masked_gated_mlp(x, w, masks, torch.tensor([[2.0]]), torch.tensor([1.0]))
    torch.testing.assert_close(doubled, torch.tensor([[2 * expected + 1]]))


def soft(x, w, masks, activation):
    """The formula over masks of any real value, whose gradient is the logits'."""
    act = ACTIVATIONS[activation].reference
    return sum(act(F.linear(x, m * w)) * F.linear(x, (1 - m) * w) for m in masks)


@pytest.mark.parametrize("activation", ("silu", "gelu_tanh", "identity"))
def test_logits_get_the_gradient_of_their_mask(activation):
    inputs = LINEAR.inputs(3, 5, 4, torch.float64) | {"masks": draw(2, 4, 5, dtype=torch.float64)}
    x, w, masks = inputs.values()
    hard = (masks > 0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: soft(x, w, m, activation), [hard])
    ours = evaluate(lambda t: masked_gated_linear(**t, activation=activation), inputs, draw(3, 4))
    theirs = evaluate(
        lambda t: soft(**t, activation=activation), inputs | {"masks": hard.detach()}, draw(3, 4)
    )
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])


def test_scale_of_logits_means_nothing():
    inputs = many(2, 3, 8, 4, "cpu")
    out = masked_gated_linear(**inputs)
    inputs["masks"] = inputs["masks"] * 1e-40
    assert torch.equal(out, masked_gated_linear(**inputs))


@pytest.mark.parametrize("D", (1, 8, 13, 16))
@pytest.mark.parametrize("n_m", (1, 3, 16))
def test_planes_by_hand(n_m, D, each_backend, device):
    masks = draw(n_m, 5, D, device=device)
    packed = pack_masks(masks)
    assert packed.shape == masks.shape and packed.planes.shape == (5, -(-D // 8), n_m)
    for i, h, d in itertools.product(range(n_m), range(5), range(8 * -(-D // 8))):
        bit = packed.planes[h, d // 8, i].item() >> d % 8 & 1
        assert bit == (d < D and masks[i, h, d].item() > 0)
    assert torch.equal(packed.unpack(), masks > 0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_planes_of_strided_logits(dtype, on_triton, device):
    logits = draw(150, 2, 37, dtype=dtype, device=device).permute(1, 2, 0)
    logits[0, :3] = 0
    assert torch.equal(pack_masks(logits).planes, reference.pack_masks(logits))


RAGGED = (35, 67, 101)


# All in bfloat16; fewer in the others, whose tiles `bench gate execute` runs as they are compiled.
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.bfloat16, shape) for shape in ((37, 40, 72), RAGGED, (3, 160, 88))]
    + [(torch.float32, RAGGED), (torch.float16, RAGGED)],
    ids=str,
)
@pytest.mark.parametrize("case", (*MINE.values(), BITS), ids=lambda c: c.name)
def test_kernel_matches_reference(case, shape, dtype, device, on_triton):
    check(case, case.inputs(*shape, dtype, device))


@each_case
def test_reference_passes_gradcheck(case):
    op_checks.gradcheck(case)


@each_case
def test_no_rows(case, device, each_backend):
    op_checks.no_rows(case, device)


@pytest.mark.parametrize("case", (RECOMPUTE, MINE["masked_gated_linear-4"]), ids=lambda c: c.name)
def test_second_backward_and_reruns_are_bit_equal(case, device, on_triton):
    op_checks.reruns(case, device)


@each_case
def test_results_may_be_modified_in_place(case, device, each_backend):
    op_checks.modified_in_place(case, device)


def test_complement_by_subtraction():
    x, w, masks = many(3, 5, 13, 7, "cpu", torch.float64).values()
    expected = soft(x, w, (masks > 0).double(), "silu")
    torch.testing.assert_close(masked_gated_linear(x, w, masks), expected)


@pytest.mark.parametrize(
    ("n_m", "rows", "backward"),
    [(2, 35, True), (3, 35, True), (6, 35, True), (3, 3, False), (16, 3, False)],
)
def test_any_number_of_masks(n_m, rows, backward, on_triton, device):
    inputs = many(n_m, rows, 40, 72, device)
    check(CASES["masked_gated_linear-4"], inputs, backward=backward)


@pytest.mark.slow
@pytest.mark.parametrize("rows", (35, 3))
@pytest.mark.parametrize("n_m", range(1, 17))
def test_every_number_of_masks(n_m, rows, on_triton, device):
    check(CASES["masked_gated_linear-4"], many(n_m, rows, 40, 72, device))


@pytest.mark.parametrize("n_m", (1, 4))
def test_packed_masks_give_the_same_bits(n_m, each_backend, device):
    inputs = many(n_m, 5, 13, 24, device)
    packed = inputs | {"masks": pack_masks(inputs["masks"])}
    dy = draw(5, 24, device=device)
    full = evaluate(lambda t: masked_gated_linear(**t), inputs, dy)
    rest = {k: t for k, t in inputs.items() if k != "masks"}
    fixed = evaluate(lambda t: masked_gated_linear(**t, masks=packed["masks"]), rest, dy)
    for key in fixed:
        assert torch.equal(fixed[key], full[key])
    down = draw(13, 24, device=device)
    with torch.no_grad():
        assert torch.equal(masked_gated_mlp(**packed, w_down=down),
                           masked_gated_mlp(**inputs, w_down=down))  # fmt: skip


@pytest.mark.parametrize("sign", (-1, 1))
def test_one_side_of_everything(sign, each_backend, device):
    """All weights on one side: the other factor is exactly 0, by subtraction too."""
    inputs = many(2, 5, 24, 16, device)
    inputs["masks"] = inputs["masks"].abs() * sign
    assert not masked_gated_linear(**inputs).any()
    h = masked_gated_linear(**inputs, activation="sigmoid")
    expected = torch.zeros_like(h) if sign > 0 else F.linear(inputs["x"], inputs["w"])
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=str)
def test_logits_of_another_dtype(dtype, each_backend, device):
    inputs = many(2, 5, 16, 24, device)
    dy = draw(5, 24, device=device)
    same = evaluate(lambda t: masked_gated_linear(**t), inputs, dy)
    other = inputs | {"masks": inputs["masks"].to(dtype)}
    mixed = evaluate(lambda t: masked_gated_linear(**t), other, dy)
    assert mixed["dmasks"].dtype == dtype
    for key in same:
        torch.testing.assert_close(mixed[key].to(dtype), same[key].to(dtype))


@pytest.mark.parametrize("activation", op_checks.FEW)
def test_activations(activation, on_triton, device):
    inputs = LINEAR.inputs(17, 24, 40, torch.float32, device, activation=activation)
    check(LINEAR, inputs, activation=activation)


@pytest.mark.parametrize("how", ("wide rows", "every other row", "transposed"))
@pytest.mark.parametrize("shape", [(33, 40, 56), (3, 130, 31)], ids=str)
def test_strides_are_read_in_place(shape, how, device, on_triton):
    op_checks.strides(MLP, shape, how, device)


def test_rows_four_gigabytes_apart(device):
    op_checks.rows_far_apart(LINEAR, device)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_zero_stride_upstream_gradient(name, device, on_triton):
    op_checks.zero_stride_gradient(CASES[name], device)


def test_every_subset_of_gradients(device, on_triton):
    op_checks.every_subset_of_gradients(LINEAR, device)


@pytest.mark.parametrize("recompute", (False, True))
def test_single_gradients_of_a_block(recompute, device, on_triton):
    inputs = RECOMPUTE.inputs(5, 12, 20, torch.float32, device)
    dy = draw(5, 12, device=device)
    run = lambda t: masked_gated_mlp(**t, recompute=recompute)  # noqa: E731
    full = evaluate(run, inputs, dy)
    for name in inputs:
        part = evaluate(run, inputs, dy, (name,))[f"d{name}"]
        torch.testing.assert_close(part, full[f"d{name}"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_bad_rows_stay_in_their_rows(bad, device, on_triton):
    op_checks.bad_rows(LINEAR, bad, device)


def test_nan_in_gives_nan_out(device, on_triton):
    for name in ACTIVATIONS:
        inputs = LINEAR.inputs(2, 16, 16, torch.float32, device)
        inputs["x"][1, 3] = float("nan")
        assert masked_gated_linear(**inputs, activation=name)[1].isnan().all(), name


def test_sizes_of_one_and_none(device, on_triton):
    for shape in ((1, 1, 1), (17, 1, 33), (17, 33, 1)):
        check(LINEAR, LINEAR.inputs(*shape, torch.float32, device))
    for M, D, H in ((3, 0, 2), (20, 0, 2), (3, 4, 0)):
        inputs = {"x": torch.ones(M, D), "w": torch.ones(H, D), "masks": torch.ones(1, H, D)}
        inputs = {k: t.to(device) for k, t in inputs.items()}
        results = evaluate(lambda t: masked_gated_linear(**t), inputs, torch.ones(M, H).to(device))
        assert results["out"].shape == (M, H) and not results["out"].any()
        assert results["dx"].shape == (M, D) and not results["dx"].any()


@pytest.mark.parametrize("case", (LINEAR, MLP), ids=lambda c: c.name)
def test_leading_dimensions(case, device, each_backend):
    op_checks.leading_dimensions(case, device)


def test_memory_plan(device, on_triton):
    """Bit planes, t and one g are kept; recompute keeps the planes alone."""
    M, D, H = 33, 16, 64
    planes = H * D // 8
    saved = lambda case: saved_bytes(  # noqa: E731
        case, case.inputs(M, D, H, torch.float32, device)
    )
    assert saved(LINEAR) == saved(MLP) == 4 * 2 * M * H + planes
    assert saved(RECOMPUTE) == planes


@pytest.mark.parametrize("name", CASE_NAMES)
def test_autocast(name, device, each_backend):
    """x and w are cast; logits are not, so that a tiny one keeps its sign."""
    case = CASES[name]
    inputs = case.inputs(6, 16, 24, torch.float32, device)
    inputs["masks"] = inputs["masks"] * 1e-30
    half = {k: t if k == "masks" else t.half() for k, t in inputs.items()}
    dy = torch.ones(case.fake_output(6, 16, 24).shape, device=device, dtype=torch.float16)

    def run(leaves):
        with torch.autocast(device, torch.float16):
            return case.run(leaves)

    mixed, plain = evaluate(run, inputs, dy), evaluate(case.run, half, dy)
    assert mixed["out"].dtype == torch.float16
    for key in mixed:
        assert key == "out" or mixed[key].dtype == torch.float32
        torch.testing.assert_close(mixed[key].half(), plain[key].half(), rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("name", CASE_NAMES)
def test_compiles_to_one_graph(name, dynamic, device, each_backend):
    op_checks.compiles(CASES[name], dynamic, device)


def test_packed_masks_compile(device, each_backend):
    torch._dynamo.reset()
    inputs = many(2, 5, 16, 24, device)
    packed = pack_masks(inputs.pop("masks"))
    compiled = torch.compile(masked_gated_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, masks=packed),
                               masked_gated_linear(**inputs, masks=packed))  # fmt: skip


@pytest.mark.parametrize("view", ("contiguous", "strided"))
def test_opcheck(view, device):
    def t(*shape):
        wide = torch.randn(*shape[:-1], 2 * shape[-1], device=device)
        return wide[..., ::2] if view == "strided" else wide[..., : shape[-1]].contiguous()

    x, w, dh = t(5, 16), t(24, 16), t(5, 24)
    logits, stack = t(2, 24, 16), torch.randn(3, 5, 24, device=device)
    planes = reference.pack_masks(logits)
    calls = [(pack, logits), (op.dx, stack, w, planes)]
    for wanted in ((True, True), (True, False), (False, True)):
        calls.append((op.fwd, x, w, planes, "gelu", *wanted))
        calls.append((op.dw, stack, x, w, planes, *wanted, torch.float32))
        calls.append((op.ev, dh, stack, "silu", wanted[0]))
    for checked, *args in calls:
        opcheck(checked, args, test_utils=("test_schema", "test_faketensor"))
    for checked, *args in calls[:5]:
        opcheck(checked, args, test_utils=("test_aot_dispatch_dynamic",))


def test_a_gradient_of_masks_alone(device, on_triton):
    inputs, dy = many(2, 5, 13, 24, device), draw(5, 24, device=device)
    call = lambda t: masked_gated_linear(**t)  # noqa: E731
    alone, full = (evaluate(call, inputs, dy, *wanted) for wanted in ((("masks",),), ()))
    assert torch.equal(alone["dmasks"], full["dmasks"])


def test_planes_of_any_width(device, each_backend):
    for width in (0, 1, 8, 9):
        logits = draw(2, 3, width, device=device)
        packed = pack_masks(logits)
        assert packed.shape == (2, 3, width) and torch.equal(packed.unpack(), logits > 0)


def test_planes_are_saved_and_loaded():
    packed, other = pack_masks(draw(2, 5, 13)), pack_masks(-draw(2, 5, 13))
    assert list(packed.state_dict()) == ["planes", "_extra_state"]
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.unpack(), packed.unpack())
    assert packed.to(torch.bfloat16).planes.dtype == torch.uint8
    assert repr(packed) == "PackedMasks(n_m=2, H=5, D=13)"
    for width in (12, 16):  # as many bytes as 13
        with pytest.raises(ValueError, match=f"must be masks of width 13, got width {width}$"):
            other.load_state_dict(pack_masks(torch.ones(2, 5, width)).state_dict())
    wide = {"planes": pack_masks(torch.ones(2, 5, 16)).planes}
    with pytest.raises(ValueError, match="PackedMasks: planes must have no bit set past width 13"):
        other.load_state_dict(wide)
    with pytest.raises(RuntimeError, match="Missing key.*_extra_state"):
        other.load_state_dict({"planes": packed.planes})
    with pytest.raises(RuntimeError, match="size mismatch for planes"):
        other.load_state_dict(pack_masks(torch.ones(1, 5, 13)).state_dict())
    with pytest.raises(TypeError, match="PackedMasks: planes must be a uint8 Tensor, got .*int32"):
        other.load_state_dict({"planes": packed.planes.int()})


def test_the_saved_width_has_a_value_whatever_the_default_device():
    packed = pack_masks(torch.ones(2, 5, 13))
    with torch.device("meta"):
        width = packed.state_dict()["_extra_state"]
    assert width.device.type == "cpu" and width.item() == 13


def test_inference_stores_h_alone(device, on_triton, monkeypatch):
    seen = []
    fwd = op.fwd
    monkeypatch.setattr(op, "fwd", lambda *a: seen.append(a[-2:]) or fwd(*a))
    inputs = MLP.inputs(4, 8, 8, torch.float32, device)
    fusedmlp.masked_gated_mlp(**inputs)
    with torch.no_grad():
        fusedmlp.masked_gated_mlp(**{k: t.requires_grad_() for k, t in inputs.items()})
    assert seen == [(True, False), (True, False)]
