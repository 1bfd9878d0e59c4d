"""Each adapter against a stand-in with its rival's call, computed in plain PyTorch."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fusedmlp.bench.rivals import RIVALS, binary as rivals_binary
from fusedmlp.bench.timing.calls import calls_of, disagreement, draw
from fusedmlp.bench.work import PHASES, Work
from fusedmlp.testing import CASES, floating

ACTS = {"swiglu": F.silu, "reglu": F.relu, "geglu": lambda x: F.gelu(x, approximate="tanh"),
        "glu": torch.sigmoid, "silu": F.silu, "relu": F.relu,
        "gelu_tanh_approx": lambda x: F.gelu(x, approximate="tanh")}  # fmt: skip

# Our CUDA kernels need a GPU: tests/bench/test_bench_cuda.py.
DENSE = {
    name: rival
    for name, rival in RIVALS.items()
    if rival.ops
    not in (("moe_mlp",), ("masked_gated_linear",), ("hyper_attention",), rivals_binary.OPS)
    and not name.startswith("fusedmlp-")
    # One is built or not, the other needs Blackwell: tests/backends/test_cutlass_backend.py and
    # test_bench_rivals_cudnn.py.
    and name not in ("cutlass", "cudnn")
}


def work(case, activation="silu", dtype="float32", M=4, D=8, H=16):
    return Work(CASES[case], activation, dtype, M, D, H)


def module(monkeypatch, name, **members):
    """Put a module of that dotted name, with its packages, where import finds it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if i == len(parts) or path not in sys.modules:
            made = types.ModuleType(path)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


def install_quack(monkeypatch, interleaved=True):
    def gemm_gated(A, B, C=None, bias=None, activation="swiglu", preact_out=None,
                   postact_out=None, store_preact=True):  # fmt: skip
        preact = A @ B if bias is None else A @ B + bias
        halves = (preact[..., ::2], preact[..., 1::2]) if interleaved else preact.chunk(2, -1)
        return preact if store_preact else None, ACTS[activation](halves[0]) * halves[1]

    def gemm_act(A, B, C=None, bias=None, activation=None, preact_out=None, postact_out=None,
                 store_preact=True):  # fmt: skip
        preact = A @ B if bias is None else A @ B + bias
        return preact if store_preact else None, ACTS[activation](preact)

    def mlp_func(x, weight1, weight2, activation, bias1=None, bias2=None, fuse_grad_accum=False,
                 tuned=True, recompute=False, concat_layout=False):  # fmt: skip
        gemm = gemm_gated if activation in ("swiglu", "reglu", "geglu", "glu") else gemm_act
        return F.linear(gemm(x, weight1.T, bias=bias1, activation=activation)[1], weight2, bias2)

    module(monkeypatch, "quack.gemm_interface", gemm_gated=gemm_gated, gemm_act=gemm_act)
    module(monkeypatch, "quack.mlp", mlp_func=mlp_func)


def install_liger(monkeypatch):
    def gemm_swiglu(input, gate_weight, up_weight, gate_multiplier, store_preact=True):
        B, S, dim = input.shape
        assert not store_preact, "training would return A, G and U in one buffer"
        return F.silu(input @ gate_weight.T * gate_multiplier) * (input @ up_weight.T), None

    class LigerMLPFunction:
        @staticmethod
        def apply(input, gate_weight, up_weight, down_weight, gate_multiplier=1.0):
            B, S, dim = input.shape
            return (F.silu(input @ gate_weight.T) * (input @ up_weight.T)) @ down_weight.T

    def elementwise(act):
        return types.SimpleNamespace(apply=lambda a, b: act(a) * b)

    module(
        monkeypatch, "liger_kernel.ops", LigerSiLUMulFunction=elementwise(F.silu),
        LigerGELUMulFunction=elementwise(ACTS["geglu"]),
    )  # fmt: skip
    module(
        monkeypatch, "liger_kernel.ops.mlp", gemm_swiglu=gemm_swiglu,
        LigerMLPFunction=LigerMLPFunction,
    )  # fmt: skip


def install_flash_swiglu(monkeypatch):
    def gemm_swiglu(input, gate_weight, up_weight, gate_multiplier, store_preact=True):
        B, S, dim = input.shape
        assert not store_preact, "training would return A, G and U in one buffer"
        return F.silu(input @ gate_weight.T * gate_multiplier) * (input @ up_weight.T), None

    def flash_swiglu(input, gate_weight, up_weight, down_weight, gate_multiplier=1.0,
                     down_multiplier=1.0):  # fmt: skip
        B, S, dim = input.shape
        return (F.silu(input @ gate_weight.T) * (input @ up_weight.T)) @ down_weight.T

    module(monkeypatch, "flash_swiglu_mlp.ops", gemm_swiglu=gemm_swiglu, flash_swiglu=flash_swiglu)


@pytest.fixture
def installed(monkeypatch):
    install_quack(monkeypatch)
    install_liger(monkeypatch)
    install_flash_swiglu(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)


def served():
    for rival in DENSE.values():
        for case in CASES:
            for activation in ("silu", "gelu_tanh", "relu"):
                yield pytest.param(rival, case, activation, id=f"{rival.name}-{case}-{activation}")


