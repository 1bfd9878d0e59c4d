"""What a module that has adopted the forward of a hub layer runs.

`kernelize` of the `kernels` package sets a layer's forward on an instance of a model's class. Which
activation that has, in which order its halves lie and what else it does, the name that the class is
registered under does not say; the class's own forward does. So it is looked at as patch() looks at
it, and its plan is run: in float64 the same function, or an error.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..patching.dense import Dense
from ..patching.find import find
from ..patching.kept import changed, keep
from ..patching.moe import ADAPTERS, Llama4
from ..patching.plan import Plan


def find_plan(module: Any) -> None:
    """Set `_hub_plan` of `module`. It is looked for once, and again when a number, a function or
    a part that it passes by is another than it was.

    Raises ValueError where no kernel computes what the module's class does.
    """
    of = module.__dict__
    if "_hub_plan" in of and changed(module, of["_hub_kept"]) is None:
        return
    plan = _plan(module)
    if isinstance(plan, str):
        raise _refused(module, plan)
    kept = keep(module, plan)
    if around := changed(module, kept):
        raise _refused(module, f"{around}, which a fused call would pass by")
    of["_hub_plan"], of["_hub_kept"] = plan, kept


# torch.compile calls it where it traces, and takes the plan as it takes a number in a module.
find_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _plan(module: nn.Module) -> Plan | str:
    kind = type(module)
    if getattr(kind.forward, "__module__", "").startswith(f"{__name__.rpartition('.')[0]}."):
        return "its class has the layer's forward, not one of its own: let kernelize put it there"
    adapter = ADAPTERS.get(f"{kind.__module__}.{kind.__qualname__}")
    plan = find(module) if adapter is None else adapter(module)
    if plan is None:
        return "it is like no MLP"
    if isinstance(plan, str):
        return plan
    if not isinstance(plan, Dense | Llama4) or plan.method != "forward" or plan.is_part():
        return "experts or a part of its forward, which fusedmlp.patch(model) alone runs"
    return plan.obstacle(module) or plan


def _refused(module: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{__name__.partition('.')[0]}.hub: {type(module).__name__} must compute "
        "down(act(gate(x)) * up(x)) or down(act(first(x))) by an activation that has a kernel, or "
        f"be Llama4TextMoe with one expert a token, got: {reason}; leave its class out of the "
        "kernel mapping"
    )
