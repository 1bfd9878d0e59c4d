"""backend("cutlass") without a GPU: what is handed to the extension, and what is said where it
cannot serve. The kernels themselves are in test_cutlass_ptx.py."""

import importlib
import importlib.util

import cutlass_fake
import pytest
import torch
from cutlass_fake import installed

import fusedmlp
from fusedmlp.backends import choice
from fusedmlp.backends.cuda.loader import Unfit
from fusedmlp.backends.cutlass import loader
from fusedmlp.backends.op import OPS
from fusedmlp.bench.rivals import RIVALS
from fusedmlp.bench.work import Work
from fusedmlp.ops import gated_linear, linear_act
from fusedmlp.testing import CASES, assert_close_to, compare, poison

pytestmark = pytest.mark.interpreter  # the fake stands for a GPU on CPU tensors

bf16 = torch.bfloat16
SERVED = {name: kernels for name in OPS if (kernels := loader.kernels_of(name))}
SERVED_CASES = {n: case for n, case in CASES.items() if case.op in SERVED and not case.adapted}


def test_which_ops_have_a_kernel():
    assert SERVED == {
        "gated_linear": ("gated_linear_fwd",), "gated_mlp": ("gated_linear_fwd",),
        "linear_act": ("linear_act_fwd",), "mlp": ("linear_act_fwd",),
    }  # fmt: skip


# ---- what the extension is handed


@pytest.mark.parametrize("shape", [(37, 40, 96), (1, 16, 32)], ids=str)
@pytest.mark.parametrize("case", SERVED_CASES.values(), ids=SERVED_CASES)
def test_numbers_through_the_fake(case, shape):
    """Forward, every layout of the weights among them; interleaved biases alone are refused."""
    inputs = case.inputs(*shape, bf16)
    with installed() as calls, fusedmlp.backend("cutlass"), poison():
        if case.options.get("packed") == "interleaved" and "b_gate" in inputs:
            with pytest.raises(Unfit, match="'cutlass' needs b_gate to be contiguous, got stride"):
                compare(case, inputs, backward=False)
            return
        for name, numbers in compare(case, inputs, backward=False).items():
            assert_close_to(*numbers, name=name)
    assert {kernel for kernel, _ in calls} == set(SERVED[case.op])
    for _, numbers in calls:
        p = dict(zip(cutlass_fake.FWD, numbers, strict=True))
        assert (p["stream"], p["multiprocessors"], p["h"] != 0) == (77, 132, True)


@pytest.mark.parametrize("activation", ["gelu", "swiglu_oai(limit=1.25, alpha=1.5)"])
def test_what_training_stores(activation):
    x, w = torch.randn(5, 16, dtype=bf16), torch.randn(2, 32, 16, dtype=bf16)
    with installed() as calls, fusedmlp.backend("cutlass"):
        h, gu = gated_linear.fwd(x, w[0], w[1], None, None, activation, False, True)
    assert h.shape == (0, 32)
    ((_, numbers),) = calls
    assert not dict(zip(cutlass_fake.FWD, numbers, strict=True))["h"]
    for got, weight in zip(gu, w, strict=True):
        assert_close_to(got, x.double() @ weight.double().t(), x @ weight.t())


def test_z_alone():
    """sm_100's epilogue always stores h, so that it gets memory for it."""
    x, w = torch.randn(5, 16, dtype=bf16), torch.randn(24, 16, dtype=bf16)
    with installed() as calls, fusedmlp.backend("cutlass"):
        h, z = linear_act.fwd(x, w, None, "gelu", False, True)
    assert h.shape == (0, 24)
    assert_close_to(z, x.double() @ w.double().t(), x @ w.t())
    ((_, numbers),) = calls
    assert dict(zip(cutlass_fake.FWD, numbers, strict=True))["h"]


def test_no_rows_launch_nothing():
    x, w = torch.empty(0, 16, dtype=bf16), torch.randn(24, 16, dtype=bf16)
    with installed() as calls, fusedmlp.backend("cutlass"):
        assert fusedmlp.linear_act(x, w).shape == (0, 24)
    assert not calls


# ---- where it cannot serve


