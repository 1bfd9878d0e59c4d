"""The launchers of binary_gemv.cu with the arguments that they make, over the host SIMT runner."""

from types import SimpleNamespace

import pytest
import torch
from op_checks import check
from simt_build import NUMBERS, load

import fusedmlp
from fusedmlp import quantize_binary
from fusedmlp.backends import driver
from fusedmlp.backends.cuda import binary as cuda_binary, loader
from fusedmlp.backends.cuda.loader import Unfit
from fusedmlp.backends.op import OPS
from fusedmlp.kernels.arch import arch_for
from fusedmlp.kernels.device import pretend
from fusedmlp.testing import CASES

DTYPES = {"bfloat16": 0, "float16": 1}
launched = []


def enqueue(*arguments):
    *kernels, device, stream = arguments
    assert (device, stream) == (-1, 0)
    launched.append(arguments)
    load("csrc/binary_gemv.cu").run_binary_gemv(*kernels)


@pytest.fixture
def on_cuda(monkeypatch):
    """backend("cuda") finds the two kernels, as of a GPU with 3 multiprocessors."""
    launched.clear()
    ops = {
        (kernel, "sm_80"): enqueue for kernel in ("binary_linear_fwd", "binary_gated_linear_fwd")
    }
    extension = SimpleNamespace(OPS=ops, ARCHS="sm_80", DTYPES=DTYPES, ACTIVATIONS=NUMBERS)
    monkeypatch.setattr(loader, "load", lambda: (extension, ""))
    monkeypatch.setattr(driver, "version", lambda: 0)
    monkeypatch.setattr(cuda_binary, "stream", lambda device: 0)
    loader.find.cache_clear()
    with pretend(arch_for(90), 3), fusedmlp.backend("cuda"):
        yield
    loader.find.cache_clear()


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("binary_")])
def test_every_case(name, on_cuda):
    inputs = CASES[name].inputs(3, 1024, 128, torch.bfloat16)
    with torch.no_grad():
        check(CASES[name], inputs, backward=False)
    assert len(launched) == (2 if "mlp" in name else 1)


def test_splits_fill_the_gpu():
    x = torch.empty(1, 4096)
    with pretend(arch_for(90), 132):
        assert cuda_binary.splits_of(x, 12288, 32, True) == 3
        assert cuda_binary.splits_of(x, 4096, 96, False) == 17
        assert cuda_binary.splits_of(x, 128, 1, False) == 1


def weight(rows=40, columns=256, **options):
    return quantize_binary(torch.randn(rows, columns), **options)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float16)


def wide_scales():
    w = weight()
    return fusedmlp.BinaryWeight(w.qweight, w.scales.float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (ones(17, 256), weight(), None), "needs 16 rows of x or fewer, got 17"),
        (lambda: (ones(2, 200), weight(40, 200, pad=True), None), "D to be a multiple of 128"),
        (lambda: (ones(2, 512)[:, ::2], weight(), None), "x"),
        (lambda: (ones(2, 256), weight(), ones(80)[::2]), "biases to be contiguous"),
        (lambda: (ones(2, 256), wide_scales(), None), "scales to be float16, got torch.float32"),
    ],
)
def test_what_it_does_not_take(make, message, on_cuda):
    with pytest.raises(Unfit, match=f"binary_linear_fwd: .*{message}"), torch.no_grad():
        fusedmlp.binary_linear(*make())


def test_training_and_no_rows(on_cuda):
    gate, x = weight(), torch.ones(2, 256, dtype=torch.float16, requires_grad=True)
    with pytest.raises(Unfit, match="a call that wants no gradient"):
        fusedmlp.binary_gated_linear(x, gate, gate)
    with torch.no_grad():
        assert fusedmlp.binary_linear(x[:0], gate).shape == (0, 40)
    with pytest.raises(TypeError, match="x must be bfloat16 or float16 on backend 'cuda'"):
        fusedmlp.binary_linear(torch.ones(1, 256), gate)


def test_which_ops_serve_few_rows_alone():
    """Those that multiply by bits."""
    few = {op for op in OPS if loader.decoded(op)}
    assert few == {op for op in OPS if OPS[op].cuda and op.startswith(("binary_", "masked_"))}
