"""The one-bit format: against the definition, through bytes, safetensors and state_dict."""

import struct
import warnings

import pytest
import torch

import fusedmlp
from fusedmlp import BinaryWeight, quantize_binary
from fusedmlp.testing import CASES


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def blocks_of(w):
    """Q1_0 by its definition, a block at a time."""
    out = bytearray()
    for row in w.tolist():
        for at in range(0, len(row), 128):
            group = row[at : at + 128]
            scale = torch.tensor(group).abs().mean().half().item()
            bits = [sum((group[8 * i + j] >= 0) << j for j in range(8)) for i in range(16)]
            out += struct.pack("<e", scale) + bytes(bits)
    return bytes(out)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_bytes_are_those_of_the_definition(dtype):
    w = draw(3, 256, dtype=dtype)
    w[0, :2] = torch.tensor([0.0, -0.0])  # both are +
    bw = quantize_binary(w)
    assert bw.to_q1_0_bytes() == blocks_of(w)
    back = BinaryWeight.from_q1_0_bytes(bw.to_q1_0_bytes(), (3, 256))
    assert torch.equal(back.qweight, bw.qweight) and torch.equal(back.scales, bw.scales)
    assert bw.nbytes == len(bw.to_q1_0_bytes()) == 3 * 2 * 18


def test_dequantize_and_its_error():
    w = draw(64, 1024)
    bw = quantize_binary(w)
    values = bw.dequantize(torch.float32)
    assert values.shape == bw.shape == w.shape and bw.dequantize().dtype == torch.float16
    assert torch.equal(values >= 0, w >= 0)
    groups = w.unflatten(1, (-1, 128)).abs().mean(2)
    torch.testing.assert_close(values.abs()[:, ::128], groups, rtol=1e-3, atol=0)
    # sqrt(1 - 2 / pi) of normal weights, whatever their scale.
    assert ((values - w).norm() / w.norm()).item() == pytest.approx(0.603, abs=5e-3)


def test_mean_is_the_best_scale():
    w = draw(1, 128)
    bw = quantize_binary(w)
    error = lambda s: ((torch.where(w >= 0, s, -s) - w) ** 2).sum()  # noqa: E731
    best = bw.scales[0, 0].float()
    assert error(best) < error(best * 1.01) and error(best) < error(best * 0.99)


def test_padding():
    w = draw(3, 200)
    bw = quantize_binary(w, pad=True)
    assert bw.shape == (3, 200) and bw.scales.shape == (3, 2)
    torch.testing.assert_close(bw.scales[:, 1].float(), w[:, 128:].abs().mean(1), rtol=1e-3, atol=0)
    back = BinaryWeight.from_q1_0_bytes(bytearray(bw.to_q1_0_bytes()), (3, 200), pad=True)
    assert torch.equal(back.dequantize(), bw.dequantize()) and back.shape == (3, 200)


