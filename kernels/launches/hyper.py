"""Launches of hyper_attention: whole calls, of which a search changes the tile of one kernel. The
gate's are training at 4 x 4096 tokens of width 1024, and decoding from caches of as many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..arch import INTERPRETER
from ..later import Later
from ..launch import Extra, Launch, Shapes, Size, Tensors
from ..pick import hyper_tile

NAMES = ("q", "k", "v", "c1", "u1", "vt1", "d1", "c2", "u2", "vt2", "d2")
SHARED = ("u1", "vt1", "d1", "u2", "vt2", "d2")  # by all sequences of a batch
OPTIONS: list[Any] = [True, True, True, 1e-12]
# The published default rank; sequences in training, and in decoding.
RANK, BATCH, DECODING = 16, 4, 8
# Random scores of real widths overflow float16 unless queries and parameters are small.
SCALES = {"q": 0.125, "u1": 0.02, "vt1": 0.02, "d1": 0.1, "u2": 0.02, "vt2": 0.02, "d2": 0.1}
TOKENS, D = 4 * 4096, 1024
_BF16 = torch.bfloat16

hyper_attention_fwd = Later("hyper.hyper_attention").hyper_attention_fwd
hyper_attention_bwd = Later("hyper.gradients").hyper_attention_bwd
hyper_attention_step = Later("hyper.hyper_attention_step").hyper_attention_step


def core(
    rows: int, N: int, L: int, heads: tuple[int, int], dq: int, dv: int, ranks: tuple[int, int]
) -> Shapes:
    """Operands of `rows` queries and N sources; of a step with 0 rows."""
    (Q, H), (r1, r2), T = heads, ranks, (rows,) if rows else ()
    return {
        "q": (Q, *T, dq), "k": (Q, N, dq), "v": (H, N, dv),
        "c1": (Q, *T, r1), "u1": (Q, L, r1), "vt1": (Q, r1, L), "d1": (Q, L),
        "c2": (H, *T, r2), "u2": (H, L, r2), "vt2": (H, r2, L), "d2": (H, L),
    }  # fmt: skip


def of_layer(batch: int, step: bool, sub_heads: int = 2) -> Callable[[int, int, int], Shapes]:
    """As a layer of published defaults calls it, from all tokens of a batch, the model's width and
    the number of heads; queries and keys have D // 4 together."""

    def shapes(M: int, D: int, heads: int) -> Shapes:
        T, Q = max(1, M // batch), sub_heads * heads
        widths = max(1, D // 4 // Q), max(1, D // heads)
        one = core(0 if step else T, T, T, (Q, heads), *widths, (RANK, RANK))
        return {name: s if name in SHARED else (batch, *s) for name, s in one.items()}

    return shapes


# ---- the tile search

TRAINING, STEP = of_layer(BATCH, False), of_layer(DECODING, True)


def _operands(t: Mapping[str, Tensor]) -> list[Any]:
    return [t[name] for name in NAMES]


def _grads(grads: Sequence[Tensor]) -> Tensors:
    return {f"d{name}": g for name, g in zip(NAMES, grads, strict=True)}


def _fwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    return {"out": hyper_attention_fwd(*_operands(t), *OPTIONS)[0]}


def _fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {"out": reference.hyper_attention(*_operands(t))}


def _with_dy(M: int, D: int, heads: int) -> Shapes:
    shapes = TRAINING(M, D, heads)
    return {**shapes, "dy": shapes["v"]}


def _bwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    """With the forward, which leaves what the backward reads."""
    out, *left = hyper_attention_fwd(*_operands(t), *OPTIONS)
    arguments = [*_operands(t), *left, *OPTIONS, [True] * len(NAMES)]
    return _grads(hyper_attention_bwd(t["dy"], out, *arguments))


def _bwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    leaves = [x.detach().requires_grad_() for x in _operands(t)]
    return _grads(torch.autograd.grad(reference.hyper_attention(*leaves), leaves, t["dy"]))


def _position(size: Size, device: torch.device) -> Tensors:
    """A step at the end of a full cache."""
    M, D, heads = size
    return {"position": torch.full((1,), STEP(M, D, heads)["k"][-2] - 1, device=device)}


def _step(t: Mapping[str, Tensor], training: bool) -> Tensors:
    q, k, v, *rest = _operands(t)
    return {"out": hyper_attention_step(q, k, v, t["position"], *rest, *OPTIONS)}


def _step_reference(t: Mapping[str, Tensor]) -> Tensors:
    named: dict[str, Any] = dict(t)
    return {"out": reference.hyper_attention_step(**named)}


# ---- the gate


def _gated(shapes: Shapes, dtype: torch.dtype, bare: bool) -> list[Any]:
    """Operands whose heads lie side by side, as projections leave them."""
    made: list[Any] = []
    for name, shape in shapes.items():
        if bare and name not in NAMES[:3]:
            made.append(None)
        elif name in SHARED:
            made.append(torch.empty(shape, dtype=dtype))
        else:
            B, heads, T, width = shape
            made.append(torch.empty(B, T, heads, width, dtype=dtype).transpose(1, 2))
    return made


VARIANTS: dict[str, tuple[int, int, torch.dtype]] = {  # heads, sub-heads of one, dtype
    "glu, H 16": (16, 2, _BF16),
    "relu, H 2": (2, 1, _BF16),
    "bare": (2, 2, _BF16),
    "glu, H 2, float32": (2, 2, torch.float32),
}


def _variant(name: str, heads: int, sub_heads: int, dtype: torch.dtype) -> tuple[Any, ...]:
    shapes = of_layer(BATCH, False, sub_heads)(TOKENS, D, heads)
    return shapes, _gated(shapes, dtype, name == "bare")


def _calls(kernel: str, name: str, heads: int, sub_heads: int, dtype: torch.dtype) -> Extra:
    shapes, tensors = _variant(name, heads, sub_heads, dtype)
    if kernel == "hyper_attention_fwd":
        return name, dtype, functools.partial(hyper_attention_fwd, *tensors, *OPTIONS)
    if kernel == "hyper_attention_step":
        q, c1, c2 = (
            None if t is None else t[:, :, 0] for t in (tensors[0], tensors[3], tensors[7])
        )
        position = torch.empty(1, dtype=torch.int64)
        arguments: tuple[Any, ...] = (
            q, *tensors[1:3], position, c1, *tensors[4:7], c2, *tensors[8:], *OPTIONS
        )  # fmt: skip
        return name, dtype, functools.partial(hyper_attention_step, *arguments)
    rank = 0 if name == "bare" else RANK
    (B, Q, T, _), H, v = shapes["q"], shapes["v"][1], tensors[2]
    left = [torch.empty(B, n, T, rank) for n in (Q, H)] + [torch.empty(B, H, T)]
    wanted: Any = [True] * len(NAMES)
    arguments = (v, v, *tensors, *left, *OPTIONS, wanted)
    return name, dtype, functools.partial(hyper_attention_bwd, *arguments)


def _compiled(kernel: str) -> Launch:
    def everywhere() -> Iterator[Extra]:
        yield _calls(kernel, "glu, H 2", 2, 2, _BF16)

    def extras() -> Iterator[Extra]:
        return (_calls(kernel, name, *variant) for name, variant in VARIANTS.items())

    return Launch(kernel, everywhere=everywhere, extras=extras)


def _searched(kernel: str) -> Launch:
    own: dict[str, Any] = {
        "tile_of": lambda like, size: hyper_tile(kernel, like),
        "scales": SCALES,
        "sizes": tuple((TOKENS, D, heads) for heads in (2, 16)),
        "checked": (72, 32, 1),
    }
    if kernel == "hyper_attention_step":
        return Launch(kernel, _step, STEP, reference=_step_reference, values=_position, **own)
    if kernel.removeprefix("hyper_attention_") in ("h1", "out"):
        return Launch(kernel, _fwd, TRAINING, reference=_fwd_reference, **own)
    return Launch(kernel, _bwd, _with_dy, reference=_bwd_reference, **own)


_ROWS = {kernel: _searched(kernel) for kernel, _ in INTERPRETER.hyper}
STEPS = (_compiled("hyper_attention_step"), _ROWS.pop("hyper_attention_step"))
FORWARD = (
    _compiled("hyper_attention_fwd"),
    *(row for row in _ROWS.values() if row.call is _fwd),
)
BACKWARD = (
    _compiled("hyper_attention_bwd"),
    *(row for row in _ROWS.values() if row.call is _bwd),
)
