"""The gated linear kernels of csrc/, launched: a function for each op, with the arguments of its
Triton launcher (kernels/dense/) behind `enqueue`, the extension's.

TMA sets the limits: every matrix starts on 16 bytes, its columns are contiguous, its rows step by a
multiple of 16 bytes, and D and H are multiples of 8. Other tensors are `Unfit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.arch.tile import cdiv
from ...kernels.dense.gated_linear import gated_linear_grads
from ...kernels.dense.linear_act import linear_act_grads, linear_act_results
from ...kernels.device import capability_of, multiprocessors
from ...packing import Packed, empty_gated, split_pair
from ...reference.activations import resolve
from . import loader
from .loader import unfit

Enqueue = Callable[..., None]
Scalars = tuple[float, float, float]

_variant: str | None = None


@contextmanager
def variant(name: str | None) -> Iterator[None]:
    """Inside, every kernel here runs as its variant `name`, a name of `_C.VARIANTS`; None: as the
    kernel itself chooses. Process-wide, for benches; a kernel without it raises ValueError."""
    global _variant
    previous, _variant = _variant, name
    try:
        yield
    finally:
        _variant = previous


def forced() -> str | None:
    """The name in force."""
    return _variant


def variants(kernel: str, capability: int) -> tuple[str, ...]:
    """Names of what `kernel` can be asked for on such a GPU, its default first; () without it."""
    launcher, arch = loader.find(kernel, capability)
    return () if launcher is None else tuple(loader.load()[0].VARIANTS[kernel, arch])


def _number(op: str, device: torch.device) -> int:
    if _variant is None:
        return -1
    names = variants(op, capability_of(device))
    if _variant not in names:
        raise ValueError(f"{op}: variant must be one of {', '.join(names)}, got {_variant!r}")
    return names.index(_variant)


class _Names(NamedTuple):
    """An op's own names, for messages."""

    op: str
    gate: str = "w_gate"
    up: str = "w_up"
    b_gate: str = "b_gate"
    b_up: str = "b_up"
    down: str = "w_down"
    g: str = "g"


_GATED_FWD, _GATED_BWD = _Names("gated_linear_fwd"), _Names("gated_linear_bwd")
_PLAIN_FWD = _Names("linear_act_fwd", gate="w", b_gate="b")
_PLAIN_BWD = _Names("linear_act_bwd", down="w_out", g="z")


# `of`, here and below: the loader of the extension that is asked, with its `load` and its `unfit`.
def check_no_adapter(op: str, adapters: tuple[Tensor | None, ...], of: ModuleType = loader) -> None:
    if any(t is not None for t in adapters):
        raise of.unfit(op, "no adapter (lora)", "one: csrc/ adds no low-rank product")


def _check_sizes(op: str, M: int, H: int, D: int) -> None:
    if H % 8 or D % 8 or D == 0:
        raise unfit(op, "D and H to be multiples of 8, and D not 0", f"D={D}, H={H}")
    if max(M, H, D) >= 2**31:
        raise unfit(op, "M, D and H below 2^31", f"M={M}, D={D}, H={H}")


def row_stride(t: Tensor) -> int:
    # Whatever the tensor says of one row: there is no second.
    return t.shape[1] if t.shape[0] == 1 else t.stride(0)


def readable(t: Tensor) -> bool:
    """By TMA, 16 bytes at a time."""
    outer = row_stride(t)
    return not (t.stride(1) != 1 or outer % 8 or outer < t.shape[1] or t.data_ptr() % 16)


def matrix(op: str, name: str, t: Tensor, of: ModuleType = loader) -> tuple[int, int]:
    """Address and row stride of a 16-bit matrix whose columns are a multiple of 8."""
    if not readable(t):
        raise of.unfit(
            op,
            f"{name} to start on 16 bytes, with columns contiguous and rows apart by a multiple "
            "of 16 bytes and not overlapping",
            f"strides {tuple(t.stride())} for shape {tuple(t.shape)}, "
            f"{t.data_ptr() % 16} bytes off",
        )
    return t.data_ptr(), row_stride(t)


def _bias(op: str, name: str, b: Tensor | None) -> int:
    if b is None:
        return 0
    address = b.data_ptr()
    if b.stride(0) != 1 or address % 4:
        raise unfit(
            op,
            f"{name} to be contiguous and to start on 4 bytes",
            f"stride {b.stride(0)}, {address % 4} bytes off",
        )
    return address


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def activation_of(op: str, activation: str, of: ModuleType = loader) -> tuple[int, Scalars]:
    """An activation in a params struct: its functor's number, and its parameters in the order of
    its row, filled up with zeros. A row of reference/activations.py without a functor in
    csrc/activations.cuh is Unfit."""
    row, scalars = resolve(activation)
    functors = of.load()[0].ACTIVATIONS
    if row.name not in functors:
        held = f"{', '.join(functors)} (those with a functor in csrc/activations.cuh)"
        raise of.unfit(op, f"activation to be one of {held}", repr(activation))
    first, second, third = (*scalars, 0.0, 0.0, 0.0)[:3]
    return functors[row.name], (first, second, third)


