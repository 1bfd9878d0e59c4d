"""The rivals of one-bit weights compute the ops; decoding counts 1.125 bits a weight."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fusedmlp.bench.rivals import RIVALS
from fusedmlp.bench.timing import calls
from fusedmlp.bench.work import Work, case_of


def work(op="binary_linear", M=2, D=256, H=128, dtype="bfloat16"):
    return Work(case_of(op), "silu" if "gated" in op else "identity", dtype, M, D, H)


class Layer:
    """GemLite's layer by its own formula, (W_q - zeros) * scales in groups along K."""

    def __init__(self, W_nbits, group_size, in_features, out_features, input_dtype, output_dtype):
        assert (W_nbits, group_size, input_dtype) == (1, 128, output_dtype)
        self.shape = out_features, in_features

    def pack(self, W_q, scales, zeros, bias):
        assert W_q.dtype == torch.uint8 and W_q.shape == self.shape and bias is None
        assert scales.shape == zeros.shape == (W_q.numel() // 128, 1)
        self.w = ((W_q.view(-1, 128).to(scales.dtype) - zeros) * scales).view(self.shape)

    def __call__(self, x):
        return F.linear(x, self.w)


@pytest.fixture
def gemlite(monkeypatch):
    core = types.ModuleType("gemlite.core")
    core.TORCH_TO_DTYPE = {torch.bfloat16: "BF16", torch.float16: "FP16"}
    core.GemLiteLinearTriton = Layer
    monkeypatch.setitem(sys.modules, "gemlite", types.ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.core", core)


@pytest.mark.parametrize("op", ("binary_linear", "binary_gated_linear", "binary_gated_mlp"))
@pytest.mark.parametrize("name", ("dequantised", "gemlite"))
def test_computes_the_op(name, op, device, gemlite):
    assert RIVALS[name].skip(work(op), "forward") is None
    assert calls.disagreement(RIVALS[name], work(op), device) is None


def test_what_they_skip(gemlite):
    for name in ("dequantised", "gemlite"):
        assert RIVALS[name].skip(work(), "both") == "has no gradient of scales"
        assert "does not serve mlp" in RIVALS[name].skip(work("mlp"), "forward")
        assert RIVALS[name].skip(work("binary_linear-bias"), "forward") == "has no fused bias"
    assert "multiples of 128" in RIVALS["gemlite"].skip(work(D=200), "forward")
    assert "float16 only" in RIVALS["gemlite"].skip(work(dtype="float32"), "forward")


def test_bytes_of_decoding():
    """Qwen3-8B has 20.25 MiB of weights a layer."""
    block = work("binary_gated_mlp", 1, 4096, 12288)
    assert block.bytes("forward") == 20.25 * 2**20 + 2 * 2 * 4096
    linear = work(M=1, D=4096, H=12288)
    bits, scales = 4096 * 12288 // 8, 4096 * 12288 // 128 * 2
    assert linear.bytes("forward") == bits + scales + 2 * (4096 + 12288)
    # x, dy, dx; words read, scales read and their gradient written.
    assert linear.bytes("backward") == bits + 2 * scales + 2 * (2 * 4096 + 12288)
    assert linear.gemm() == (1, 12288, 4096)


def test_wrong_scales_are_seen(device):
    class Wrong(type(RIVALS["dequantised"])):
        def product(self, qweight, scales, width, dtype):
            return super().product(qweight, 1.1 * scales, width, dtype)

    assert "computes something else" in calls.disagreement(Wrong(), work(), device)
