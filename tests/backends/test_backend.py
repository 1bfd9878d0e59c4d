"""Which implementation runs: backend(), FUSEDMLP_BACKEND, explain(); and what importing costs."""

import os
import subprocess
import sys

import pytest
import torch
from layer_checks import assert_cheap

import fusedmlp
from fusedmlp.backends import choice, library
from fusedmlp.testing import CASES


def python(code, **env):
    """Run `code` in a fresh interpreter without this process's Triton settings."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSEDMLP_BACKEND")
    }
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True
    )


RUN = """
import torch, fusedmlp
x, w = torch.randn(3, 8), torch.randn(8, 8)
fusedmlp.mlp(x, w, w)
print(fusedmlp.explain())
"""


def test_auto_runs_the_reference_on_cpu_tensors():
    result = python(RUN)
    assert result.returncode == 0, result.stderr
    assert "cpu tensors: reference (no GPU kernel runs on CPU tensors)" in result.stdout
    assert "last launch" not in result.stdout


@pytest.mark.interpreter
def test_environment_chooses_the_backend():
    result = python(RUN, FUSEDMLP_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert "backend 'triton'" in result.stdout
    assert "cpu tensors: triton, in Triton's interpreter" in result.stdout
    assert "last launch of linear_act_fwd: tile 16x32x16" in result.stdout


def test_triton_without_gpu_or_interpreter_says_what_to_do():
    result = python(RUN, FUSEDMLP_BACKEND="triton")
    assert (
        "mlp: backend 'triton' needs CUDA tensors, got cpu; for Triton's interpreter"
        in result.stderr
    )


def test_a_backend_without_with_acts_until_another(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", "auto")
    fusedmlp.backend("reference")
    assert choice.chosen() == "reference"
    with fusedmlp.backend("triton"):
        assert choice.chosen() == "triton"
        with pytest.raises(ValueError, match="backend must be one of"):
            fusedmlp.backend("fast")
        assert choice.chosen() == "triton"
    assert choice.chosen() == "reference"
    assert repr(fusedmlp.backend("auto")) == "backend('auto')"
    assert choice.chosen() == "auto"


def test_a_backend_as_a_decorator_acts_during_calls(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", "auto")

    @fusedmlp.backend("reference")
    def inside():
        return choice.chosen()

    assert [choice.chosen(), inside(), choice.chosen(), inside()] == ["auto", "reference"] * 2


def test_explain_names_widths_that_no_fast_load_takes():
    """The Llama width of 8/3 is a multiple of nothing; the widths beside it are."""
    block = fusedmlp.FeedForward(64, mult=8 / 3, glu_variant="swiglu")
    (line,) = (line for line in fusedmlp.explain(block).splitlines() if "multiple of 8" in line)
    assert line == (
        "width 170 of net.2.weight is no multiple of 8: in 16 bits kernels take element loads and "
        "small tiles; 176 would have vector or TMA loads"
    )
    experts = fusedmlp.SwitchFFN(32, num_experts=3, ff_kwargs={"mult": 27 / 32})
    assert "width 27 of experts.net_3_weight is no multiple of 8" in fusedmlp.explain(experts)
    two = torch.nn.Sequential(block, fusedmlp.FeedForward(64, mult=170 / 64))
    assert "width 170 of 0.net.2.weight and 1 more is no" in fusedmlp.explain(two)
    for layer in (
        fusedmlp.FeedForward(64, mult=2.75, glu_variant="swiglu"),
        fusedmlp.GMLP(dim=32, dim_ff=64, seq_len=9, depth=1),
        torch.nn.Linear(7, 9),
    ):
        assert "multiple of 8" not in fusedmlp.explain(layer)


def test_unknown_backends():
    result = python(RUN, FUSEDMLP_BACKEND="cublas")
    assert (
        "FUSEDMLP_BACKEND: backend must be one of auto, triton, cuda, cutlass, reference, "
        "got 'cublas'" in result.stderr
    )
    with (
        pytest.raises(ValueError, match="backend: backend must be one of .*, got 'fast'"),
        fusedmlp.backend("fast"),
    ):
        pass


def test_backend_nests_and_survives_errors():
    assert choice.chosen() == "auto"
    with fusedmlp.backend("triton"):
        with pytest.raises(ZeroDivisionError), fusedmlp.backend("reference"):
            assert choice.chosen() == "reference"
            raise ZeroDivisionError
        assert choice.chosen() == "triton"
    assert choice.chosen() == "auto"


def test_backward_outside_the_context_is_right(device):
    """Autograd may run after backend() has closed: what was saved serves any backend."""
    case = CASES["gated_mlp"]
    inputs = {
        k: t.requires_grad_() for k, t in case.inputs(5, 16, 24, torch.float32, device).items()
    }
    with fusedmlp.backend("triton"):
        out = case.run(inputs)
    ours = torch.autograd.grad(out.sum(), list(inputs.values()))
    theirs = torch.autograd.grad(case.run_reference(inputs).sum(), list(inputs.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_public_names():
    assert set(fusedmlp.__all__) <= set(dir(fusedmlp))
    for name in fusedmlp.__all__:
        assert getattr(fusedmlp, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'fusedmlp' has no attribute 'gated_mlpp'"):
        _ = fusedmlp.gated_mlpp
    namespace = {}
    exec("from fusedmlp import *", namespace)
    assert namespace["gated_mlp"] is fusedmlp.gated_mlp


def test_import_costs_at_most_300_ms():
    code = "import time, torch; t = time.perf_counter(); import fusedmlp; "
    code += "print(time.perf_counter() - t)"
    seconds = [float(python(code).stdout) for _ in range(3)]
    assert min(seconds) <= 0.3


@pytest.mark.parametrize("module", ("ops.gated_mlp", "kernels.dense.gated_linear", "reference"))
def test_any_module_may_be_the_first_imported(module):
    done = python(f"import fusedmlp.{module}")
    assert done.returncode == 0, done.stderr


def test_a_probe_for_a_private_name_loads_nothing():
    """inspect, pickle and doctest ask for such names; `import *` asks for one that is there."""
    code = """