def test_groups_of_zeros_stay_zero():
    w = draw(2, 256)
    w[1, 128:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bw = quantize_binary(w)
    assert not bw.dequantize()[1, 128:].any() and bw.dequantize()[1, :128].all()
    assert fusedmlp.binary_linear(draw(1, 256), bw).isfinite().all()


def test_underflow_is_told_with_its_group():
    w = draw(2, 256)
    w[1, 128:] = 1e-9
    message = "underflows to 0 in float16 in 1 groups, the first in row 1, group 1: 1e-09"
    with pytest.warns(UserWarning, match=message):
        assert quantize_binary(w).scales[1, 1] == 0


def test_underflow_of_float64():
    """Even where float32 has 0 for the mean."""
    w = torch.zeros(2, 200, dtype=torch.float64)
    w[1, 128:] = -1e-60
    with pytest.warns(UserWarning, match="in 1 groups, the first in row 1, group 1: 1e-60"):
        quantize_binary(w, pad=True)


def test_mlx_arrays():
    bw = quantize_binary(draw(3, 256))
    arrays = bw.to_mlx()
    assert arrays["weight"].dtype == torch.uint32 and arrays["weight"].shape == (3, 8)
    words = arrays["weight"].view(torch.int32)
    bits = (words.unsqueeze(2) >> torch.arange(32) & 1).flatten(1)
    each = {k: arrays[k].repeat_interleave(128, 1).float() for k in ("scales", "biases")}
    assert torch.equal(each["scales"] * bits + each["biases"], bw.dequantize(torch.float32))


def test_safetensors_and_state_dict(tmp_path):
    from safetensors.torch import load_file, save_file

    bw, other = quantize_binary(draw(3, 256)), quantize_binary(-draw(3, 256))
    save_file(bw.state_dict(), tmp_path / "w.safetensors")
    tensors = load_file(tmp_path / "w.safetensors")
    assert torch.equal(BinaryWeight(**tensors).dequantize(), bw.dequantize())
    other.load_state_dict(tensors)
    assert torch.equal(other.dequantize(), bw.dequantize())
    with pytest.raises(
        TypeError, match=r"BinaryWeight: scales must be torch.float16, got .*bfloat"
    ):
        other.load_state_dict({**tensors, "scales": tensors["scales"].bfloat16()})
    for name, t in tensors.items():  # with assign=True it would be the weight's own
        turned = {**tensors, name: t.t().contiguous().t()}
        with pytest.raises(ValueError, match=f"BinaryWeight: {name} must be contiguous, got stri"):
            other.load_state_dict(turned, assign=True)
        other.load_state_dict(turned)  # copied into its own
        assert torch.equal(getattr(other, name), t) and getattr(other, name).is_contiguous()
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        other.load_state_dict(quantize_binary(draw(3, 128)).state_dict())


def test_width_is_saved_where_it_is_padded(tmp_path):
    """Else padding would become weights of a wider one."""
    from safetensors.torch import load_file, save_file

    narrow, wide, full = (quantize_binary(draw(3, d), pad=True) for d in (200, 250, 256))
    assert "width" in narrow.state_dict() and "width" not in full.state_dict()
    save_file(narrow.state_dict(), tmp_path / "w.safetensors")
    tensors = load_file(tmp_path / "w.safetensors")
    assert BinaryWeight(**tensors).shape == (3, 200)
    again = quantize_binary(-draw(3, 200), pad=True)
    again.load_state_dict(tensors)
    assert torch.equal(again.dequantize(), narrow.dequantize())
    for other, state, message in (
        (wide, tensors, "BinaryWeight: width must be 250, got 200"),
        (full, tensors, "BinaryWeight: width must be 256, got 200"),
        (narrow, {n: tensors[n] for n in ("qweight", "scales")}, r'Missing key.*"width"'),
    ):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(state)
    assert torch.equal(wide.dequantize(), quantize_binary(draw(3, 250), pad=True).dequantize())


def test_casting_a_model_leaves_scales_alone():
    bw = quantize_binary(draw(3, 256))
    values = bw.dequantize()
    for cast in (bw.bfloat16(), bw.double(), bw.to(torch.bfloat16), bw.to("cpu", torch.float32)):
        assert cast.scales.dtype == torch.float16 and torch.equal(cast.dequantize(), values)
    assert bw.to("meta").scales.is_meta
    assert repr(quantize_binary(draw(3, 200), pad=True)) == "BinaryWeight(H=3, D=200)"


def test_scales_may_be_trained():
    bw = quantize_binary(draw(3, 256))
    trained = BinaryWeight(bw.qweight, torch.nn.Parameter(bw.scales.float()))
    assert [name for name, _ in trained.named_parameters()] == ["scales"]
    fusedmlp.binary_linear(draw(5, 256), trained).square().sum().backward()
    assert trained.scales.grad.shape == (3, 2)


def test_trained_scales_are_written_as_others():
    bw = quantize_binary(draw(3, 256))
    trained = BinaryWeight(bw.qweight, torch.nn.Parameter(bw.scales))
    assert trained.to_q1_0_bytes() == bw.to_q1_0_bytes()
    for name, t in trained.to_mlx().items():
        assert torch.equal(t, bw.to_mlx()[name]) and not t.requires_grad, name


def test_a_parameter_of_one_column():
    w = torch.nn.Parameter(draw(3, 1))
    bw = quantize_binary(w, pad=True)
    assert torch.equal(bw.dequantize(), w.detach().half())
    assert bw.shape == (3, 1) and not bw.scales.requires_grad


@pytest.mark.parametrize("D", (200, 256))
def test_keys_that_are_missing_or_too_many(D):
    """As of any module, of which `width` is a tensor: strictly, and not."""
    own = quantize_binary(draw(3, D), pad=True).state_dict()
    fresh = lambda: quantize_binary(-draw(3, D), pad=True)  # noqa: E731
    for strict in (True, False):
        assert fresh().load_state_dict(own, strict=strict) == ([], [])
    for key in own:
        short = {name: t for name, t in own.items() if name != key}
        assert fresh().load_state_dict(short, strict=False) == ([key], [])
        with pytest.raises(RuntimeError, match=rf'Missing key.*"{key}"'):
            fresh().load_state_dict(short)
    assert fresh().load_state_dict({**own, "more": own["scales"]}, strict=False) == ([], ["more"])
    with pytest.raises(RuntimeError, match='Unexpected key.*"more"'):
        fresh().load_state_dict({**own, "more": own["scales"]})


@pytest.mark.parametrize("H, D", [(3, 200), (0, 128)])
def test_another_default_device_changes_nothing(H, D):
    w = quantize_binary(draw(H, D), pad=True)
    with torch.device("meta"):
        read = BinaryWeight.from_q1_0_bytes(w.to_q1_0_bytes(), (H, D), pad=True)
        states = read.state_dict(), w.state_dict()
        again = quantize_binary(w.dequantize(), pad=True)
        arrays = w.to_mlx()
    assert all(torch.equal(states[0][name], t) for name, t in states[1].items())
    assert torch.equal(again.qweight, w.qweight) and torch.equal(arrays["biases"], -w.scales)


def test_a_weight_of_one_column():
    w = quantize_binary(torch.tensor([[0.5], [-2.0]]), pad=True)
    assert w.shape == (2, 1) and w.dequantize().tolist() == [[0.5], [-2.0]]


def test_weights_of_no_rows_or_no_columns():
    empty = {(0, 128): (0, 4), (2, 0): (2, 0), (0, 0): (0, 0)}
    for (H, D), words in empty.items():
        for width in (None, D):
            bits = torch.zeros(words, dtype=torch.int32)
            w = BinaryWeight(bits, torch.ones(H, words[1] // 4).half(), width)
            assert w.shape == (H, D) and w.to_q1_0_bytes() == b""
            assert BinaryWeight.from_q1_0_bytes(b"", (H, D)).dequantize().shape == (H, D)


def test_scales_that_a_parametrization_makes_move_with_the_weight():
    bw = quantize_binary(draw(3, 256))
    trained = BinaryWeight(bw.qweight, torch.nn.Parameter(bw.scales))
    torch.nn.utils.parametrize.register_parametrization(trained, "scales", torch.nn.Identity())
    trained.to("meta", torch.float32)
    assert {(t.device.type, t.dtype) for t in trained.parameters()} == {("meta", torch.float16)}


def test_cases_draw_what_the_format_allows():
    inputs = CASES["binary_linear"].inputs(2, 200, 5, torch.bfloat16)
    assert inputs["q_weight"].dtype == torch.int32 and inputs["s_weight"].dtype == torch.float16
    assert inputs["q_weight"].shape == (5, 8) and (inputs["s_weight"] > 0).all()


def test_scales_of_16_bits_are_summed_in_32():
    """128 times 1000 is more than float16 holds."""
    w = torch.full((2, 128), 1000.0, dtype=torch.float16)
    assert (quantize_binary(w).scales == 1000).all()
