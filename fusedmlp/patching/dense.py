"""The plan of a dense MLP: tail(down(between(act(gate(x)) * up(x)))), or with one projection before
the activation.

| projections | gated | plain |
|---|---|---|
| all are read | gated_mlp | mlp |
| some are PEFT's LoRA layers (lora.py) | gated_mlp with lora= | mlp with lora= |
| something stands between | gated_linear, that, linear | linear_act, that, linear |
| `down` is called | gated_linear, that, down | linear_act, that, down |
| one before the activation is called | gate, up, gated_act, that, down | all as they are |

Which row it is, every call asks: a projection may be replaced, adapted or hooked after patch().

| field | |
|---|---|
| first | paths of gate and up, or of the one projection that holds both or is the only one |
| packed | order of the halves where one projection holds both |
| gated | whether act(g) is multiplied by u |
| head, between, tail | steps on x, on act(g) u, and on what `down` gives (steps.py) |
| around | paths of activations and of modules that hold any of these |
| reads | numbers and functions of the module that the plan takes as they were |
| recompute | whether gated_mlp saves x alone |
| cut, argument | the run of statements that it stands for (find.py), and which of its names is x |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gated_act import gated_act
from ..ops.gated_linear import gated_linear
from ..ops.gated_mlp import gated_mlp
from ..ops.linear_act import linear_act
from ..ops.mlp import mlp
from ..packing import Packed
from ..reference.activations import resolve
from .compiled import RUN, around_run, run_of
from .lora import base_of, describe as adapters_of, lora_of, part, refusal
from .names import Cut
from .plan import Plan, child, passed_by
from .projection import called, is_projection, local, read
from .steps import Step, describe, idle, take
from .trace import Attribute

__all__ = ["Dense", "idle", "is_projection", "local"]


@dataclass(frozen=True)
class Dense(Plan):
    first: tuple[str, ...] = ()
    down: str = ""
    activation: str = "silu"
    gated: bool = True
    packed: Packed | None = None
    head: tuple[Step, ...] = ()
    between: tuple[Step, ...] = ()
    tail: tuple[Step, ...] = ()
    around: tuple[str, ...] = ()
    reads: tuple[Attribute, ...] = ()
    cut: Cut | None = None
    argument: int = 0
    recompute: bool = False

    @property
    def op(self) -> str:
        return "gated_mlp" if self.gated else "mlp"

    def detail(self) -> str:
        words = [f"activation {self.activation!r}"]
        words += [f"packed {self.packed!r}"] if self.packed else []
        words += [f"in two calls while {describe(step)} is at work" for step in self.between]
        words += [f"in its {self.method}" if self.cut else ""]
        words += ["saves x alone, 2 H values a token less"] if self.recompute else []
        return ", ".join(filter(None, words))

    def bypassed(self) -> tuple[str, ...]:
        return (*self.around, *self.may_call())

    def passes_by(self) -> tuple[str, ...]:
        return self.around

    def may_call(self) -> tuple[str, ...]:
        return (*self.first, self.down)

    def values(self) -> tuple[tuple[str, str], ...]:
        return self.reads

    def recomputing(self) -> Dense:
        return replace(self, recompute=self.gated)

    def spared(self, module: nn.Module) -> int:
        if not self.recompute:
            return 0
        like = next(module.parameters())
        w = [p for path in self.first if (p := part(child(module, path), like)) is not None]
        # g and u: a value each for every row of both weights, or of the packed one.
        return sum(part[0].shape[0] * part[0].itemsize for part in w)

    def is_part(self) -> bool:
        return self.cut is not None

    def methods(self, own: type, run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        if self.cut is None:
            return super().methods(own, run)
        return {self.method: around_run(own, self.cut), RUN: run}

    def original(self, own: type) -> Callable[..., Any]:
        if self.cut is None:
            return super().original(own)
        return run_of(own, self.cut)

    def way(self, module: nn.Module) -> tuple[str | None, str]:
        parts = {path: child(module, path) for path in self.may_call()}
        reasons = {path: refusal(projection) for path, projection in parts.items()}
        if self._works_between(module) or any(reasons.values()):
            # The calls of a part have no adapters, so each layer that has one is called.
            reasons = {path: reasons[path] or called(m) for path, m in parts.items()}
        because = ", ".join(f"{path} {reason}" for path, reason in reasons.items() if reason)
        if not because:
            return self.op, ""
        if not any(reasons[path] for path in self.first):
            op = "gated_linear" if self.gated else "linear_act"
            return op, f"{because}, so it is called and the block is fused up to it"
        if self.gated:
            return "gated_act", f"{because}, so projections are called and fused up to act(g) * u"
        why = f"{because}, so it is called, and an activation alone has nothing to fuse with"
        return None, f"{why}, as long as that is so" if self.waits(module) else why

    def waits(self, module: nn.Module) -> bool:
        """A LoRA layer of PEFT is called or read by its state, which eval() or a switch changes.
        Any other projection that is called has no base that could be read."""
        return all(read(base_of(child(module, path))) for path in self.may_call())

    def read_modules(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield from super().read_modules(module)
        if not self.way(module)[1]:
            for path in self.may_call():
                inner = child(module, path)
                if (base := base_of(inner)) is not inner:
                    yield f"{path}.base_layer", base

    def notes(self, module: nn.Module) -> str:
        if self.way(module)[1]:
            return ""
        return adapters_of({path: child(module, path) for path in self.may_call()})

    def _works_between(self, module: nn.Module) -> list[Step]:
        return [step for step in self.between if not idle(step, module)]

    def obstacle(self, module: nn.Module) -> str | None:
        read_ = [read(base_of(child(module, path))) for path in self.first]
        widths = [part[0].shape[0] for part in read_ if part is not None]
        if len(set(widths)) > 1:
            return f"its gate and up are {widths[0]} and {widths[1]} wide: broadcast"
        return None

    def run(self, module: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.cut is None:
            (x,) = (*args, *kwargs.values())
        else:
            x = args[self.argument]
        y = x
        for step in self.head:
            y = take(step, module, y, x)
        split = getattr(module, "_split", None)  # a module that has adopted a hub layer has none
        y = self.block(module, y) if split is None else split(self, module, y)
        for step in self.tail:
            y = take(step, module, y, x)
        return y

    def example(self, module: nn.Module, rows: int, like: Tensor) -> tuple[Tensor, ...]:
        first: Any = child(module, self.first[0])
        own = read(first)
        return (like.new_zeros(rows, first.in_features if own is None else own[0].shape[1]),)

    def trial(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return self.block(module, x)

    def block(self, module: Any, x: Tensor, bias: bool = True) -> Tensor:
        """From the first projections to `down`; its bias only if asked for."""
        first, down = [child(module, path) for path in self.first], child(module, self.down)
        apart, last = [read(projection) for projection in first], read(down)
        whole = None not in apart
        steps = self._works_between(module)
        if last is None or not whole:
            if getattr(module, "_split", None) is not None:
                self._refuse(module)
            if not steps and (y := self._adapted(first, down, x, bias)) is not None:
                return y
        if not whole:
            h = self._behind(*(projection(x) for projection in first))
        else:
            w, b, options = self._arguments(apart)
            if last is not None and not steps:
                return self._fused(x, w, b, last[0], last[1] if bias else None, options)
            half: Any = gated_linear if self.gated else linear_act
            h = half(x, *w, *b, **options)
        for step in steps:
            h = take(step, module, h, x)
        if last is None:
            return down(h)
        return F.linear(h, last[0], last[1] if bias else None)

    def _arguments(self, first: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Weights, biases and options of a call, of (weight, bias) each."""
        w, b = zip(*first, strict=True)
        options: dict[str, Any] = {"activation": self.activation}
        if self.gated:
            options["packed"] = self.packed
            (w, b) = ((*w, None), (*b, None)) if self.packed else (w, b)
        return w, b, options

    def _fused(self, x: Tensor, w: Any, b: Any, w_down: Any, b_down: Any, options: Any) -> Tensor:
        fused: Any = gated_mlp if self.gated else mlp
        if self.recompute:
            options["recompute"] = True
        return fused(x, *w, w_down, *b, b_down, **options)

    def _adapted(self, first: Any, down: Any, x: Tensor, bias: bool) -> Tensor | None:
        """The whole block with PEFT's adapters inside; None where a projection must be called."""
        parts = [part(projection, x) for projection in (*first, down)]
        if None in parts:
            return None
        *before, last = parts
        w, b, options = self._arguments([p[:2] for p in before])  # type: ignore[index]
        options["lora"] = lora_of(before, last, self.packed)  # type: ignore[arg-type]
        w_down, b_down, _ = last  # type: ignore[misc]
        return self._fused(x, w, b, w_down, b_down if bias else None, options)

    def _behind(self, g: Tensor, u: Tensor | None = None) -> Tensor:
        """act(g) u of projections that were called."""
        if not self.gated:
            return resolve(self.activation).phi(g)
        return gated_act(g, u, activation=self.activation, packed=self.packed)

    def _refuse(self, module: nn.Module) -> None:
        """Sharded projections must be read."""
        reasons = ((path, called(child(module, path))) for path in self.may_call())
        raise passed_by(module, next(f"{path} {reason}" for path, reason in reasons if reason))
