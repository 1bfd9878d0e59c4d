"""The launchers of hyper_attention: whole calls, of which a search
changes the tile of one kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.arch import INTERPRETER
from ...kernels.hyper.gradients import hyper_attention_bwd
from ...kernels.hyper.hyper_attention import hyper_attention_fwd
from ...kernels.hyper.hyper_attention_step import hyper_attention_step
from ...kernels.pick import hyper_tile
from ...testing import hyper
from ..shapes import HYPER
from .launch import Launch, Shapes, Tensors

NAMES = ("q", "k", "v", "c1", "u1", "vt1", "d1", "c2", "u2", "vt2", "d2")
OPTIONS: list[Any] = [True, True, True, 1e-12]
TRAINING, DECODING = hyper.sized()


def _operands(t: Mapping[str, Tensor]) -> list[Any]:
    return [t[name] for name in NAMES]


def _grads(grads: Sequence[Tensor]) -> Tensors:
    return {f"d{name}": g for name, g in zip(NAMES, grads, strict=True)}


def _fwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    return {"out": hyper_attention_fwd(*_operands(t), *OPTIONS)[0]}


def _fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {"out": TRAINING.reference(*_operands(t))}


def _with_dy(M: int, D: int, heads: int) -> Shapes:
    shapes = TRAINING.shapes(M, D, heads)
    return {**shapes, "dy": shapes["v"]}


def _bwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    """With the forward, which leaves what the backward reads."""
    out, *left = hyper_attention_fwd(*_operands(t), *OPTIONS)
    arguments = [*_operands(t), *left, *OPTIONS, [True] * len(NAMES)]
    return _grads(hyper_attention_bwd(t["dy"], out, *arguments))


def _bwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    leaves = [x.detach().requires_grad_() for x in _operands(t)]
    return _grads(torch.autograd.grad(TRAINING.reference(*leaves), leaves, t["dy"]))


def _position(shape: tuple[int, int, int], device: torch.device) -> Tensors:
    """Of a full cache."""
    return {"position": torch.full((1,), DECODING.shapes(*shape)["k"][-2] - 1, device=device)}


def _step(t: Mapping[str, Tensor], training: bool) -> Tensors:
    q, k, v, *rest = _operands(t)
    return {"out": hyper_attention_step(q, k, v, t["position"], *rest, *OPTIONS)}


def _step_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {"out": DECODING.reference(**t)}


def _launch(kernel: str) -> Launch:
    own: dict[str, Any] = {
        "tile_of": lambda like, shape: hyper_tile(kernel, like),
        "scales": hyper.SCALES,
        "sizes": tuple((16384, model.D, model.H) for model in HYPER.values()),
        "checked": (72, 32, 1),
    }
    if kernel == "hyper_attention_step":
        return Launch(DECODING.shapes, _step, _step_reference, _position, **own)
    if kernel.removeprefix("hyper_attention_") in ("h1", "h2", "out"):
        return Launch(TRAINING.shapes, _fwd, _fwd_reference, **own)
    return Launch(_with_dy, _bwd, _bwd_reference, **own)


LAUNCHES = {kernel: _launch(kernel) for kernel, _ in INTERPRETER.hyper}
