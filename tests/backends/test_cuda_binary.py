"""The launchers of binary_gemv.cu with the arguments that they make, over the host SIMT runner; and
those of all kernels for few rows by themselves."""

from types import SimpleNamespace

import pytest
import torch
from op_checks import check
from simt_build import NUMBERS, load
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp import quantize_binary
from fusedmlp.backends import driver
from fusedmlp.backends.cuda import binary as cuda_binary, loader, masked as cuda_masked
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
    for room in (cuda_binary, cuda_masked):
        monkeypatch.setattr(room, "stream", lambda device: 0)
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


# ---- the launchers by themselves, over an extension that keeps what it is handed


def linear(enqueue, x, H):
    w = weight(H, x.shape[1])
    return cuda_binary.binary_linear_fwd(enqueue, x, w.qweight, w.scales, None)


def gated(enqueue, x, H, want_h=True, want_gu=False):
    w = weight(H, x.shape[1])
    planes = (w.qweight, w.scales)
    options = (None, None, "silu", want_h, want_gu)
    return cuda_binary.binary_gated_linear_fwd(enqueue, x, *planes, *planes, *options)[0]


def masked(enqueue, x, H, n_m=2, want_h=True, want_gt=False, planes=None):
    w = x.new_ones(H, x.shape[1])
    if planes is None:
        planes = torch.zeros(H, -(-x.shape[1] // 8), n_m, dtype=torch.uint8)
    return cuda_masked.masked_gated_linear_fwd(enqueue, x, w, planes, "silu", want_h, want_gt)[0]


class Made(TorchDispatchMode):
    """How many elements lie at which address, of new tensors."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "new_empty" in str(func) and out.dtype == torch.float32:
            self.sizes[out.data_ptr()] = out.numel()
        return out


# launcher -> products of a row, and where parts, M and the number of parts stand in its numbers.
FEW_ROWS = {linear: (1, 8, 9, 13), gated: (2, 8, 9, 13), masked: (3, 4, 5, 11)}


@pytest.mark.parametrize("size, cut", [((1, 40, 4096), True), ((16, 1, 128), False)])
@pytest.mark.parametrize("launch", FEW_ROWS, ids=lambda f: f.__name__)
def test_parts_have_the_memory_that_they_need(launch, size, cut, on_cuda):
    (M, H, D), (products, at, first, last) = size, FEW_ROWS[launch]
    seen = []
    with Made() as made:
        h = launch(lambda *numbers: seen.extend(numbers), ones(M, D), H)
    assert h.shape == (M, H) and tuple(seen[first : first + 3]) == size
    assert (seen[last] > 1) == cut
    assert made.sizes.get(seen[at], 0) == (seen[last] * products * M * H if cut else 0)


def test_splits_of_masked_weights():
    x = torch.empty(1, 4096)
    with pretend(arch_for(90), 132):
        assert cuda_masked.splits_of(x, 4096, 65536) == 3
        assert cuda_masked.splits_of(x, 16, 4096) == 4
        assert cuda_masked.splits_of(x, 16, 512) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"want_gt": True}, "a call that wants no gradient"),
        ({"want_h": False}, "a call that wants no gradient"),
        ({"n_m": 3}, "n_m to be one of 1, 2, 4, 8, got 3"),
        ({"x": ones(17, 128)}, "16 rows of x or fewer, got 17"),
        ({"x": ones(2, 12)}, "D to be a multiple of 8, and not 0, got 12"),
        ({"x": ones(2, 0)}, "D to be a multiple of 8, and not 0, got 0"),
        ({"x": ones(2, 256)[:, ::2]}, "x to start on 16 bytes"),
        ({"planes": torch.zeros(8 * 16 * 2 + 1, dtype=torch.uint8)[1:].view(8, 16, 2)},
         "planes to be contiguous and to start on 8 bytes"),
        ({"planes": torch.zeros(16, 8, 2, dtype=torch.uint8).transpose(0, 1)},
         "planes to be contiguous and to start on 8 bytes"),
    ],
)  # fmt: skip
def test_what_the_masked_kernel_does_not_take(options, message, on_cuda):
    given = {"x": ones(2, 128), **options}
    with pytest.raises(Unfit, match=f"^masked_gated_linear_fwd: backend 'cuda' needs {message}"):
        masked(lambda *numbers: None, given.pop("x"), 8, **given)


@pytest.mark.parametrize("want_h, want_gu", [(True, True), (False, False), (False, True)])
def test_what_the_gated_kernel_does_not_make(want_h, want_gu, on_cuda):
    with pytest.raises(Unfit, match="needs a call that wants no gradient, got one that does"):
        gated(lambda *numbers: None, ones(2, 128), 8, want_h, want_gu)


@pytest.mark.parametrize("launch", FEW_ROWS, ids=lambda f: f.__name__)
def test_nothing_to_do_launches_nothing(launch, on_cuda):
    for M, H in ((0, 8), (2, 0)):
        assert launch(None, ones(M, 128), H).shape == (M, H)
