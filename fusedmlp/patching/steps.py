"""What a plan does beside the fused call, step by step.

| step | does |
|---|---|
| a path | calls the submodule |
| RESIDUAL | adds x |
| Dropout | F.dropout, with the module's numbers as they are now |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.parts.around import hooked
from ..layers.parts.block import DROPOUTS, passes_through
from .plan import child
from .trace import Attribute

RESIDUAL = "+"


class Dropout(NamedTuple):
    p: float | Attribute
    training: bool | Attribute


Step = str | Dropout


def idle(step: Any, module: nn.Module | None = None) -> bool:
    """Whether nothing is lost where `step`, or the module that it is, is not taken."""
    if isinstance(step, Dropout):
        return not value(step.training, module) or bool(value(step.p, module) == 0)
    inner = child(module, step) if isinstance(step, str) else step  # type: ignore[arg-type]
    return passes_through(inner) and (inner is None or hooked(inner) is None)


def take(step: Step, module: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    if isinstance(step, Dropout):
        return F.dropout(y, value(step.p, module), bool(value(step.training, module)))
    return y + x if step == RESIDUAL else child(module, step)(y)


def describe(step: Step) -> str:
    return "its dropout" if isinstance(step, Dropout) else step


def paths(steps: tuple[Step, ...]) -> tuple[str, ...]:
    return tuple(s for s in steps if isinstance(s, str) and s != RESIDUAL)


def value(of: Any, module: nn.Module | None) -> Any:
    if not isinstance(of, Attribute):
        return of
    holder: Any = child(module, of.path) if of.path else module  # type: ignore[arg-type]
    return getattr(holder, of.name)


def is_dropout(module: nn.Module) -> bool:
    return isinstance(module, DROPOUTS)
