"""The gated MLPs of a model that a packed BinaryGatedMLP can take the place of, and those that are
in its place.

A gated MLP is a module whose forward is down_proj(act(gate_proj(x)) * up_proj(x)) and nothing else,
with nn.Linears of these names, as in Llama, Qwen, Mistral and their kin: found, and left where a
block put in its place would lose something, as by patch().
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.binary import BinaryGatedMLP
from ..layers.parts.around import hooked
from ..reference.binary import GROUP
from .dense import Dense
from .find import find
from .plan import Plan
from .projection import called
from .report import Entry
from .steps import describe
from .swap import Patched
from .walk import Walk

FORMATS = ("q1_0",)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Blocks(Walk):
    """The gated MLPs of a model: `found`, name -> module and plan, and `left`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None, dtype_check=False)
        self.found: dict[str, tuple[nn.Module, Dense]] = {}
        self.left: list[Entry] = []
        for name, module in model.named_modules():
            patched = isinstance(module, Patched)
            if type(module).__module__.startswith(f"{__name__.partition('.')[0]}.") and not patched:
                continue
            plan: Any = module._plan if isinstance(module, Patched) else find(module)
            if isinstance(plan, Dense) and plan.gated:
                plan = self.reason(module, plan) or plan
            elif not all(hasattr(module, projection) for projection in PROJECTIONS):
                continue
            if isinstance(plan, Dense) and plan.gated:
                self.found[name] = module, plan
            else:
                reason = plan if isinstance(plan, str) else "it is no MLP of three projections"
                self.left.append(Entry(name, type(module).__name__, None, None, reason))

    def dtypes(self, plan: Plan, parameters: Sequence[Tensor]) -> str | None:
        """Any floating dtype is rounded, and each matrix by itself."""
        return None

    def reason(self, module: nn.Module, plan: Dense) -> str | None:
        """Why a BinaryGatedMLP must not take the place of `module`."""
        paths = (*plan.first, plan.down)
        if paths != PROJECTIONS:
            return f"its projections must be {', '.join(PROJECTIONS)}, got {', '.join(paths)}"
        if plan.method != "forward" or plan.cut:
            got = "a part of it" if plan.cut else f"its {plan.method}"
            return f"its MLP must be all of its forward, got {got}"
        if steps := (*plan.head, *plan.between, *plan.tail):
            return f"a one-bit block would lose {', '.join(map(describe, steps))}"
        if around := hooked(module):
            return f"it {around}, which a one-bit block would lose"
        linears = [getattr(module, projection) for projection in PROJECTIONS]
        for projection, linear in zip(PROJECTIONS, linears, strict=True):
            if why := called(linear):
                return f"{projection} {why}"
        for projection, linear in zip(PROJECTIONS, linears, strict=True):
            if type(linear) is not nn.Linear:
                return f"{projection} is a {type(linear).__name__}, not a plain nn.Linear"
            if linear.in_features % GROUP:
                width = linear.in_features
                return f"{projection} must have rows of a multiple of {GROUP}, got {width}"
        return self.obstacle(module, plan)

    def block(self, name: str) -> BinaryGatedMLP:
        """What takes the place of the MLP `name`."""
        mlp, plan = self.found[name]
        gate, up, down = (getattr(mlp, projection) for projection in PROJECTIONS)
        return BinaryGatedMLP.from_dense(gate, up, down, plan.activation).train(mlp.training)


def one_bit_blocks(model: nn.Module) -> Iterator[tuple[str, BinaryGatedMLP]]:
    """Those that are packed, by their names."""
    for name, module in model.named_modules():
        if isinstance(module, BinaryGatedMLP) and module.packed_weight() is not None:
            yield name, module
