"""Bad one-bit weights, bytes and arguments: one clear error each."""

import re

import pytest
import torch

import fusedmlp
from fusedmlp import BinaryWeight, quantize_binary


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def bad(row, column, value):
    w = draw(2, 256)
    w[row, column] = value
    return w


NEEDED = 2 * 2 * 18
BAD = [
    (lambda: quantize_binary(draw(2, 200)), ValueError, "quantize_binary: w must have rows of a multiple of 128, got 200; pad=True pads"),
    (lambda: quantize_binary(draw(128)), ValueError, "w must be (H, D), D at least 1, got (128,)"),
    (lambda: quantize_binary(draw(4, 0)), ValueError, "w must be (H, D), D at least 1, got (4, 0)"),
    (lambda: quantize_binary([1.0]), TypeError, "w must be a floating Tensor, got list"),
    (lambda: quantize_binary(torch.ones(2, 128).int()), TypeError, "w must be a floating Tensor, got torch.int32"),
    (lambda: quantize_binary(bad(1, 130, float("nan"))), ValueError, "w must be finite, got 1 NaN or infinite, the first in row 1, group 1"),
    (lambda: quantize_binary(bad(0, 3, float("-inf"))), ValueError, "the first in row 0, group 0"),
    (lambda: quantize_binary(1e6 * draw(2, 256)), ValueError, "mean |w| must be at most 65504, float16's largest; 4 are not, the first in row 0, group 0"),
    (lambda: BinaryWeight.from_q1_0_bytes(bytes(NEEDED - 1), (2, 256)), ValueError, f"from_q1_0_bytes: buffer must have {NEEDED} bytes, 2 blocks of 18 a row of (2, 256), got {NEEDED - 1}"),
    (lambda: BinaryWeight.from_q1_0_bytes(bytes(NEEDED + 18), (2, 256)), ValueError, f"buffer must have {NEEDED} bytes, 2 blocks of 18 a row of (2, 256), got {NEEDED + 18}"),
    (lambda: BinaryWeight.from_q1_0_bytes(b"", (2, 256)), ValueError, "got 0"),
    (lambda: BinaryWeight.from_q1_0_bytes(bytes(18), (1, 100)), ValueError, "from_q1_0_bytes: shape must have rows of a multiple of 128, got 100"),
    (lambda: BinaryWeight.from_q1_0_bytes(b"", (4,)), ValueError, "from_q1_0_bytes: shape must be (H, D), none negative, got (4,)"),
    (lambda: BinaryWeight.from_q1_0_bytes(bytes(18), (-1, -128)), ValueError, "from_q1_0_bytes: shape must be (H, D), none negative, got (-1, -128)"),
    *((lambda shape=shape: BinaryWeight.from_q1_0_bytes(b"", shape), ValueError, f"shape must be (H, D), none negative, got {shape}")
      for shape in ((-1, 128), (4, -128), (), (1, 2, 3))),
    (lambda: BinaryWeight.from_q1_0_bytes(b"", None), TypeError, "from_q1_0_bytes: shape must be (H, D), two ints, got None"),
    (lambda: BinaryWeight.from_q1_0_bytes(b"", (4.0, 256)), TypeError, "from_q1_0_bytes: shape must be (H, D), two ints, got (4.0, 256)"),
    (lambda: BinaryWeight.from_q1_0_bytes("ab", (2, 256)), TypeError, "from_q1_0_bytes: buffer must have the buffer protocol, got str"),
    (lambda: BinaryWeight.from_q1_0_bytes([1], (2, 256)), TypeError, "from_q1_0_bytes: buffer must have the buffer protocol, got list"),
    (lambda: BinaryWeight.from_q1_0_bytes(torch.ones(2), (2, 256)), TypeError, "from_q1_0_bytes: buffer must have the buffer protocol, got Tensor"),
    (lambda: BinaryWeight.from_q1_0_bytes(memoryview(bytes(36))[::2], (1, 128)), ValueError, "from_q1_0_bytes: buffer must be contiguous, got strides (2,)"),
    (lambda: BinaryWeight.from_q1_0_bytes(b"\x00\x7e" + bytes(16), (1, 128)), ValueError, "scales must be finite; 1 are not, the first in row 0, group 0"),
    *((lambda high=high: BinaryWeight.from_q1_0_bytes(bytes(18) + bytes((0, high)) + bytes(16), (1, 256)), ValueError, "scales must be finite; 1 are not, the first in row 0, group 1")
      for high in (0x7C, 0xFC)),  # infinities
    (lambda: BinaryWeight(torch.zeros(2, 4), torch.ones(2, 1)), TypeError, "qweight must be an int32 Tensor, got torch.float32"),
    (lambda: BinaryWeight(torch.zeros(2, 4).int(), [1.0]), TypeError, "scales must be a floating Tensor, got list"),
    (lambda: BinaryWeight(torch.zeros(2, 4).int(), torch.ones(2, 1).int()), TypeError, "scales must be a floating Tensor, got torch.int32"),
    (lambda: BinaryWeight(torch.zeros(2, 5).int(), torch.ones(2, 1)), ValueError, "qweight must be (H, 4 G) and scales (H, G), got (2, 5) and (2, 1)"),
    (lambda: BinaryWeight(torch.zeros(2, 4).int(), torch.ones(2, 1), 129), ValueError, "width must have 1 groups of 128 or a part of one, as the scales do, got 129"),
    (lambda: BinaryWeight(torch.zeros(2, 0).int(), torch.ones(2, 0), -5), ValueError, "width must have 0 groups of 128 or a part of one, as the scales do, got -5"),
    (lambda: BinaryWeight(torch.zeros(2, 4).int(), torch.ones(2, 1), 100.5), TypeError, "BinaryWeight: width must be an int or None, got 100.5"),
    (lambda: BinaryWeight(torch.zeros(4, 2).int().t(), torch.ones(2, 1)), ValueError, "qweight must be contiguous, got strides (1, 2)"),
    (lambda: BinaryWeight(torch.zeros(2, 8).int(), torch.ones(2, 2).t()), ValueError, "scales must be contiguous, got strides (1, 2)"),
    (lambda: BinaryWeight(torch.zeros(2, 4).int(), torch.ones(2, 1, device="meta")), ValueError, "scales must be on qweight's device cpu, got meta"),
    (lambda: BinaryWeight(torch.zeros(2, 4).int(), torch.ones(2, 1)).to_q1_0_bytes(), TypeError, "to_q1_0_bytes: scales must be float16, got torch.float32"),
    (lambda: quantize_binary(torch.full((1, 128), 40000.0)).to_mlx(), ValueError, "to_mlx: twice each scale must be finite in float16; 1 are not"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_weights_and_bytes(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


W = quantize_binary(draw(24, 16), pad=True)
ON_META = quantize_binary(draw(24, 16), pad=True).to("meta")
WRONG = [
    ("w", draw(24, 16), TypeError, "w must be a BinaryWeight, got Tensor; fusedmlp.quantize_binary(w) makes one"),
    ("w", ON_META, ValueError, "w must be on x's device cpu, got meta"),
    ("x", torch.ones(4, 7), ValueError, "x must be (..., 16): D of w; got (4, 7)"),
    ("x", torch.ones(4, 16).int(), TypeError, "x must have a floating dtype, got torch.int32"),
    ("b", torch.ones(3), ValueError, "b must have shape (24,), got (3,)"),
    ("b", torch.ones(24).half(), TypeError, "b must have x's dtype torch.float32, got torch.float16"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "value", "error", "message"), WRONG)
def test_bad_arguments(argument, value, error, message, each_backend):
    arguments = {"x": torch.ones(4, 16), "w": W, "b": None, argument: value}
    with pytest.raises(error, match=f"^binary_linear: {re.escape(message)}"):
        fusedmlp.binary_linear(**arguments)


WRONG_BLOCK = [
    ("w_up", quantize_binary(draw(23, 16), pad=True), ValueError, "w_up must have shape (24, 16), got (23, 16)"),
    ("w_up", None, TypeError, "w_up must be a BinaryWeight, got NoneType"),
    ("w_down", quantize_binary(draw(16, 23), pad=True), ValueError, "w_down must have shape (16, 24), got (16, 23)"),
    ("b_down", torch.ones(24), ValueError, "b_down must have shape (16,), got (24,)"),
    ("x", torch.ones(4, 17), ValueError, "x must be (..., 16): D of w_gate; got (4, 17)"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "value", "error", "message"), WRONG_BLOCK)
def test_bad_blocks(argument, value, error, message, each_backend):
    down = quantize_binary(draw(16, 24), pad=True)
    arguments = {"x": torch.ones(4, 16), "w_gate": W, "w_up": W, "w_down": down, argument: value}
    with pytest.raises(error, match=f"^binary_gated_mlp: {re.escape(message)}"):
        fusedmlp.binary_gated_mlp(**arguments)
    with pytest.raises(ValueError, match="binary_gated_mlp: activation must be one of"):
        fusedmlp.binary_gated_mlp(**arguments, activation="swish")


def test_a_transposed_weight_is_named():
    w, x = fusedmlp.quantize_binary(torch.randn(256, 128)), torch.randn(2, 128)
    hint = "is \\(out, in\\), as nn.Linear's weight: is it transposed"
    with pytest.raises(ValueError, match=f"w_down must have shape .*; w_down {hint}"):
        fusedmlp.binary_gated_mlp(x, w, w, w)
    with pytest.raises(ValueError, match=f"w must have shape .*; w {hint}"):
        fusedmlp.binary_linear(torch.randn(2, 256), w)