@pytest.mark.parametrize("rival, case, activation", list(served()))
def test_every_rival_computes_what_it_says_it_serves(installed, rival, case, activation):
    here = work(case, activation)
    # The adapters refuse float32 where the real rival does; the stand-ins take it.
    asked = Work(CASES[case], activation, "bfloat16", 4, 8, 16)
    phases = [phase for phase in PHASES if rival.skip(asked, phase) is None]
    inputs = draw(here, "cpu", 0)
    exact = here.case.run_reference(inputs, **here.options)
    for phase in phases:
        (call,) = calls_of(rival, here, phase, [inputs])
        result = call()
        if phase == "forward":
            torch.testing.assert_close(result, exact)
            assert not result.requires_grad
        else:
            # Its arguments may be packed, but together they hold as many values as ours.
            ours = floating(inputs).values()
            assert sum(g.numel() for g in result) == sum(t.numel() for t in ours)


@pytest.mark.parametrize("name", ["eager-packed", "quack", "liger", "liger-elementwise"])
def test_gradients_of_a_rival_are_those_of_the_op(installed, name):
    here = work("gated_mlp")
    inputs = draw(here, "cpu", 0)
    (ours,) = calls_of(RIVALS["eager"], here, "both", [inputs])
    (theirs,) = calls_of(RIVALS[name], here, "both", [inputs])
    expected = dict(zip(inputs, ours(), strict=True))
    got = dict(zip(RIVALS[name].arguments(here, inputs), theirs(), strict=True))
    torch.testing.assert_close(got["x"], expected["x"])
    down = got["w2"] if name == "quack" else got["w_down"]
    torch.testing.assert_close(down, expected["w_down"])
    if name == "quack":
        torch.testing.assert_close(got["w1"][::2], expected["w_gate"])


def test_who_serves_what(installed):
    def servers(case, phase, activation="silu"):
        asked = Work(CASES[case], activation, "bfloat16", 4, 8, 16)
        return {name for name, rival in RIVALS.items() if rival.skip(asked, phase) is None}

    own = {"fusedmlp", "eager", "compile"}
    packed = {"eager-packed", "compile-packed"}
    assert servers("gated_linear", "forward") == set(DENSE)
    assert servers("gated_mlp", "both") == set(DENSE)
    assert servers("gated_mlp", "backward") == own | packed | {"quack"}
    assert servers("gated_mlp", "both", "gelu_tanh") == set(DENSE) - {"liger", "flash-swiglu"}
    assert servers("gated_mlp", "both", "bsilu") == own | packed
    assert servers("gated_mlp-gate_up-bias", "forward") == own
    assert servers("gated_mlp-bias", "forward") == own | packed | {"quack"}
    assert servers("gated_mlp-bias", "both") == own | packed
    assert servers("gated_act", "forward") == own | {"liger-elementwise"}
    assert servers("gated_act", "both") == own
    assert servers("mlp", "both") == own | {"quack"}


def test_reasons_are_words_for_a_user(installed):
    quack, liger = RIVALS["quack"], RIVALS["liger"]
    assert "bfloat16" in quack.skip(work("gated_mlp"), "forward")
    odd = Work(CASES["gated_mlp"], "silu", "bfloat16", 4, 9, 16)
    assert "multiples of 8" in quack.skip(odd, "forward")
    odd = Work(CASES["gated_mlp"], "silu", "bfloat16", 4, 12, 16)
    assert "multiples of 16 bytes" in RIVALS["flash-swiglu"].skip(odd, "forward")
    assert "overwrites" in liger.skip(work("gated_mlp"), "backward")
    assert "does not serve mlp" in liger.skip(work("mlp"), "forward")
    assert "has no relu" in liger.skip(work("gated_mlp", "relu"), "forward")


def test_a_missing_rival_gives_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    reason = RIVALS["liger"].skip(work("gated_mlp"), "forward")
    assert reason.startswith("cannot be imported: ModuleNotFoundError")


def test_a_rival_that_breaks_on_import_gives_its_reason(monkeypatch, tmp_path):
    (tmp_path / "quack").mkdir()
    (tmp_path / "quack" / "__init__.py").write_text("raise OSError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quack", raising=False)
    asked = Work(CASES["gated_mlp"], "silu", "bfloat16", 4, 8, 16)
    assert RIVALS["quack"].skip(asked, "forward") == "cannot be imported: OSError: no driver"


def test_a_rival_with_another_layout_is_found_out(monkeypatch):
    asked = Work(CASES["gated_linear"], "silu", "bfloat16", 16, 32, 32)
    install_quack(monkeypatch)
    assert disagreement(RIVALS["quack"], asked, "cpu") is None
    install_quack(monkeypatch, interleaved=False)
    assert "computes something else" in disagreement(RIVALS["quack"], asked, "cpu")


def test_compile_is_asked_for_whole_static_graphs(monkeypatch):
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda run, **options: seen.update(options) or run)
    RIVALS["compile"].function(work("gated_mlp"))
    assert seen == {"mode": "max-autotune-no-cudagraphs", "fullgraph": True, "dynamic": False}


def test_only_a_backward_alone_keeps_what_compile_would_overwrite():
    config = torch._functorch.config
    before = config.donated_buffer
    with RIVALS["compile"].preparing("both"):
        assert config.donated_buffer == before
    with RIVALS["compile"].preparing("backward"):
        assert config.donated_buffer is False
    assert config.donated_buffer == before


def test_recomputing_eager_saves_x_alone():
    here = work("gated_mlp-recompute-bias", M=64)
    saved = {}
    for name in ("gated_mlp-bias", "gated_mlp-recompute-bias"):
        case = work(name, M=64)
        leaves = {n: t.requires_grad_() for n, t in draw(here, "cpu", 0).items()}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, k=kept: k.append(t) or t, lambda t: t
        ):
            RIVALS["eager"].function(case)(leaves)
        saved[name] = sum(t.numel() for t in kept if t.shape[0] == 64)
    assert saved["gated_mlp-recompute-bias"] < saved["gated_mlp-bias"]