def _tail(op: str, x: Tensor, activation: str) -> tuple[int | Scalars, ...]:
    """What every params struct ends with, and the stream."""
    return (
        *activation_of(op, activation),
        loader.load()[0].DTYPES[loader.DTYPES[x.dtype]],
        x.get_device(),
        multiprocessors(x.device),
        _number(op, x.device),
        stream(x.device),
    )


def _fwd(
    enqueue: Enqueue,
    names: _Names,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    h: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    activation: str,
) -> None:
    """Fill whichever of h, g, u (M, H) are given, all contiguous."""
    op = names.op
    M, D = x.shape
    H = w_gate.shape[0]
    if M == 0 or H == 0:
        return
    _check_sizes(op, M, H, D)
    at_x, stride_x = matrix(op, "x", x)
    at_gate, stride_gate = matrix(op, names.gate, w_gate)
    at_up, stride_up = (0, 0) if w_up is None else matrix(op, names.up, w_up)
    at_b_gate, at_b_up = _bias(op, names.b_gate, b_gate), _bias(op, names.b_up, b_up)
    enqueue(
        at_x, at_gate, at_up, at_b_gate, at_b_up, _address(h), _address(g), _address(u),
        M, H, D, stride_x, stride_gate, stride_up, H, H, *_tail(op, x, activation),
    )  # fmt: skip


def _bwd(
    enqueue: Enqueue,
    names: _Names,
    dy: Tensor,
    w_down: Tensor,
    g: Tensor,
    u: Tensor | None,
    dg: Tensor,
    du: Tensor | None,
    h: Tensor | None,
    want_db: bool,
    activation: str,
) -> Tensor:
    """Fill dg and du (M, H), of one layout, and h if given; returns the column sums of dg and du
    (1 or 2 or 0, H). A dy that TMA does not read is copied: its strides are autograd's choice, 0
    behind `y.sum()`, and nobody could choose others."""
    op = names.op
    M, D = dy.shape
    H = w_down.shape[1]
    halves = 1 if u is None else 2
    if M == 0 or H == 0:
        return dy.new_zeros((halves if want_db else 0, H))
    _check_sizes(op, M, H, D)
    tail = _tail(op, dy, activation)
    if not readable(dy):
        dy = dy.clone(memory_format=torch.contiguous_format)
    at_dy, stride_dy = matrix(op, "dy", dy)
    at_down, stride_down = matrix(op, names.down, w_down)
    at_g, stride_gu = matrix(op, names.g, g)
    at_u = 0 if u is None else matrix(op, "u", u)[0]
    sums = None
    if want_db:
        tiles_m = cdiv(M, loader.load()[0].SUM_ROWS)
        sums = dy.new_empty((halves, tiles_m, H), dtype=torch.float32)
    enqueue(
        at_dy, at_down, at_g, at_u, _address(dg), _address(du), _address(h), _address(sums),
        M, H, D, stride_dy, stride_down, stride_gu, dg.stride(0), H, *tail,
    )  # fmt: skip
    return dy.new_empty((0, H)) if sums is None else sums.sum(1).to(dy.dtype)


def gated_linear_fwd(
    enqueue: Enqueue,
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
    check_no_adapter("gated_linear_fwd", adapters)
    h, gu = empty_gated(x, x.shape[0], w_gate.shape[0], want_h, want_gu)
    g, u = split_pair(gu, None) if want_gu else (None, None)
    wanted_h = h if want_h else None
    _fwd(enqueue, _GATED_FWD, x, w_gate, w_up, b_gate, b_up, wanted_h, g, u, activation)
    return h, gu


def gated_linear_bwd(
    enqueue: Enqueue,
    dy: Tensor,
    w_down: Tensor,
    gu: Tensor,
    activation: str,
    packed: Packed | None,
    want_h: bool,
    want_db: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_no_adapter("gated_linear_bwd", adapter)
    if packed == "interleaved":
        raise unfit("gated_linear_bwd", "packed to be None, 'gate_up' or 'up_gate'", repr(packed))
    g, u = split_pair(gu, None)
    dgu, h = gated_linear_grads(dy, w_down, packed, want_h)
    dg, du = split_pair(dgu, packed)
    rows = (g, u, dg, du, h if want_h else None)
    db = _bwd(enqueue, _GATED_BWD, dy, w_down, *rows, want_db, activation)
    return dgu, h, db


def linear_act_fwd(
    enqueue: Enqueue,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    activation: str,
    want_h: bool,
    want_z: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_no_adapter("linear_act_fwd", adapter)
    h, z = linear_act_results(x, w, want_h, want_z)
    wanted_h, wanted_z = h if want_h else None, z if want_z else None
    _fwd(enqueue, _PLAIN_FWD, x, w, None, b, None, wanted_h, wanted_z, None, activation)
    return h, z


def linear_act_bwd(
    enqueue: Enqueue,
    dy: Tensor,
    w_out: Tensor,
    z: Tensor,
    activation: str,
    want_h: bool,
    want_db: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_no_adapter("linear_act_bwd", adapter)
    dz, h = linear_act_grads(dy, w_out, want_h)
    rows = (z, None, dz, None, h if want_h else None)
    db = _bwd(enqueue, _PLAIN_BWD, dy, w_out, *rows, want_db, activation)
    return dz, h, db
