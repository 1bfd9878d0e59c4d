"""packed="interleaved": gate and up in turn, row by row, contiguous along D or, transposed, along
2H. What every Case must do, test_ops.py and test_moe_mlp.py say of it as well."""

import dataclasses

import interleaved_jobs
import op_checks
import pytest
import torch
from compiled import in_compiler
from op_checks import check, saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp.backends.cuda import gated_linear as cuda
from fusedmlp.backends.cuda.loader import Unfit
from fusedmlp.kernels.dense import gated_linear
from fusedmlp.kernels.moe import moe_mlp
from fusedmlp.packing import ORDERS, halves, interleaved, join_pair
from fusedmlp.testing import CASES, evaluate, floating
from fusedmlp.testing.moe import experts_case

NAMES = ("gated_act-interleaved", "gated_linear-interleaved-bias", "gated_mlp-interleaved-bias",
         "moe_mlp-interleaved-bias")  # fmt: skip
BLOCKS = NAMES[2:]
each_name = pytest.mark.parametrize("name", NAMES)
each_block = pytest.mark.parametrize("name", BLOCKS)


def transposed(inputs):
    """Weights as gpt-oss stores them, (E, D, 2H) and (E, H, D), handed over as views."""
    return {
        k: t.mT.contiguous().mT if k.startswith("w") or k == "g" else t for k, t in inputs.items()
    }


# ---- the layout


def test_halves_are_views_of_the_even_and_the_odd():
    t = torch.arange(24).view(4, 6)
    for dim in (0, 1, -1, -2):
        gate, up = halves(t, "interleaved", dim)
        even, odd = torch.arange(0, t.shape[dim], 2), torch.arange(1, t.shape[dim], 2)
        assert torch.equal(gate, t.index_select(dim, even))
        assert torch.equal(up, t.index_select(dim, odd))
        assert gate.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()


@pytest.mark.parametrize("packed", ORDERS)
def test_joining_is_the_inverse_of_halving(packed):
    t = torch.randn(3, 10)
    pair = torch.stack(halves(t, packed))
    assert torch.equal(join_pair(pair, packed), t)
    assert torch.equal(join_pair(pair[:, 0], packed), t[0])


def test_neighbours_are_recognised_and_nothing_else():
    t = torch.arange(24.0).view(4, 6)
    gate, up = halves(t, "interleaved")
    both = interleaved(gate, up)
    assert torch.equal(both, t)
    assert both.data_ptr() == t.data_ptr()
    assert torch.equal(interleaved(gate.t(), up.t(), 0), t.t())
    assert interleaved(gate, None) is None
    assert interleaved(up, gate) is None  # up first
    assert interleaved(gate, gate) is None
    assert interleaved(gate, t[:, 3:]) is None  # other strides
    assert interleaved(*halves(t, "gate_up")) is None
    assert interleaved(*halves(t, "interleaved", 0), 0) is None  # rows apart by six


# ---- numbers


@pytest.mark.parametrize("shape", ((37, 40, 72), (35, 67, 101), (3, 160, 88), (1, 96, 80)), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@each_name
def test_transposed(name, dtype, shape, device, on_triton):
    case = CASES[name]
    check(case, transposed(case.inputs(*shape, dtype, device)))


@each_block
def test_recompute(name, device, on_triton):
    case = CASES[name]
    case = dataclasses.replace(case, options={**case.options, "recompute": True})
    check(case, transposed(case.inputs(19, 24, 40, torch.float32, device)))


def test_two_experts_a_token(device, on_triton):
    case = experts_case("moe_mlp-top2", 4, "skewed", 2, bias=True, packed="interleaved")
    for dtype in (torch.float32, torch.bfloat16):
        check(case, transposed(case.inputs(21, 40, 24, dtype, device)))


@each_name
def test_a_clamped_gate(name, device, on_triton):
    """gpt-oss: the up factor has a slope of its own, on both sides of its clamp."""
    case = CASES[name]
    inputs = case.inputs(33, 40, 56, torch.float32, device, activation="swiglu_oai")
    for key in {"g", "x"} & set(inputs):
        inputs[key].mul_(8)
    check(case, transposed(inputs), activation="swiglu_oai")


@pytest.mark.parametrize("shape", ((1, 1, 1), (17, 1, 33), (17, 33, 1), (5, 2, 2)), ids=str)
@each_name
def test_sizes_of_one(name, shape, device, on_triton):
    """Where strides of one row or column say nothing, and neighbours may lie together anyhow."""
    case = CASES[name]
    inputs = case.inputs(*shape, torch.float32, device)
    check(case, inputs)
    check(case, transposed(inputs))


@each_name
def test_the_same_as_halves_one_behind_the_other(name, device, each_backend):
    case = CASES[name]
    inputs = transposed(case.inputs(9, 24, 16, torch.float32, device))
    out = case.run(inputs)
    behind = dict(inputs)
    for key, dim in (("g", -1), ("w_gate", -2), ("b_gate", -1)):
        if key in behind:
            behind[key] = torch.cat(halves(inputs[key], "interleaved", dim), dim)
    torch.testing.assert_close(case.run(behind, packed="gate_up"), out)


@each_name
def test_second_derivative(name, device):
    case = CASES[name]
    inputs = transposed(case.inputs(3, 8, 4, torch.float32, device))
    names = list(floating(inputs))

    def penalised():
        leaves = {k: t.detach().requires_grad_(k in names) for k, t in inputs.items()}
        out = case.run(leaves)
        wanted = [leaves[k] for k in names]
        first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(d.square().sum() for d in first), wanted)

    results = []
    for backend in ("reference", "triton"):
        with fusedmlp.backend(backend):
            results.append(penalised())
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("name", (NAMES[0], NAMES[2]))
def test_compiles_to_one_graph(name, dynamic, device, each_backend):
    op_checks.compiles(CASES[name], dynamic, device)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@each_block
