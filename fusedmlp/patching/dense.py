"""The plan of a dense MLP: tail(down(dropout(act(gate(x)) * up(x)))), or with one projection before
the activation, as one call of gated_mlp or mlp.

| field | |
|---|---|
| first | paths of gate and up, or of the one projection that holds both or is the only one |
| packed | order of the halves where one projection holds both |
| gated | whether act(g) is multiplied by u |
| dropout | path of a dropout before `down`; at work, it splits the call in two |
| tail | what follows: paths of modules that are called, "+" for adding x |
| around | paths of the activation and of modules that hold any of these |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.parts.block import passes_through
from ..ops.gated_linear import gated_linear
from ..ops.gated_mlp import gated_mlp
from ..ops.linear_act import linear_act
from ..ops.mlp import mlp
from ..packing import Packed
from .plan import Plan, child, hooked, passed_by, unhooked

RESIDUAL = "+"


def transposed(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers, whose weight is (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _plain(module: nn.Module) -> bool:
    # The class of scripted modules has no forward.
    return getattr(type(module), "forward", None) is nn.Linear.forward


def is_projection(module: nn.Module) -> bool:
    """x W' + b and nothing else: what is added to it by a subclass would be lost."""
    return _plain(module) or transposed(module)


def affine(owner: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    """(weight (out, in), bias) of a projection, which is not called; this rank's part of them."""
    linear = unhooked(owner, path)
    plain = _plain(linear)
    if not plain and not transposed(linear):
        raise passed_by(owner, f"{path} is now a {type(linear).__name__}")
    weight, bias = local(linear.weight), local(linear.bias)
    return weight if plain else weight.t(), bias


def idle(dropout: nn.Module | None) -> bool:
    """Whether nothing is lost where `dropout` is not called."""
    return passes_through(dropout) and (dropout is None or hooked(dropout) is None)


def local(t: Any) -> Any:
    """A DTensor's part on this rank; anything else as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


@dataclass(frozen=True)
class Dense(Plan):
    first: tuple[str, ...] = ()
    down: str = ""
    activation: str = "silu"
    gated: bool = True
    packed: Packed | None = None
    dropout: str | None = None
    tail: tuple[str, ...] = ()
    around: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        return "gated_mlp" if self.gated else "mlp"

    def detail(self) -> str:
        words = [f"activation {self.activation!r}"]
        words += [f"packed {self.packed!r}"] if self.packed else []
        words += [f"in two calls while {self.dropout} is at work"] if self.dropout else []
        return ", ".join(words)

    def bypassed(self) -> tuple[str, ...]:
        return (*self.around, *self.first, self.down)

    def passes_by(self) -> tuple[str, ...]:
        return self.around

    def obstacle(self, module: nn.Module) -> str | None:
        for path in (*self.first, self.down):
            if not is_projection(inner := child(module, path)):
                return f"{path} is a {type(inner).__name__}, no plain projection"
        widths = [affine(module, path)[0].shape[0] for path in self.first]
        if len(set(widths)) > 1:
            return f"its gate and up are {widths[0]} and {widths[1]} wide: broadcast"
        return None

    def run(self, module: Any, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        y = self.block(module, x) if module._split is None else module._split(self, module, x)
        for step in self.tail:
            y = y + x if step == RESIDUAL else child(module, step)(y)
        return y

    def block(self, module: nn.Module, x: Tensor, bias: bool = True) -> Tensor:
        """Up to and with `down`; its bias only if asked for."""
        w, b = zip(*(affine(module, path) for path in self.first), strict=True)
        w_down, b_down = affine(module, self.down)
        b_down = b_down if bias else None
        options: Any = {"activation": self.activation}
        dropout = child(module, self.dropout) if self.dropout else None
        if self.gated:
            options["packed"] = self.packed
            (w, b) = ((*w, None), (*b, None)) if self.packed else (w, b)
        if idle(dropout):
            whole: Any = gated_mlp if self.gated else mlp
            return whole(x, *w, w_down, *b, b_down, **options)
        part: Any = gated_linear if self.gated else linear_act
        h = part(x, *w, *b, **options)
        return F.linear(dropout(h), w_down, b_down)  # type: ignore[misc]