import sys, fusedmlp
print(hasattr(fusedmlp, "__wrapped__"), "fusedmlp._api" in sys.modules)
print("gated_mlp" in fusedmlp.__all__, "fusedmlp._api" in sys.modules)
"""
    assert python(code).stdout.split() == ["False", "False", "True", "True"]


def test_torch_and_triton_are_all_that_is_imported():
    """A Triton-only install needs nothing else."""
    code = """
import sys, torch, triton
before = set(sys.modules)
import fusedmlp, fusedmlp.layers
fusedmlp.gated_mlp
new = {m.partition(".")[0] for m in set(sys.modules) - before}
print(sorted(m for m in new if m not in sys.stdlib_module_names and m not in ("torch", "triton")))
"""
    assert python(code).stdout.strip() == "['fusedmlp']"


@pytest.mark.parametrize(
    "name", ("gated_act", "gated_mlp-bias", "gated_mlp-up_gate-bias", "mlp-bias")
)
def test_a_call_costs_at_most_15_us_over_pytorch(name):
    case = CASES[name]
    inputs = case.inputs(8, 64, 64, torch.float32)
    first = next(iter(inputs))
    absent = {"w_up": None} if "packed" in case.options else {}
    others = {**inputs, **absent}
    del others[first]
    assert_cheap(
        lambda x: case.fn(**{first: x}, **others, **case.options),
        lambda x: case.reference(**{first: x}, **others, **case.options),
        inputs[first],
    )


@pytest.mark.parametrize("here", (True, False), ids=("current", "other"))
def test_ops_run_on_their_tensors_gpu(here, monkeypatch):
    """Triton launches on the current GPU; the op must make that the tensors' own."""
    entered = []

    class Guard:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    class OnGpu:
        device = "cuda:1"

        def get_device(self):
            return 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1 if here else 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    bound = []
    monkeypatch.setattr(library.driver, "bind", bound.append)
    launched = library.on_its_device(lambda x, scale: scale)(OnGpu(), 7)
    assert launched == 7
    assert entered == ([] if here else ["cuda:1"])
    assert bound == ([1] if here else [])  # the guard changes the device, and so binds it


def test_float32_products_follow_pytorchs_setting():
    code = """
import torch
from fusedmlp.kernels.tiles import precision
matmul = torch.backends.cuda.matmul
seen = [precision(torch.float32)]
torch.set_float32_matmul_precision("high"); seen.append(precision(torch.float32))
torch.set_float32_matmul_precision("highest"); seen.append(precision(torch.float32))
matmul.fp32_precision = "tf32"; seen += [precision(torch.float32), precision(torch.bfloat16)]
print(*seen)
"""
    assert python(code).stdout.split() == ["ieee", "tf32", "ieee", "tf32", "ieee"]