def call(x=None, w_gate=None, w_up=None, **options):
    x = torch.ones(4, 16, dtype=bf16) if x is None else x
    w_gate = torch.ones(32, 16, dtype=bf16) if w_gate is None else w_gate
    w_up = torch.ones(32, 16, dtype=bf16) if w_up is None else w_up
    return fusedmlp.gated_linear(x, w_gate, w_up, **options)


def off_by_one(rows):
    return torch.ones(rows * 16 + 1, dtype=bf16)[1:].view(rows, 16)


MISFITS = {
    "H": ({"w_gate": torch.ones(40, 16, dtype=bf16), "w_up": torch.ones(40, 16, dtype=bf16)},
          "D to be a multiple of 8, and not 0, and H one of 32, got D=16, H=40"),
    "D": ({"x": torch.ones(4, 12, dtype=bf16), "w_gate": torch.ones(32, 12, dtype=bf16),
           "w_up": torch.ones(32, 12, dtype=bf16)}, "got D=12, H=32"),
    "x": ({"x": off_by_one(4)}, "x to start on 16 bytes.*2 bytes off"),
    "w_gate": ({"w_gate": torch.ones(16, 32, dtype=bf16).t()}, "w_gate to start on 16 bytes"),
    "w_up": ({"w_up": off_by_one(32)}, "w_up to start on 16 bytes"),
    "pair": ({"w_up": torch.ones(32, 24, dtype=bf16)[:, :16]},
             "w_gate and w_up with one row stride, got 16 and 24"),
    "bias": ({"b_up": torch.ones(64, dtype=bf16)[::2]}, "b_up to be contiguous, got stride 2"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, message", MISFITS.values(), ids=MISFITS)
def test_arguments_that_it_does_not_take(arguments, message):
    words = f"gated_linear_fwd: backend 'cutlass' needs .*{message}.*; backend\\('triton'\\) takes"
    with installed() as calls, fusedmlp.backend("cutlass"), pytest.raises(Unfit, match=words):
        call(**arguments)
    assert not calls


# M, D and H at the limit of 31 bits, of which 2 H has them too.
FIT = [(2**31 - 1, 32, 32), (32, 2**31 - 32, 32), (32, 32, 2**30 - 32)]
DO_NOT = [(2**31, 32, 32), (32, 2**31, 32), (32, 32, 2**30)]


@pytest.mark.parametrize("op", (linear_act, gated_linear), ids=lambda op: op.__name__)
def test_sizes_of_31_bits(op):
    """What fits is refused for what stands in the way next: its rows lie one on the other."""
    one, plain = torch.ones(1, dtype=bf16), op is linear_act
    for (M, D, H), fits in (*((s, True) for s in FIT), *((s, False) for s in DO_NOT)):
        x, *w = one.expand(M, D), *(one.expand(H, D) for _ in range(2 - plain))
        needs = "x to start on 16 bytes" if fits else rf"below 2\^31, got M={M}, D={D}, H={H}"
        with installed(), fusedmlp.backend("cutlass"), pytest.raises(Unfit, match=needs):
            op.fwd(x, *w, *(None for _ in w), "silu", False, False)


def test_weights_too_far_apart(monkeypatch):
    """No descriptor steps 2^40 bytes; no machine of this test has as much memory."""
    from fusedmlp.backends.cutlass import dense  # noqa: PLC0415 - patched

    w_gate, w_up = torch.ones(2, 32, 16, dtype=bf16)
    monkeypatch.setattr(dense, "_FARTHEST", 1024)
    far = r"less than 2\^40 bytes apart, got 1024 bytes"
    with installed(), fusedmlp.backend("cutlass"):
        for pair in ((w_gate, w_up), (w_up, w_gate)):
            with pytest.raises(Unfit, match=far):
                call(None, *pair)
        monkeypatch.setattr(dense, "_FARTHEST", 1025)
        call(None, w_gate, w_up)


def test_an_activation_without_a_functor():
    with installed(), fusedmlp.backend("cutlass"):
        del loader.load()[0].ACTIVATIONS["silu"]
        with pytest.raises(Unfit, match="activation to be one of .*, got 'silu'"):
            call()


def test_float32_is_a_type_error():
    x, w = torch.ones(2, 16), torch.ones(8, 16)
    message = "x must be bfloat16 or float16 on backend 'cutlass', got torch.float32"
    with installed(), fusedmlp.backend("cutlass"), pytest.raises(TypeError, match=message):
        fusedmlp.linear_act(x, w)


@pytest.mark.parametrize("gpu", (80, 120))
def test_another_gpu(gpu):
    message = f"holds gated_linear_fwd for sm_90a sm_100f, and this GPU is sm_{gpu}"
    with installed(gpu=gpu), fusedmlp.backend("cutlass"), pytest.raises(Unfit, match=message):
        call()


def test_a_driver_that_is_too_old():
    message = "needs an NVIDIA driver for CUDA 13.0 or newer, got one for CUDA 12.8"
    with installed(version=12080), fusedmlp.backend("cutlass"), pytest.raises(Unfit, match=message):
        call()


def test_without_the_package():
    why = "the extension by CUTLASS is not built: do so"
    with installed(loaded=(None, why)), fusedmlp.backend("cutlass"):
        with pytest.raises(
            Unfit, match=f"gated_linear: backend 'cutlass' was asked for, but {why}"
        ):
            call()
        assert f"cutlass backend: none: {why}" in fusedmlp.explain()


def test_on_a_cpu():
    message = r"it needs CUDA tensors, got cpu; or use backend\('auto'"
    with fusedmlp.backend("cutlass"), pytest.raises(Unfit, match=message):
        call()


def test_batch_invariance_is_not_promised():
    message = r"inside batch_invariant\(\), got 'cutlass'"
    refused = pytest.raises(Unfit, match=message)
    with installed(), fusedmlp.backend("cutlass"), fusedmlp.batch_invariant(), refused:
        call()


def test_an_op_without_such_a_kernel():
    message = "gated_act: backend 'cutlass' .* no kernel by CUTLASS"
    with installed(), fusedmlp.backend("cutlass"), pytest.raises(Unfit, match=message):
        fusedmlp.gated_act(torch.ones(2, 8), torch.ones(2, 8))


@pytest.mark.parametrize("found, words", [(None, "is not built"), (True, "cannot be loaded (bad)")])
def test_why_there_is_none(found, words, monkeypatch):
    def bad(name):
        raise ImportError("bad")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(importlib, "import_module", bad)
    extension, why = loader.load.__wrapped__()
    assert extension is None and words in why and "FUSEDMLP_CUTLASS=1" in why


# ---- who is told


def test_explain_says_what_was_built_and_what_ran():
    with installed(), fusedmlp.backend("cutlass"):
        call()
        text = fusedmlp.explain()
    assert "cutlass backend: built with CUTLASS 4.2.0.0, CUDA 13.0 for sm_100f sm_90a" in text
    assert "last launch of gated_linear_fwd: cutlass" in text


def test_auto_never_takes_it():
    with installed() as calls:
        assert choice.pick("gated_linear", torch.ones(2, 2, dtype=bf16)) != "cutlass"
    assert not calls


def test_the_rival():
    rival = RIVALS["cutlass"]
    assert rival.ops and rival.phases == ("forward",)

    def why(case="gated_linear", activation="silu", dtype="bfloat16", D=16, H=32):
        return rival.skip(Work(CASES[case], activation, dtype, 8, D, H), "forward")

    with installed():
        assert why() is None and why("linear_act", H=24) is None
        assert "serve gated_act" in why("gated_act")
        assert "takes bfloat16 and float16 only" in why(dtype="float32")
        assert "needs D to be a multiple of 8 and H one of 32" in why(H=24)
        del loader.load()[0].ACTIVATIONS["silu"]
        assert "has no functor for silu" in why()
    with installed(gpu=80):
        assert "this GPU is sm_80" in why()
    with installed(loaded=(None, "the extension by CUTLASS is not built")):
        assert "is not built" in why()


@pytest.mark.parametrize("name", ("gated_mlp-lora", "mlp-lora"))
def test_an_adapter_is_refused(name):
    inputs = CASES[name].inputs(4, 16, 32, bf16)
    with installed(), fusedmlp.backend("cutlass"), pytest.raises(Unfit, match="no adapter .lora"):
        CASES[name].run(inputs)


def test_what_it_tells_of_a_gpu():
    with installed():
        for capability in (0, 90):
            assert "opt-in by backend('cutlass')" in loader.describe(capability)
        assert loader.describe(80).endswith(loader.find("gated_linear_fwd", 80)[1])
