"""cuDNN's gated MLP against a stand-in with its calls, on a GPU that is pretended."""

import pytest
import torch
import torch.nn.functional as F
from test_bench_rivals import module, work

from fusedmlp.bench.rivals import RIVALS, cudnn as rivals_cudnn
from fusedmlp.bench.timing.calls import calls_of, draw
from fusedmlp.bench.work import PHASES

CUDNN = RIVALS["cudnn"]


@pytest.fixture
def installed(monkeypatch):
    def swiglu_mlp(x, Wg, Wu, Wd):
        return F.linear(F.silu(F.linear(x, Wg)) * F.linear(x, Wu), Wd)

    def situ_mlp(x, Wg, Wu, Wd, *, beta=4.0, linear_beta=25.0):
        gate, up = F.linear(x, Wg), F.linear(x, Wu)
        gate = beta * torch.tanh(gate / beta) * torch.sigmoid(gate)
        return F.linear(gate * (linear_beta * torch.tanh(up / linear_beta)), Wd)

    module(monkeypatch, "cudnn.gemm", swiglu_mlp=swiglu_mlp, situ_mlp=situ_mlp)
    monkeypatch.setattr(rivals_cudnn, "capability_here", lambda: 100)


@pytest.mark.parametrize("activation", CUDNN.activations)
@pytest.mark.parametrize("phase", PHASES)
def test_it_computes_the_op_and_its_gradients(installed, activation, phase):
    assert CUDNN.skip(work("gated_mlp", activation, "bfloat16"), phase) is None
    here = work("gated_mlp", activation)  # the stand-in takes float32
    inputs = draw(here, "cpu", 0)
    (ours,) = calls_of(RIVALS["eager"], here, phase, [inputs])
    (theirs,) = calls_of(CUDNN, here, phase, [inputs])
    torch.testing.assert_close(theirs(), ours())


@pytest.mark.parametrize(
    ("case", "activation", "dtype", "capability", "why"),
    [
        ("gated_mlp", "silu", "float16", 100, "takes bfloat16 only"),
        ("gated_mlp", "relu", "bfloat16", 100, "has no relu"),
        ("gated_mlp-bias", "silu", "bfloat16", 100, "has no fused bias"),
        ("gated_mlp-recompute-bias", "silu", "bfloat16", 100, "does not recompute"),
        ("gated_linear", "silu", "bfloat16", 100, "does not serve gated_linear"),
        ("gated_mlp", "silu", "bfloat16", 90, "needs a GPU of compute capability 10 or 11"),
        ("gated_mlp", "silu", "bfloat16", 120, "needs a GPU of compute capability 10 or 11"),
        ("gated_mlp", "silu", "bfloat16", 0, "needs a GPU of compute capability 10 or 11"),
    ],
)
def test_what_it_does_not_serve(installed, monkeypatch, case, activation, dtype, capability, why):
    monkeypatch.setattr(rivals_cudnn, "capability_here", lambda: capability)
    assert CUDNN.skip(work(case, activation, dtype), "forward") == why
