"""backend("cuda") without a GPU: what is handed to the extension, who is chosen when, and what is
said where it cannot serve. The kernels' own numbers are tests/simt's and the device's."""

import importlib
import importlib.util
import re
import types

import cuda_fake
import pytest
import torch
from cuda_fake import installed
from layer_checks import assert_cheap
from op_checks import PLAIN, unlike

import fusedmlp
from fusedmlp.backends import choice
from fusedmlp.backends.cuda import gated_linear as cuda_gated_linear, loader
from fusedmlp.bench.report import ledger
from fusedmlp.ops import gated_linear, linear_act
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.testing import CASES, assert_close_to, compare, evaluate, poison

pytestmark = pytest.mark.interpreter  # the fake stands for a GPU on CPU tensors

OWN = loader.ops_with_kernels(portable=False)
# Interleaved halves are refused, which a test of its own shows.
GEMMS = {name: case for name, case in CASES.items() if case.op in OWN and case.fits_cuda}
bf16 = torch.bfloat16


def check(case, inputs, **options):
    for name, numbers in compare(case, inputs, **options).items():
        assert_close_to(*numbers, name=name)


# ---- what the extension is handed


@pytest.mark.parametrize("shape", [(37, 40, 72), (1, 16, 8), (2, 8, 16)], ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", GEMMS.values(), ids=GEMMS)
def test_numbers_through_the_fake(case, dtype, shape):
    with installed() as calls, fusedmlp.backend("cuda"), poison():
        check(case, case.inputs(*shape, dtype))
    launched = {kernel for kernel, _ in calls}
    assert launched == set(OWN[case.op])
    for kernel, numbers in calls:
        names = cuda_fake.FWD if kernel.endswith("_fwd") else cuda_fake.BWD
        p = dict(zip(names, numbers, strict=True))
        assert (p["stream"], p["multiprocessors"], p["variant"]) == (77, 132, -1)


TAKE_ONE = {"gated_mlp-up_gate-bias": map(unlike, ACTIVATIONS), "mlp-bias": map(unlike, PLAIN)}


@pytest.mark.parametrize("name, activation", [(n, a) for n, rows in TAKE_ONE.items() for a in rows])
def test_every_activation_by_its_own_number_and_scalars(name, activation):
    case = CASES[name]
    inputs = case.inputs(5, 16, 24, bf16, activation=activation)
    with installed(), fusedmlp.backend("cuda"):
        check(case, inputs, activation=activation)


def test_interleaved_halves_are_refused_with_the_reason():
    """Forward takes rows of gate and up apart, as any strided pair, but no biases that take turns;
    backward, which would write dg and du in turn, refuses, and auto takes Triton."""
    case = CASES["gated_mlp-interleaved-bias"]
    inputs = case.inputs(6, 16, 24, bf16)
    with installed(), fusedmlp.backend("cuda"):
        with pytest.raises(loader.Unfit, match="needs b_gate to be contiguous .* got stride 2"):
            case.run(inputs)
        inputs["b_gate"] = None
        dy = torch.ones(6, 16, dtype=bf16)
        inputs["w_gate"].requires_grad_()
        out = case.run(inputs)
        with pytest.raises(
            loader.Unfit, match="'gate_up' or 'up_gate', got 'interleaved'; backend.'triton'."
        ):
            out.backward(dy)
        inputs["w_gate"] = inputs["w_gate"].detach().t().contiguous().t()
        with pytest.raises(loader.Unfit, match="w_gate .* got strides"):
            case.run(inputs)


def test_strides_that_tma_takes():
    """Rows of a wider tensor, halves of one weight, one row of any stride."""
    case = CASES["gated_mlp"]
    inputs = case.inputs(6, 16, 24, bf16)
    wide = {k: torch.cat([t, t], 1)[:, : t.shape[1]] for k, t in inputs.items()}
    one = {**wide, "x": inputs["x"].as_strided((1, 16), (1, 1))}
    with installed(), fusedmlp.backend("cuda"):
        check(case, wide)
        check(case, one)


@pytest.mark.parametrize("M, H", [(0, 16), (3, 0)])
@pytest.mark.parametrize("name", ("gated_mlp-bias", "mlp-bias"))
def test_nothing_to_do_launches_nothing(name, M, H):
    case = CASES[name]
    with installed() as calls, fusedmlp.backend("cuda"):
        results = evaluate(case.run, case.inputs(M, 16, H, bf16), torch.ones(M, 16, dtype=bf16))
    assert not calls
    assert all((t == 0).all() for k, t in results.items() if k not in ("out", "db_down", "db_out"))


def test_compiled_code_chooses_at_launch():
    case = CASES["gated_mlp-bias"]
    inputs = case.inputs(6, 16, 24, bf16)
    dy = torch.ones(6, 16, dtype=bf16)
    torch._dynamo.reset()
    compiled = torch.compile(case.run, backend="aot_eager", fullgraph=True)
    with installed() as calls, fusedmlp.backend("cuda"):
        eager = evaluate(case.run, inputs, dy)
        before = len(calls)
        for name, t in evaluate(compiled, inputs, dy).items():
            torch.testing.assert_close(t, eager[name])
        assert len(calls) == 2 * before > 0


def test_a_call_costs_at_most_15_us_over_pytorch():
    """Checks, choice, allocations and arguments; what the extension does with them is left out."""
    case = CASES["gated_linear-bias"]
    inputs = case.inputs(8, 64, 64, torch.float32)
    halves = {name: t.to(bf16) for name, t in inputs.items()}
    same = inputs["x"]
    with installed() as calls, fusedmlp.backend("cuda"):
        extension, _ = loader.load()
        extension.OPS = {key: lambda *numbers: None for key in extension.OPS}
        assert_cheap(
            lambda x: (case.fn(**halves), same)[1],
            lambda x: (case.reference(**inputs), same)[1],
            inputs["x"],
        )
    assert not calls


# ---- bad input


def spoiled(name, spoil, case="gated_mlp"):
    inputs = CASES[case].inputs(6, 16, 24, bf16)
    return {**inputs, name: spoil(inputs[name])}


def off_by(count):
    return lambda t: torch.cat([t.flatten(), t.flatten()[:count]])[count:].view_as(t)


def apart_by(width):
    return lambda t: torch.cat([t, t], 1)[:, :width].contiguous()[:, : t.shape[1]]


UNFIT = [
    ("x", off_by(1), "gated_linear_fwd: backend 'cuda' needs x to start on 16 bytes"),
    ("x", off_by(4), "needs x .* 8 bytes off"),
    ("x", apart_by(20), r"needs x .* got strides \(20, 1\)"),
    ("x", lambda t: t.t().contiguous().t(), r"needs x .* got strides \(1, 6\) for shape \(6, 16\)"),
    ("x", lambda t: t[:1].expand(6, 16), r"needs x .* got strides \(0, 1\)"),
    ("w_gate", off_by(1), "gated_linear_fwd: backend 'cuda' needs w_gate to start on 16 bytes"),
    ("w_up", apart_by(17), r"needs w_up .* got strides \(17, 1\)"),
    ("w_down", lambda t: t.t().contiguous().t(), "gated_linear_bwd: backend 'cuda' needs w_down"),
]


@pytest.mark.parametrize("name, spoil, message", UNFIT)
def test_tensors_that_tma_cannot_take(name, spoil, message):
    inputs = spoiled(name, spoil)
    with installed(), fusedmlp.backend("cuda"):
        with pytest.raises(ValueError, match=message) as raised:
            evaluate(CASES["gated_mlp"].run, inputs, torch.ones(6, 16, dtype=bf16))
        assert "backend('triton') takes it" in str(raised.value)


def arguments_of(kernel):
    """By name, each as TMA takes it."""
    x, g = (torch.ones(6, n, dtype=bf16) for n in (16, 24))
    w, b = torch.ones(24, 16, dtype=bf16), torch.ones(24, dtype=bf16)
    return {
        "gated_linear_fwd": {"x": x, "w_gate": w, "w_up": w, "b_gate": b, "b_up": b},
        "linear_act_fwd": {"x": x, "w": w, "b": b},
        "gated_linear_bwd": {"dy": x, "w_down": w.t().contiguous(), "g": g, "u": g},
        "linear_act_bwd": {"dy": x, "w_out": w.t().contiguous(), "z": g},
    }[kernel]


NAMED = [
    (f"{op}_{phase}", name)
    for op in ("gated_linear", "linear_act") for phase in ("fwd", "bwd")
    for name in arguments_of(f"{op}_{phase}") if name != "dy"  # of which a copy is made
]  # fmt: skip


@pytest.mark.parametrize("kernel, name", NAMED)
def test_what_is_not_taken_is_called_by_its_name(kernel, name):
    tensors = arguments_of(kernel)
    t = tensors[name]
    tensors[name] = off_by(1)(t) if t.dim() > 1 else torch.cat([t, t])[::2]
    arguments = list(tensors.values())
    options = ["silu", True, True]
    if kernel == "gated_linear_bwd":
        arguments[2:], options[1:1] = [tuple(arguments[2:])], [None]
    launch = getattr(cuda_gated_linear, kernel)
    with installed(), pytest.raises(loader.Unfit, match=f"^{kernel}: backend .* needs {name} to "):
        launch(lambda *numbers: None, *arguments, *options)


@pytest.mark.parametrize("kernel", [f"{op}_bwd" for op in ("gated_linear", "linear_act")])
def test_backward_asks_for_sizes_too(kernel):
    tensors = [t[..., :12] if t.shape[-1] == 16 else t[:12] for t in arguments_of(kernel).values()]
    op = {"gated_linear_bwd": gated_linear, "linear_act_bwd": linear_act}[kernel]
    pair = (torch.stack(tensors[2:]), "silu", None) if op is gated_linear else (tensors[2], "silu")
    refused = pytest.raises(loader.Unfit, match=f"{kernel}: .* multiples of 8, .* got D=12, H=24")
    with installed(), fusedmlp.backend("cuda"), refused:
        op.bwd(tensors[0], tensors[1], *pair, True, True)


@pytest.mark.parametrize(
    "D, H, got", [(16, 20, "D=16, H=20"), (12, 24, "D=12, H=24"), (0, 8, "D=0, H=8")]
)
def test_sizes_that_tma_cannot_take(D, H, got):
    case = CASES["linear_act"]
    with (
        installed(),
        fusedmlp.backend("cuda"),
        pytest.raises(
            ValueError, match=f"linear_act_fwd: .* multiples of 8, and D not 0, got {got}"
        ),
    ):
        case.run(case.inputs(3, D, H, bf16))


def test_other_limits():
    x, w, b = (torch.ones(*shape, dtype=bf16) for shape in ((2, 8), (8, 8), (16,)))
    with installed(), fusedmlp.backend("cuda"):
        with pytest.raises(ValueError, match="needs b to be contiguous .*got stride 2"):
            fusedmlp.linear_act(x, w, b[::2])
        with pytest.raises(ValueError, match="start on 4 bytes, got stride 1, 2 bytes off"):
            fusedmlp.linear_act(x, w, b[1:9])
        del loader.load()[0].ACTIVATIONS["silu"]
        with pytest.raises(ValueError, match="needs activation to be one of .*, got 'silu'"):
            fusedmlp.linear_act(x, w, activation="silu")


@pytest.mark.parametrize("op", (linear_act, gated_linear), ids=lambda op: op.__name__)
def test_sizes_of_31_bits(op):
    """What fits is refused for what stands in the way next: its rows lie one on the other."""
    one, last = torch.ones(1, dtype=bf16), 2**31 - 8
    for sizes in ((last, 8, 8), (8, last, 8), (8, 8, last)):
        for past in (0, 8):
            M, D, H = (n + past * (n == last) for n in sizes)
            x, *w = one.expand(M, D), *(one.expand(H, D) for _ in range(1 + (op is gated_linear)))
            needs = rf"below 2\^31, got M={M}, D={D}, H={H}" if past else "x to start on 16 bytes"
            refused = pytest.raises(loader.Unfit, match=needs)
            with installed(), fusedmlp.backend("cuda"), refused:
                op.fwd(x, *w, *(None for _ in w), "silu", False, False)


def test_float32_is_refused_before_anything_runs():
    case = CASES["mlp"]
    with (
        installed() as calls,
        fusedmlp.backend("cuda"),
        pytest.raises(TypeError, match="mlp: x must be bfloat16 or float16 on backend 'cuda', got"),
    ):
        case.run(case.inputs(6, 16, 24, torch.float32))
    assert not calls


MISSING = "the CUDA extension is not built: reinstall fusedmlp with nvcc"
ABSENT = [
    ({"loaded": (None, MISSING)}, "gated_mlp", MISSING),
    ({"gpu": 80}, "gated_mlp", "holds gated_linear_fwd for sm_90a, and this GPU is sm_80"),
    ({"gpu": 100}, "mlp", "holds linear_act_fwd for sm_90a, and this GPU is sm_100"),
    (
        {"gpu": 103, "archs": ("sm_100a",)},
        "mlp",
        "for sm_100a, and this GPU is sm_103, but code for sm_NNa runs on that very capability",
    ),
    (
        {"gpu": 100, "archs": ("sm_120", "sm_90a")},
        "mlp",
        "for sm_120, sm_90a, and this GPU is",
    ),
    (
        {"kernels": ("gated_linear_fwd",)},
        "gated_mlp",
        "holds no gated_linear_bwd: it was built for",
    ),
    ({"kernels": ()}, "linear_act", "it was built for sm_90a; reinstall .* FUSEDMLP_CUDA_ARCHS"),
    ({}, "gated_act", "it has no CUDA kernel"),
]


@pytest.mark.parametrize(
    "options, op, message", ABSENT, ids=[f"{o}-{m[:20]}" for _, o, m in ABSENT]
)
def test_an_absent_kernel_says_why_and_what_to_do(options, op, message):
    case = CASES[op]
    inputs = case.inputs(6, 16, 24, bf16)
    with installed(**options) as calls:
        with (
            fusedmlp.backend("cuda"),
            pytest.raises(
                RuntimeError, match=f"{op}: backend 'cuda' was asked for, but .*{message}"
            ),
        ):
            case.run(inputs)
        with fusedmlp.backend("triton"):
            case.run(inputs)
        assert not calls


def test_what_a_launcher_says_is_raised_as_it_is():
    def fail(*numbers):
        raise RuntimeError("gated_linear_fwd (sm_90a): the stream is not valid")

    case = CASES["gated_linear"]
    with installed(), fusedmlp.backend("cuda"):
        loader.load()[0].OPS["gated_linear_fwd", "sm_90a"] = fail
        with pytest.raises(RuntimeError, match="the stream is not valid"):
            case.run(case.inputs(6, 16, 24, bf16))


# ---- auto

BOTH = (("gated_linear_fwd", "sm_90a"), ("gated_linear_bwd", "sm_90a"))


def launch(M=40, dtype=bf16, spoil=lambda t: t):
    """The op itself, as autograd and compiled code reach it, on CPU tensors under the fake."""
    x, w = torch.ones(M, 16, dtype=dtype), torch.ones(24, 16, dtype=dtype)
    gated_linear.fwd(spoil(x), w, w, None, None, "silu", True, False)
    return choice.SERVED["gated_linear_fwd"]


def test_auto_takes_cuda_only_where_it_is_proven():
    with installed():
        assert launch() == "triton"
    with installed(proven=BOTH) as calls:
        assert launch() == "cuda" and len(calls) == 1
        assert launch(dtype=torch.float32) == "triton"
        with fusedmlp.backend("triton"):
            assert launch() == "triton"
    with installed(proven=BOTH, gpu=100, archs=("sm_90a", "sm_100a")):
        assert launch() == "triton"
    with installed(proven=BOTH, loaded=(None, MISSING)):
        assert launch() == "triton"


def test_auto_goes_to_triton_where_the_shape_does_not_fit_and_says_so():
    with installed(proven=BOTH) as calls:
        launch(spoil=off_by(1))
        assert "last launch of gated_linear_fwd: tile " in fusedmlp.explain()
        assert ", not cuda: gated_linear_fwd: backend 'cuda' needs x to start" in fusedmlp.explain()
        assert launch(M=16).startswith("triton, not cuda: ")
        assert not calls
        launch()
        assert "last launch of gated_linear_fwd: cuda" in fusedmlp.explain()


OLD = "needs an NVIDIA driver for CUDA 13.0 or newer, got one for CUDA 12.8"


def test_an_old_driver_is_unfit():
    """The runtime is linked in, and runs on no driver of an older major version."""
    with installed(proven=BOTH, driver=12080) as calls:
        assert OLD in launch() and launch().startswith("triton, not cuda: ")
        told = f"^gated_linear_fwd: backend 'cuda' {OLD}; backend\\('triton'\\) runs$"
        with fusedmlp.backend("cuda"), pytest.raises(loader.Unfit, match=told):
            launch()
        assert f"sm_90a, {OLD}: gated_linear_bwd" in "\n".join(loader.describe(90))
        assert not calls
    for enough in (0, 13000, 14000):  # 0: no driver, whose launches fail by themselves
        with installed(proven=BOTH, driver=enough):
            assert launch() == "cuda"


def test_ptx_wants_a_driver_as_new_as_the_build():
    """sm_80's code runs on sm_86 as it is and on sm_120 by its PTX."""
    extension = types.SimpleNamespace(CUDA="13.2.51", ARCHS="sm_80 sm_90a sm_100f")
    for capability, driver, fits in (
        (86, 13000, True), (90, 13000, True), (90, 12090, False), (103, 13000, True),
        (120, 13000, False), (120, 13020, True),
    ):  # fmt: skip
        with installed(driver=driver):
            assert (not loader.too_old(extension, capability)) == fits


def test_b300_takes_the_kernels_of_its_family():
    with installed(gpu=103, archs=("sm_90a", "sm_100f")) as calls, fusedmlp.backend("cuda"):
        assert launch() == "cuda" and len(calls) == 1
    with (
        installed(gpu=110, archs=("sm_100f",)),
        fusedmlp.backend("cuda"),
        pytest.raises(RuntimeError, match=r"sm_110, but .* for sm_NNf on it and newer ones"),
    ):
        launch()


class OnGpu:
    """As much of a CUDA tensor as pick() looks at."""

    is_cuda, dtype, device = True, bf16, torch.device("cpu")


def test_pick():
    x = OnGpu()
    with installed():
        assert choice.pick("gated_mlp", x) == "triton"
        with fusedmlp.backend("cuda"):
            assert choice.pick("gated_mlp", x) == "cuda"
    with installed(proven=BOTH):
        assert choice.pick("gated_mlp", x) == "cuda"
        assert choice.pick("mlp", x) == choice.pick("gated_act", x) == "triton"
        with fusedmlp.backend("triton"):
            assert choice.pick("gated_mlp", x) == "triton"
    with installed(proven=BOTH[:1]):
        assert choice.pick("gated_linear", x) == "cuda"
        assert choice.pick("gated_mlp", x) == "triton"


# ---- the extension itself


def test_explain_says_what_there_is():
    with installed(loaded=(None, MISSING)):
        assert f"cuda backend: none: {MISSING}" in fusedmlp.explain()
    with installed(archs=("sm_90a", "sm_100a")):
        text = fusedmlp.explain()
    assert "cuda backend: built with CUDA 13.0 for sm_90a sm_100a" in text
    assert re.search("sm_90a, needs such a GPU: gated_linear_bwd, gated_linear_fwd", text)
    with installed(archs=("sm_90a", "sm_100a"), proven=BOTH[1:]):
        text = "\n".join(loader.describe(90))
    assert "sm_90a, taken by auto where it takes the tensors: gated_linear_bwd" in text
    assert (
        "sm_90a, opt-in by backend('cuda'): no device record has passed yet: gated_linear_fwd"
        in text
    )
    assert "sm_100a, not for this GPU, sm_90: gated_linear_bwd" in text


def test_why_the_extension_is_not_there(monkeypatch):
    def find(spec, failure=None):
        def fail(name):
            raise failure

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(importlib, "import_module", fail)
        loader.load.cache_clear()
        try:
            assert not loader.available()
            return loader.load()[1]
        finally:
            loader.load.cache_clear()

    assert find(None).startswith(MISSING)
    why = find(object(), ImportError("libc.so.6: version `GLIBC_2.99' not found"))
    assert why.startswith("the CUDA extension cannot be loaded (libc.so.6: version `GLIBC_2.99'")
    assert why.endswith("reinstall fusedmlp with nvcc on PATH and FUSEDMLP_CUDA=1")


def test_architectures_and_who_they_serve():
    for arch, capability, serves in (
        ("sm_90a", 90, True), ("sm_90a", 100, False), ("sm_100a", 100, True),
        ("sm_100a", 103, False), ("sm_80", 80, True), ("sm_80", 120, True), ("sm_80", 75, False),
        ("sm_100f", 100, True), ("sm_100f", 103, True), ("sm_100f", 110, False),
        ("sm_103f", 100, False), ("sm_120f", 121, True),
    ):  # fmt: skip
        assert loader.serves(arch, capability) == serves


# ---- the ledger


def unproven(proven, ledgers):
    """What no ledger shows of `proven`: passing checks on backend cuda, on such a GPU, of an op
    that launches the kernel, in each dtype, and no failing one."""
    missing = []
    for kernel, arch in proven:
        capability = f"{int(arch.strip('sm_af')) / 10}"
        ops = [op for op, kernels in OWN.items() if kernel in kernels]
        checks = [
            record
            for book in ledgers
            if book.machine["capability"] == capability
            for record in book.of_kind("check")
            if record["backend"] == "cuda" and record["op"] in ops
            if record.get("variant") is None  # a forced one is not what auto would take
        ]
        passed = {record["dtype"] for record in checks if record["passed"]}
        if passed != {"bfloat16", "float16"} or not all(r["passed"] for r in checks):
            missing.append((kernel, arch))
    return missing


def test_what_auto_takes_is_in_the_ledger():
    assert not unproven(loader.PROVEN, ledger.load_all())


def test_the_ledger_is_asked_for_device_checks():
    def book(capability, *rows):
        records = [
            {"kind": "check", "op": op, "backend": backend, "dtype": dtype, "passed": passed}
            for op, backend, dtype, passed in rows
        ]
        machine = {"gpu": "H100", "capability": capability}
        return ledger.Ledger(machine, "0", "2026-01-01", records=records)

    good = [("gated_mlp", "cuda", d, True) for d in ("bfloat16", "float16")]
    assert not unproven(BOTH, [book("9.0", *good)])
    for bad in (
        [book("10.0", *good)],
        [book("9.0", good[0])],
        [book("9.0", *good, ("gated_mlp", "cuda", "bfloat16", False))],
        [book("9.0", *(("gated_mlp", "triton", d, True) for d in ("bfloat16", "float16")))],
        [book("9.0", *(("mlp", "cuda", d, True) for d in ("bfloat16", "float16")))],
    ):
        assert unproven(BOTH, bad) == list(BOTH)
