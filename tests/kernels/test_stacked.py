"""Two weights under one TMA descriptor: when, and what happens where the driver makes none."""

import warnings

import pytest
import torch

from fusedmlp.kernels import stacked
from fusedmlp.kernels.arch import arch_for
from fusedmlp.kernels.dense import gated_linear
from fusedmlp.kernels.device import pretend
from fusedmlp.kernels.moe import moe_mlp
from fusedmlp.kernels.stacked import stacked_of
from fusedmlp.testing import CASES, assert_close_to, compare

bf16 = torch.bfloat16
REFUSED = "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument"


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch):
    monkeypatch.setattr(stacked, "_refused", set())


def test_halves_of_one_tensor_in_either_order():
    packed = torch.empty(128, 64, dtype=bf16)
    first, second = packed.chunk(2)
    for pair, second_first in (((first, second), False), ((second, first), True)):
        both = stacked_of(*pair, 32, 64)
        assert both.second_first is second_first
        assert both.descriptor.base.data_ptr() == packed.data_ptr()
        assert tuple(both.descriptor.shape) == (2, 64, 64)
        assert tuple(both.descriptor.strides) == (64 * 64, 64, 1)
        assert both.descriptor.block_shape == [2, 32, 64]


def test_two_tensors_at_any_distance_of_16_bytes():
    """Whole rows apart or not."""
    memory = torch.empty(1 << 16, dtype=bf16)
    near = memory[: 64 * 64].view(64, 64)
    for distance in (100 * 64, 200 * 64 + 8, 64 * 64 + 8):
        far = memory[distance : distance + 64 * 64].view(64, 64)
        assert stacked_of(near, far, 32, 64).descriptor.strides[0] == distance


def test_rows_in_turn():
    gate_up = torch.empty(64, 2, 64, dtype=bf16)
    both = stacked_of(gate_up[:, 0], gate_up[:, 1], 32, 64)
    assert tuple(both.descriptor.strides) == (64, 128, 1)


def test_experts():
    packed = torch.empty(3, 128, 64, dtype=bf16)
    both = stacked_of(packed[:, :64], packed[:, 64:], 32, 64)
    assert tuple(both.descriptor.shape) == (2, 3, 64, 64)
    assert tuple(both.descriptor.strides) == (64 * 64, 128 * 64, 64, 1)
    assert both.descriptor.block_shape == [2, 1, 32, 64]


class At:
    """A weight at an address."""

    device = torch.device("cpu")

    def __init__(self, address, shape=(64, 64), strides=(64, 1)):
        self.address, self.shape, self.strides = address, shape, strides

    def data_ptr(self):
        return self.address

    def stride(self, dim=None):
        return self.strides if dim is None else self.strides[dim]

    def dim(self):
        return len(self.shape)

    def element_size(self):
        return 2


def test_what_the_documentation_excludes():
    base = At(0)
    assert stacked_of(base, At((1 << 40) - 16), 32, 64)
    for bad in (
        At(0),  # no distance
        At(1 << 40),  # 2^40 bytes
        At(8192 + 8),  # not a multiple of 16
        At(8192, strides=(72, 1)),
        At(8192, strides=(1, 64)),
    ):
        assert stacked_of(base, bad, 32, 64) is None
    assert stacked_of(At(0, strides=(1, 64)), At(8192, strides=(1, 64)), 32, 64) is None
    # A stride of fewer bytes than the dimension that it steps over has elements: cuda.h's assert.
    tall = (4096, 64), (4096, 1)
    assert stacked_of(At(0, *tall), At(4096, *tall), 32, 64)
    assert stacked_of(At(0, *tall), At(4080, *tall), 32, 64) is None
    experts = (3, 4096, 64), (1024, 3072, 1)
    assert stacked_of(At(0, *experts), At(1 << 25, *experts), 32, 64) is None


def test_small_ones_on_blackwell_are_not_trusted():
    """See maps.py: less than 128 KB, and memory between the two."""
    weights = torch.empty(4, 64, 64, dtype=bf16)
    large = torch.empty(4, 256, 256, dtype=bf16)
    for capability, trusted in ((90, True), (100, False), (103, False)):
        with pretend(arch_for(capability), 132):
            assert stacked_of(weights[0], weights[1], 32, 64)  # dense
            assert bool(stacked_of(weights[0], weights[2], 32, 64)) is trusted
            assert stacked_of(large[0], large[2], 32, 64)


@pytest.mark.parametrize("name", ("gated_linear-bias", "gated_mlp"))
def test_weights_that_cannot_be_stacked_take_two_accumulators(name, device, on_triton, monkeypatch):
    seen = []
    monkeypatch.setattr(
        gated_linear, "stacked_of", lambda *args: seen.append(stacked_of(*args)) or seen[-1]
    )
    case = CASES[name]
    inputs = case.inputs(40, 48, 72, bf16, device)
    inputs["w_up"] = inputs["w_up"].t().contiguous().t()
    for key, numbers in compare(case, inputs).items():
        assert_close_to(*numbers, name=key)
    assert seen and not any(seen)


class Refusing:
    """A kernel whose launcher encodes descriptors as a driver does that refuses stacked ones."""

    def __init__(self, kernel, message=REFUSED):
        self.kernel, self.message, self.tried = kernel, message, []

    def __getitem__(self, grid):
        def launch(*args, STACKED, **kwargs):
            self.tried.append(STACKED)
            if STACKED:
                raise RuntimeError(self.message)
            self.kernel[grid](*args, STACKED=STACKED, **kwargs)

        return launch


@pytest.mark.parametrize("name, module, kernel", (
    ("gated_linear-bias", gated_linear, "_fwd_kernel"), ("moe_mlp", moe_mlp, "_up_kernel"),
))  # fmt: skip
def test_a_refusal_is_said_and_remembered(name, module, kernel, device, on_triton, monkeypatch):
    refusing = Refusing(getattr(module, kernel))
    monkeypatch.setattr(module, kernel, refusing)
    case = CASES[name]
    inputs = case.inputs(40, 48, 72, bf16, device)
    with pytest.warns(UserWarning, match=r"no TMA descriptor over two weights of shape .*72, 48\)"):
        case.run(inputs)
    assert refusing.tried[:2] == [True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key, numbers in compare(case, inputs).items():
            assert_close_to(*numbers, name=key)
    assert refusing.tried.count(True) == 1
    with pytest.warns(UserWarning, match="72, 64"):  # another shape is tried
        case.run(case.inputs(40, 64, 72, bf16, device))


def test_any_other_error_is_raised(device, on_triton, monkeypatch):
    refusing = Refusing(gated_linear._fwd_kernel, "CUDA error: an illegal memory access")
    monkeypatch.setattr(gated_linear, "_fwd_kernel", refusing)
    case = CASES["gated_linear"]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        case.run(case.inputs(40, 48, 72, bf16, device))
    assert refusing.tried == [True]
