"""Launches of the dense family, at Llama-3-8B's MLP; the ragged sizes keep no 16-byte alignment, so
they take masked element loads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...packing import Packed, halves
from ...reference.activations import ACTIVATIONS
from ..arch.tile import ADAPTED
from ..dense.gated_act import gated_act_bwd, gated_act_fwd
from ..dense.gated_linear import gated_linear_bwd, gated_linear_fwd
from ..dense.linear_act import linear_act_bwd, linear_act_dz, linear_act_fwd, linear_act_h
from ..launch import Extra, Launch, Shapes, Tensors, sizes_of_one

M, D, H = SIZE = 4096, 4096, 14336
RAGGED = 4093, 4093, 1021
_BF16 = torch.bfloat16


def new(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def calls(
    launcher: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]]
) -> Iterator[Extra]:
    """Calls in bfloat16, of variant -> arguments."""
    for variant, args in arguments.items():
        yield variant, _BF16, functools.partial(launcher, *args)


def _gated_fwd(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    b_gate, b_up = (t["b_gate"], t["b_up"]) if training else (None, None)
    weights = (t["w_gate"], t["w_up"], b_gate, b_up)
    adapters = (*t["t"].chunk(2, 1), t["low_gate"], t["low_up"]) if "t" in t else ()
    h, gu = gated_linear_fwd(t["x"], *weights, activation, True, training, *adapters)
    return {"h": h, "g": gu[0], "u": gu[1]} if training else {"h": h}


def _gated_fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    g, u = F.linear(t["x"], t["w_gate"], t["b_gate"]), F.linear(t["x"], t["w_up"], t["b_up"])
    if "t" in t:
        t_gate, t_up = t["t"].chunk(2, 1)
        g, u = g + F.linear(t_gate, t["low_gate"]), u + F.linear(t_up, t["low_up"])
    return {"h": reference.gated_act(g, u), "g": g, "u": u}


def _gated_fwd_extras() -> Iterator[Extra]:
    """Weights contiguous along either dimension, or not stacked; g and u alone."""
    x, w, halves = new(M, D), new(H, D), new(2 * H, D).chunk(2)
    arguments = {
        "transposed": (x, new(D, H).t(), w, None, None, "silu", True, True),
        "two boxes": (x, w, w, None, None, "silu", True, True),
        "g and u": (x, *halves, None, None, "silu", False, True),
    }
    return calls(gated_linear_fwd, arguments)


# Sizes that take each kind of tile: large, small, skinny, and one that loads elements.
_KINDS = {"": SIZE, " small": (128, D, 1024), " few": (16, D, H), " ragged": RAGGED}


def _interleaved_fwd() -> Iterator[Extra]:
    """Rows of gate and up in turn, along either dimension contiguous."""

    def arguments(w: Tensor, m: int, b: Tensor) -> tuple[Any, ...]:
        pairs = halves(w, "interleaved", 0), halves(b, "interleaved")
        return new(m, w.shape[1]), *pairs[0], *pairs[1], "silu", True, True

    yield from calls(gated_linear_fwd, {"interleaved": arguments(new(2 * H, D), M, new(2 * H))})
    for kind, (m, d, h) in _KINDS.items():
        turned = arguments(new(d, 2 * h).t(), m, new(2 * h))
        yield from calls(gated_linear_fwd, {f"interleaved transposed{kind}": turned})


def _interleaved_bwd() -> Iterator[Extra]:
    for kind, (m, d, h) in _KINDS.items():
        arguments = (new(m, d), new(d, h), new(2, m, h), "silu", "interleaved", True, True)
        yield from calls(gated_linear_bwd, {f"interleaved{kind}": arguments})


def _adapter(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """A call's one adapter. Its `low` is a' backward, with strides of its own."""
    if "t" not in t:
        return ()
    return t["t"], t["low"] if "low" in t else t["low_a"].t()


def _dh(t: Mapping[str, Tensor]) -> Tensor:
    dh = t["dy"] @ t["w_down"]
    return dh + t["t"] @ t["low_a"] if "t" in t else dh


def _gated_bwd(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    dgu, h, db = gated_linear_bwd(
        t["dy"], t["w_down"], t["gu"], activation, None, True, training, *_adapter(t)
    )
    return {"dgu": dgu, "h": h, "db": db}


def _gated_bwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    gu = t["gu"].detach().requires_grad_()
    h = reference.gated_act(gu[0], gu[1])
    (dgu,) = torch.autograd.grad(h, gu, _dh(t))
    return {"dgu": dgu, "h": h.detach(), "db": dgu.sum(1)}


def _gated_bwd_extras() -> Iterator[Extra]:
    dy, pair = new(M, D), new(2, M, H)
    arguments = {
        "transposed down": (dy, new(H, D).t(), pair, "silu", None, True, True),
        "packed dgu": (dy, new(D, H), pair, "silu", "up_gate", False, True),
    }
    return calls(gated_linear_bwd, arguments)


def _plain_fwd(t: Mapping[str, Tensor], training: bool, activation: str = "gelu") -> Tensors:
    b = t["b"] if training else None
    h, z = linear_act_fwd(t["x"], t["w"], b, activation, True, training, *_adapter(t))
    return {"h": h, "z": z}


def _plain_fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    z = F.linear(t["x"], t["w"], t["b"])
    if "t" in t:
        z = z + F.linear(t["t"], t["low"])
    return {"h": F.gelu(z), "z": z}


def _plain_bwd(t: Mapping[str, Tensor], training: bool, activation: str = "gelu") -> Tensors:
    dz, h, db = linear_act_bwd(
        t["dy"], t["w_down"], t["z"], activation, True, training, *_adapter(t)
    )
    return {"dz": dz, "h": h, "db": db}


def _plain_bwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    z = t["z"].detach().requires_grad_()
    h = F.gelu(z)
    (dz,) = torch.autograd.grad(h, z, _dh(t))
    return {"dz": dz, "h": h.detach(), "db": dz.sum(0, keepdim=True)}


GATED_FWD = Launch(
    "gated_linear_fwd", _gated_fwd,
    lambda M, D, H: {"x": (M, D), "w_gate+w_up": (2 * H, D), "b_gate": (H,), "b_up": (H,)},
    SIZE, RAGGED, _gated_fwd_reference, activated=True, odd=sizes_of_one(*SIZE),
    extras=_gated_fwd_extras, everywhere=_interleaved_fwd,
)  # fmt: skip
GATED_BWD = Launch(
    "gated_linear_bwd", _gated_bwd,
    lambda M, D, H: {"dy": (M, D), "w_down": (D, H), "gu": (2, M, H)},
    SIZE, RAGGED, _gated_bwd_reference, activated=True, odd=sizes_of_one(*SIZE),
    extras=_gated_bwd_extras, everywhere=_interleaved_bwd,
)  # fmt: skip
PLAIN_FWD = Launch(
    "linear_act_fwd", _plain_fwd, lambda M, D, H: {"x": (M, D), "w": (H, D), "b": (H,)},
    SIZE, RAGGED, _plain_fwd_reference, activated=True, gated=False, odd=sizes_of_one(*SIZE),
)  # fmt: skip
PLAIN_BWD = Launch(
    "linear_act_bwd", _plain_bwd, lambda M, D, H: {"dy": (M, D), "w_down": (D, H), "z": (M, H)},
    SIZE, RAGGED, _plain_bwd_reference, activated=True, gated=False, odd=sizes_of_one(*SIZE),
)  # fmt: skip


# ---- with adapters

# Not a power of 2: two steps over the rank, of which the last is not full.
RANK = 48


def _adapted_fwd_shapes(M: int, D: int, H: int) -> Shapes:
    both, low = {"t": (M, 2 * RANK)}, {"low_gate": (H, RANK), "low_up": (H, RANK)}
    return {**GATED_FWD.shapes(M, D, H), **both, **low}


def _with(launch: Launch, *names: str) -> Callable[..., Shapes]:
    """Operands of `launch` and of one adapter."""

    def shapes(M: int, D: int, H: int) -> Shapes:
        sizes = {"t": (M, RANK), "low": (H, RANK), "low_a": (RANK, H)}
        return {**launch.shapes(M, D, H), **{name: sizes[name] for name in names}}

    return shapes


def _adapted_extras() -> Iterator[Extra]:
    """An adapter of gate or of up alone; ranks that fill no 16 bytes, and one of 1, which Triton
    compiles in."""
    x, w = new(M, D), new(2 * H, D).chunk(2)
    for rank in (1, 4, 8):
        t, low = new(M, rank), new(H, rank)
        for name, adapters in (
            ("gate", (t, None, low, None)), ("up", (None, t, None, low)),
        ):  # fmt: skip
            arguments = (x, *w, None, None, "silu", True, True, *adapters)
            yield from calls(gated_linear_fwd, {f"{name}, r={rank}": arguments})


def _adapted_interleaved_fwd() -> Iterator[Extra]:
    for kind, (m, d, h) in _KINDS.items():
        t, low = new(m, 2 * RANK).chunk(2, 1), new(h, RANK)
        pair = halves(new(d, 2 * h).t(), "interleaved", 0)
        arguments = (new(m, d), *pair, None, None, "silu", True, True, *t, low, low)
        yield from calls(gated_linear_fwd, {f"interleaved{kind}": arguments})


def _adapted_interleaved_bwd() -> Iterator[Extra]:
    for kind, (m, d, h) in _KINDS.items():
        adapter = new(m, RANK), new(RANK, h).t()
        arguments = (new(m, d), new(d, h), new(2, m, h), "silu", "interleaved", True, True)
        yield from calls(gated_linear_bwd, {f"interleaved{kind}": (*arguments, *adapter)})


# Their products have the weight of the projection's.
_SCALES = dict.fromkeys(("low", "low_a", "low_gate", "low_up"), RANK**-0.5)
GATED_FWD_ADAPTED = Launch(
    f"gated_linear_fwd{ADAPTED}", _gated_fwd, _adapted_fwd_shapes, SIZE, RAGGED,
    _gated_fwd_reference, activated=True, extras=_adapted_extras,
    everywhere=_adapted_interleaved_fwd, scales=_SCALES,
)  # fmt: skip
GATED_BWD_ADAPTED = Launch(
    f"gated_linear_bwd{ADAPTED}", _gated_bwd, _with(GATED_BWD, "t", "low_a"), SIZE, RAGGED,
    _gated_bwd_reference, activated=True, everywhere=_adapted_interleaved_bwd, scales=_SCALES,
)  # fmt: skip
PLAIN_FWD_ADAPTED = Launch(
    f"linear_act_fwd{ADAPTED}", _plain_fwd, _with(PLAIN_FWD, "t", "low"), SIZE, RAGGED,
    _plain_fwd_reference, activated=True, gated=False, scales=_SCALES,
)  # fmt: skip
PLAIN_BWD_ADAPTED = Launch(
    f"linear_act_bwd{ADAPTED}", _plain_bwd, _with(PLAIN_BWD, "t", "low_a"), SIZE, RAGGED,
    _plain_bwd_reference, activated=True, gated=False, scales=_SCALES,
)  # fmt: skip


# ---- elementwise


def _act_shapes(*names: str) -> Callable[..., Shapes]:
    return lambda M, D, H: dict.fromkeys(names, (M, H))


def _every_activation() -> Iterator[Extra]:
    """Cheap to compile, and the same on every architecture: all activations on one."""
    g = new(M, H)
    arguments = {name: (g, g, g, name, None) for name in ACTIVATIONS if name != "silu"}
    return calls(gated_act_bwd, arguments)


def _packed_fwd() -> Iterator[Extra]:
    for dtype in (_BF16, torch.float32):
        pair = halves(new(M, 2 * H, dtype=dtype), "interleaved")
        yield "interleaved", dtype, functools.partial(gated_act_fwd, *pair, "silu")


def _packed_bwd() -> Iterator[Extra]:
    """Both halves in one tensor; and apart, as they are saved, with one gradient for both."""
    for dtype in (_BF16, torch.float32):
        dh, both = new(M, H, dtype=dtype), new(M, 2 * H, dtype=dtype)
        ways: tuple[tuple[str, tuple[Tensor, Tensor], Packed], ...] = (
            ("packed", halves(both, "up_gate"), "up_gate"),
            ("interleaved", halves(both, "interleaved"), "interleaved"),
            ("saved apart", (dh, dh), "interleaved"),
        )
        for name, pair, packed in ways:
            yield name, dtype, functools.partial(gated_act_bwd, dh, *pair, "silu", packed)


ACT_FWD = Launch(
    "gated_act_fwd", lambda t, training: {"h": gated_act_fwd(t["g"], t["u"], "silu")},
    _act_shapes("g", "u"), SIZE, everywhere=_packed_fwd,
)  # fmt: skip
ACT_BWD = Launch(
    "gated_act_bwd",
    lambda t, training: {"dgu": gated_act_bwd(t["dh"], t["g"], t["u"], "silu", None)},
    _act_shapes("dh", "g", "u"), SIZE, extras=_every_activation, everywhere=_packed_bwd,
)  # fmt: skip
PLAIN_H = Launch(
    "linear_act_h", lambda t, training: {"h": linear_act_h(t["z"], "silu")}, _act_shapes("z"), SIZE
)
PLAIN_DZ = Launch(
    "linear_act_dz", lambda t, training: {"dz": linear_act_dz(t["dh"], t["z"], "silu")},
    _act_shapes("dh", "z"), SIZE,
)  # fmt: skip