def test_transposed_weights_compile_to_one_graph(name, dynamic, device, on_triton):
    torch._dynamo.reset()
    case = CASES[name]
    inputs = transposed(case.inputs(6, 16, 8, torch.float32, device))
    dy = torch.randn(6, 16, device=device)
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = evaluate(case.run, inputs, dy)
    for key, t in evaluate(compiled, inputs, dy).items():
        torch.testing.assert_close(t, eager[key])


# ---- bytes


@each_name
def test_no_more_is_saved_than_of_halves_one_behind_the_other(name, device, on_triton):
    case = CASES[name]
    saved = {}
    for packed in ORDERS:
        one = dataclasses.replace(case, options={"packed": packed})
        saved[packed] = saved_bytes_of(one, one.inputs(9, 16, 24, torch.float32, device))
    assert saved["interleaved"] == saved["gate_up"] == saved["up_gate"]


def saved_bytes_of(case, inputs):
    """Integers take no gradient."""
    if "expert" not in inputs:
        return saved_bytes(case, inputs)
    fixed = {"expert": inputs.pop("expert")}
    return saved_bytes(dataclasses.replace(case, adapt=lambda t, f: CASES[case.name].adapt(
        {**fixed, **t}, f)), inputs)  # fmt: skip


COPYING = {"clone", "copy_", "_to_copy", "cat", "stack", "index", "index_select", "gather"}


class Copies(TorchDispatchMode):
    """Elements of what PyTorch copies, each copy by its operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in COPYING:
            self.seen.append((name, out.numel()))
        return out


@each_block
def test_no_copy_of_a_transposed_weight_or_of_its_gradient(name, device, on_triton):
    """The parameter is (D, 2H): neither it nor its gradient, nor dgu, is copied into another
    layout, and autograd takes the gradient as it is. Biases, which are joined, are smaller."""
    case = CASES[name]
    M, D, H = 40, 24, 32
    inputs = case.inputs(M, D, H, torch.float32, device)
    stored = {
        k: (t.mT.contiguous() if k.startswith("w") else t).requires_grad_(t.is_floating_point())
        for k, t in inputs.items()
    }
    with Copies() as copies:
        views = {k: t.mT if k.startswith("w") else t for k, t in stored.items()}
        case.run(views).backward(torch.ones(M, D, device=device))
    assert all(numel < D * H for _, numel in copies.seen), copies.seen
    for key, t in stored.items():
        if key.startswith("w"):
            assert t.grad.is_contiguous()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "module", "kernel"),
    (("gated_mlp-interleaved-bias", gated_linear, "_fwd_kernel"),
     ("moe_mlp-interleaved-bias", moe_mlp, "_up_kernel")),
)  # fmt: skip
def test_one_box_takes_both_in_either_layout(name, module, kernel, device, on_triton, monkeypatch):
    """Contiguous along D, a box of three dimensions over both; along 2H, one of twice the width."""
    seen = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: (
                seen.append((args, options)) or own[grid](*args, **options)
            )

    own = getattr(module, kernel)
    monkeypatch.setattr(module, kernel, Spy())
    case = CASES[name]
    inputs = case.inputs(40, 48, 64, torch.bfloat16, device)
    for given, stacked in ((inputs, True), (transposed(inputs), False)):
        seen.clear()
        case.run(given)
        ((args, options),) = seen
        w_gate, w_up = args[1:3]
        assert options["TMA"]
        assert w_up is None
        assert (options["STACKED"], options["INTERLEAVED"]) == (stacked, not stacked)
        assert w_gate.base.data_ptr() == given["w_gate"].data_ptr()
        if not stacked:
            assert w_gate.block_shape[-1] == 2 * options["BLOCK_N"]
            assert not options["GATE_K_MAJOR"]


# ---- other implementations


def test_the_cuda_kernel_refuses_and_says_why():
    dy, down, gu = torch.ones(8, 16), torch.ones(16, 8), torch.ones(2, 8, 8)
    with pytest.raises(
        Unfit,
        match="gated_linear_bwd: backend 'cuda' needs packed to be None, 'gate_up' or 'up_gate', "
        "got 'interleaved'; backend.'triton'. takes it",
    ):
        cuda.gated_linear_bwd(None, dy, down, gu, "silu", "interleaved", True, True)


@pytest.mark.parametrize(
    "arch", ("sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100")))
)
@each_name
def test_as_compiled_for_a_gpu(name, arch):
    """Forward and backward by the tolerance rule, in two orders of what hardware leaves open."""
    variants = ("large", "large transposed", "ragged") if name in BLOCKS else ("ragged",)
    rows = in_compiler(interleaved_jobs.findings, arch, name, variants)
    assert [what for what, _, _ in rows] == list(variants)
    for what, findings, launched in rows:
        assert not findings, (what, findings)
        assert launched
