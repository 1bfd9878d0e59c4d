"""quantize_binary(w) -> BinaryWeight: a weight in one bit each and a scale for each 128.

| tensor | shape | |
|---|---|---|
| w | (H, D) | any floating dtype |
| qweight | (H, 4 G) int32 | G = ceil(D / 128); bit k % 32 of word k // 32 is the sign of weight k |
| scales | (H, G) float16 | mean |w| of 128 neighbours of a row |

w ~ +scale where its bit is 1, which it is where w >= 0, else -scale: 1.125 bits a weight. This is
Q1_0 of llama.cpp (Q1_0_g128 of Bonsai) in two planes, so that words are aligned; its file has
blocks of 18 bytes, the scale and then 16 bytes of bits, lowest first. For weights of mean zero that
are normally distributed it is off by 60% (sqrt(1 - 2 / pi)) in relative L2: a model has to be
trained with it (layers.BinaryLinear), not rounded to it.

Sources: Bonsai whitepaper (PrismML, 2026-03-31); llama.cpp, ggml's type 41; the mean |w| as the
least-squares scale: Rastegari et al., XNOR-Net, arXiv 1603.05279.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.binary import GROUP, binary_scales, dequantize_binary, pack_signs
from ..reference.values import any_of

BLOCK_BYTES = 2 + GROUP // 8


class BinaryWeight(nn.Module):
    """An (H, D) weight in one bit each: + or - the scale of its 128 neighbours in a row.

    A module so that it moves with `.to()`, and is saved and loaded by `state_dict`: `qweight` and
    `scales`, and of a padded one `width`, plain tensors that safetensors takes too. `.to(dtype)`,
    `.half()` and their kin leave the scales' dtype alone.

    Args:
        qweight: int32 (H, 4 G), contiguous.
        scales: (H, G), contiguous, of a floating dtype; float16 where files are to be written. An
            nn.Parameter stays one: `binary_linear` and its kin give it a gradient.
        width: D; None: 128 G. Less where the last group is padded.

    Raises ValueError or TypeError for tensors that cannot be those of such a weight.
    load_state_dict raises TypeError for another dtype, its RuntimeError for another width, and
    with assign=True ValueError for what is not contiguous.

    Examples:
        >>> import torch
        >>> from fusedmlp import BinaryWeight, quantize_binary
        >>> w = quantize_binary(torch.randn(64, 256))
        >>> again = BinaryWeight.from_q1_0_bytes(w.to_q1_0_bytes(), (64, 256))
        >>> torch.equal(again.qweight, w.qweight), w.shape
        (True, (64, 256))
    """

    qweight: Tensor
    scales: Tensor

    def __init__(self, qweight: Tensor, scales: Tensor, width: int | None = None) -> None:
        super().__init__()
        _check_planes(qweight, scales)
        self.width = _width(width, scales.shape[1])
        self.register_buffer("qweight", qweight)
        if isinstance(scales, nn.Parameter):
            self.scales = scales
        else:
            self.register_buffer("scales", scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, D)."""
        return self.qweight.shape[0], self.width

    @property
    def nbytes(self) -> int:
        """The bytes of bits and scales."""
        return self.qweight.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """+-scale (H, D), in `dtype` or else that of the scales."""
        w = dequantize_binary(self.qweight, self.scales, self.width)
        return w if dtype is None else w.to(dtype)

    def to_q1_0_bytes(self) -> bytes:
        """Rows of 18-byte blocks as in a GGUF file, a padded row with its padding.

        Raises TypeError unless the scales are float16.
        """
        self._float16("to_q1_0_bytes")
        H, groups = self.scales.shape
        scales = self.scales.cpu().reshape(H, groups, 1).view(torch.uint8)
        bits = self.qweight.cpu().view(torch.uint8).view(H, groups, GROUP // 8)
        return bytes(torch.cat((scales, bits), 2).numpy().tobytes())

    @classmethod
    def from_q1_0_bytes(
        cls, buffer: Any, shape: tuple[int, int], *, pad: bool = False
    ) -> BinaryWeight:
        """The weight of `shape` (H, D) that `to_q1_0_bytes` or a GGUF file holds; copies.

        Args:
            buffer: anything with the buffer protocol, contiguous, of H * ceil(D / 128) * 18 bytes.
            pad: allow a D that is no multiple of 128: the rest of a row's last group is padding.

        Raises ValueError for another length, shape or D, or scales that are not finite; TypeError
        for what has no buffer or is no shape.
        """
        H, D = _shape("from_q1_0_bytes", shape)
        groups = _groups("from_q1_0_bytes", "shape", D, pad)
        raw = _raw("from_q1_0_bytes", buffer)
        if len(raw) != H * groups * BLOCK_BYTES:
            raise ValueError(
                f"from_q1_0_bytes: buffer must have {H * groups * BLOCK_BYTES} bytes, {groups} "
                f"blocks of {BLOCK_BYTES} a row of {tuple(shape)}, got {len(raw)}"
            )
        # frombuffer() refuses an empty buffer.
        data = torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)[: len(raw)]
        blocks = data.view(H, groups, BLOCK_BYTES)
        # Clones: a view may start anywhere, where its words do not.
        scales, words = (
            t.clone(memory_format=torch.contiguous_format) for t in blocks.split((2, 16), 2)
        )
        scales = scales.view(torch.float16).view(H, groups)
        words = words.view(torch.int32).view(H, 4 * groups)
        _refuse("from_q1_0_bytes", "scales must be finite", ~scales.isfinite())
        return cls(words, scales, D)

    def to_mlx(self) -> dict[str, Tensor]:
        """As MLX's quantised arrays of 1 bit in groups of 128: `weight` uint32 (H, 4 G), `scales`
        2 s and `biases` -s, so that w = scales * bit + biases; shares no memory.

        Raises TypeError unless the scales are float16, ValueError where 2 s overflows.
        """
        self._float16("to_mlx")
        doubled = 2 * self.scales.detach()
        _refuse("to_mlx", "twice each scale must be finite in float16", ~doubled.isfinite())
        words = self.qweight.clone().view(torch.uint32)
        return {"weight": words, "scales": doubled, "biases": -self.scales.detach()}

    def _float16(self, what: str) -> None:
        if self.scales.dtype != torch.float16:
            raise TypeError(f"{what}: scales must be float16, got {self.scales.dtype}")

    def _apply(self, fn: Any, recurse: bool = True) -> BinaryWeight:
        # A cast of the whole model, to bfloat16 say, would make other weights of these.
        return super()._apply(lambda t: _moved(t, fn), recurse)

    def extra_repr(self) -> str:
        return "H={}, D={}".format(*self.shape)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.width % GROUP:  # else the planes' own shapes tell it
            destination[prefix + "width"] = torch.tensor(self.width, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in ("qweight", "scales"):
            loaded, own = state_dict.get(prefix + name), getattr(self, name)
            if not isinstance(loaded, Tensor):
                continue
            if loaded.dtype != own.dtype:
                raise TypeError(
                    f"BinaryWeight: {prefix}{name} must be {own.dtype}, got {loaded.dtype}"
                )
            if local_metadata.get("assign_to_params_buffers"):  # it is kept as it is
                _check_contiguous(prefix + name, loaded)
        key = prefix + "width"
        # At another width padding would become weights, or weights padding.
        if key in state_dict and (width := int(state_dict[key])) != self.width:
            error_msgs.append(f"BinaryWeight: {key} must be {self.width}, got {width}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        if self.width % GROUP and key not in state_dict:
            missing_keys.append(key)


def _moved(t: Tensor, fn: Any) -> Tensor:
    """fn(t), but if that is of another dtype, t on its device."""
    made: Tensor = fn(t)
    return made if made.dtype == t.dtype else t.to(made.device)


def _check_planes(qweight: Tensor, scales: Tensor) -> None:
    if not isinstance(qweight, Tensor) or qweight.dtype != torch.int32:
        got = qweight.dtype if isinstance(qweight, Tensor) else type(qweight).__name__
        raise TypeError(f"BinaryWeight: qweight must be an int32 Tensor, got {got}")
    if not isinstance(scales, Tensor) or not scales.dtype.is_floating_point:
        got = scales.dtype if isinstance(scales, Tensor) else type(scales).__name__
        raise TypeError(f"BinaryWeight: scales must be a floating Tensor, got {got}")
    H, groups = scales.shape if scales.dim() == 2 else (-1, -1)
    if qweight.shape != (H, 4 * groups):
        raise ValueError(
            "BinaryWeight: qweight must be (H, 4 G) and scales (H, G), got "
            f"{tuple(qweight.shape)} and {tuple(scales.shape)}"
        )
    if qweight.device != scales.device:
        raise ValueError(
            f"BinaryWeight: scales must be on qweight's device {qweight.device}, got "
            f"{scales.device}"
        )
    _check_contiguous("qweight", qweight)
    _check_contiguous("scales", scales)


def _check_contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"BinaryWeight: {name} must be contiguous, got strides {t.stride()}")


def _width(width: Any, groups: int) -> int:
    """D, of an int or what stands for one: a tensor that a state_dict has."""
    if width is None:
        return GROUP * groups
    try:
        D = operator.index(width)
    except TypeError:
        raise TypeError(f"BinaryWeight: width must be an int or None, got {width!r}") from None
    if D < 0 or groups != -(-D // GROUP):
        raise ValueError(
            f"BinaryWeight: width must have {groups} groups of {GROUP} or a part of one, as the "
            f"scales do, got {D}"
        )
    return D


def _shape(op: str, shape: Any) -> tuple[int, int]:
    try:
        sizes = [operator.index(n) for n in shape]
    except TypeError:
        raise TypeError(f"{op}: shape must be (H, D), two ints, got {shape!r}") from None
    if len(sizes) != 2 or min(sizes) < 0:
        raise ValueError(f"{op}: shape must be (H, D), none negative, got {tuple(sizes)}")
    return sizes[0], sizes[1]


def _raw(op: str, buffer: Any) -> memoryview:
    """The bytes of `buffer`, without a copy."""
    try:
        view = memoryview(buffer)
    except TypeError:
        got = type(buffer).__name__
        raise TypeError(f"{op}: buffer must have the buffer protocol, got {got}") from None
    if not view.c_contiguous:
        raise ValueError(f"{op}: buffer must be contiguous, got strides {view.strides}")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _groups(op: str, name: str, D: int, pad: bool) -> int:
    if D % GROUP and not pad:
        raise ValueError(
            f"{op}: {name} must have rows of a multiple of {GROUP}, got {D}; pad=True pads the "
            "last group of each"
        )
    return -(-D // GROUP)


def _refuse(op: str, rule: str, bad: Tensor) -> None:
    """ValueError naming the first of the (H, G) groups that break a rule."""
    if any_of(bad):
        row, group = bad.nonzero()[0].tolist()
        count = int(bad.sum())
        raise ValueError(f"{op}: {rule}; {count} are not, the first in row {row}, group {group}")


def quantize_binary(w: Tensor, *, pad: bool = False) -> BinaryWeight:
    """w in one bit a weight, its sign, and mean |w| of every 128 of a row in float16.

    Args:
        w: (H, D) of any floating dtype; detached. Rounding is not differentiable: train with
            `layers.BinaryLinear`.
        pad: allow a D that is no multiple of 128. The scale of a row's last group is that of the
            weights that are there, and inputs stay D wide.

    A group of zeros has scale 0, and is zeros again. Raises ValueError for another shape, for a D
    that is no multiple of 128, and naming the group, where weights are not finite or their scale
    overflows float16; TypeError for a dtype that is not floating. Warns, naming a group, where a
    scale underflows to 0 in float16. Waits for the GPU, to look at the values.

    Source: Q1_0 of llama.cpp and Bonsai.

    Examples:
        >>> import torch
        >>> from fusedmlp import quantize_binary
        >>> v = torch.randn(64, 256)
        >>> w = quantize_binary(v)
        >>> w.nbytes, v.numel() * 18 // 128  # 18 bytes for 128 weights
        (2304, 2304)
        >>> torch.equal(w.dequantize().sign(), v.half().sign())
        True
    """
    op = "quantize_binary"
    if not isinstance(w, Tensor) or not w.dtype.is_floating_point:
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"{op}: w must be a floating Tensor, got {got}")
    if w.dim() != 2 or w.shape[1] < 1:
        raise ValueError(f"{op}: w must be (H, D), D at least 1, got {tuple(w.shape)}")
    _groups(op, "w", w.shape[1], pad)
    w = w.detach()
    exact = binary_scales(w)
    # Weights whose sum overflows float32 are finite, and so are told apart.
    _refuse_weights(op, w)
    scales = exact.to(torch.float16)
    _refuse(op, "mean |w| must be at most 65504, float16's largest", ~scales.isfinite())
    # Not by `exact`, which is float32 and may itself be 0 for weights in float64.
    weights = F.pad(w != 0, (0, -w.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).any(2)
    lost = (scales == 0) & weights
    if any_of(lost):
        row, group = lost.nonzero()[0].tolist()
        mean = w[row].double().split(GROUP)[group].abs().mean().item()
        warnings.warn(
            f"{op}: mean |w| underflows to 0 in float16 in {int(lost.sum())} groups, the first in "
            f"row {row}, group {group}: {mean:.3g}; scale w up, and what it multiplies down",
            stacklevel=2,
        )
    return BinaryWeight(pack_signs(w), scales, w.shape[1])


def _refuse_weights(op: str, w: Tensor) -> None:
    bad = ~w.isfinite()
    if any_of(bad):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: w must be finite, got {int(bad.sum())} NaN or infinite, the first in row "
            f"{row}, group {column // GROUP}"
        )
