"""The products of csrc/cutlass/, launched, with the arguments of their Triton launchers
(kernels/dense/).

What CUTLASS's `can_implement` and TMA ask is checked here, before anything is enqueued, and is
`Unfit` by our names: a descriptor that the driver refuses is one that CUTLASS goes on with. Gate
and up are read under one descriptor, whose mode of two steps from one weight to the other.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels.dense.linear_act import linear_act_results
from ...kernels.device import multiprocessors
from ...packing import empty_gated, split_pair
from ..cuda import gated_linear as cuda
from ..cuda.loader import DTYPES
from . import loader
from .loader import unfit

_FARTHEST = 1 << 40  # bytes that a stride of a tensor map may span


def _bias(op: str, name: str, b: Tensor | None) -> int:
    if b is not None and b.stride(0) != 1:
        raise unfit(op, f"{name} to be contiguous", f"stride {b.stride(0)}")
    return 0 if b is None else b.data_ptr()


def _check_sizes(op: str, M: int, H: int, D: int, gated: bool) -> None:
    group = loader.load()[0].GROUP if gated else 8
    if D % 8 or D == 0 or H % group:
        needed = f"D to be a multiple of 8, and not 0, and H one of {group}"
        raise unfit(op, needed, f"D={D}, H={H}")
    if max(M, 2 * H, D) >= 2**31:
        raise unfit(op, "M, D and 2 H below 2^31", f"M={M}, D={D}, H={H}")


def _check_pair(op: str, w_gate: Tensor, w_up: Tensor) -> None:
    strides = cuda.row_stride(w_gate), cuda.row_stride(w_up)
    if strides[0] != strides[1]:
        raise unfit(op, "w_gate and w_up with one row stride", f"{strides[0]} and {strides[1]}")
    apart = abs(w_up.data_ptr() - w_gate.data_ptr())
    if apart >= _FARTHEST:
        raise unfit(op, "w_gate and w_up less than 2^40 bytes apart", f"{apart} bytes")


def _fwd(
    op: str,
    x: Tensor,
    names: tuple[str, str],
    weights: tuple[Tensor, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    h: Tensor | None,
    pair: tuple[Tensor | None, Tensor | None],
    activation: str,
) -> None:
    """Fill whichever of h and the pre-activations (M, H) are given, all contiguous."""
    enqueue, arch = loader.require(op, op, x)
    (M, D), H = x.shape, weights[0].shape[0]
    if M == 0 or H == 0:
        return
    w_gate, w_up = weights
    _check_sizes(op, M, H, D, w_up is not None)
    at_x, stride_x = cuda.matrix(op, "x", x, loader)
    at_gate, stride_gate = cuda.matrix(op, names[0], w_gate, loader)
    at_up, stride_up = (0, 0) if w_up is None else cuda.matrix(op, "w_up", w_up, loader)
    if w_up is not None:
        _check_pair(op, w_gate, w_up)
    at_b_gate, at_b_up = _bias(op, names[1], biases[0]), _bias(op, "b_up", biases[1])
    act, scalars = cuda.activation_of(op, activation, loader)
    if h is None and w_up is None:  # sm_100's epilogue has a destination always
        h = x.new_empty((M, H))
    at_h, at_g, at_u = (0 if t is None else t.data_ptr() for t in (h, *pair))
    enqueue(
        at_x, at_gate, at_up, at_b_gate, at_b_up, at_h, at_g, at_u,
        M, H, D, stride_x, stride_gate, stride_up, H, H, act, scalars,
        loader.load()[0].DTYPES[DTYPES[x.dtype]], x.get_device(), multiprocessors(x.device),
        cuda.stream(x.device),
    )  # fmt: skip


def gated_linear_fwd(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    want_h: bool,
    want_gu: bool,
    *adapters: Tensor | None,
) -> tuple[Tensor, Tensor]:
    cuda.check_no_adapter("gated_linear_fwd", adapters, loader)
    h, gu = empty_gated(x, x.shape[0], w_gate.shape[0], want_h, want_gu)
    pair = split_pair(gu, None) if want_gu else (None, None)
    weights, biases = (w_gate, w_up), (b_gate, b_up)
    names = "w_gate", "b_gate"
    _fwd("gated_linear_fwd", x, names, weights, biases, h if want_h else None, pair, activation)
    return h, gu


def linear_act_fwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    activation: str,
    want_h: bool,
    want_z: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    cuda.check_no_adapter("linear_act_fwd", adapter, loader)
    h, z = linear_act_results(x, w, want_h, want_z)
    pair = (z if want_z else None, None)
    wanted_h = h if want_h else None
    _fwd("linear_act_fwd", x, ("w", "b"), (w, None), (b, None), wanted_h, pair, activation)
    return h, z
