"""The plan of a method that is a dense MLP, in training and in eval alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from .dense import Dense
from .flow import Flow
from .plan import child
from .projection import like_a_projection, projections
from .trace import NoMatch, follow


def callees(module: nn.Module) -> list[nn.Module]:
    """What its forward may call: its children, and those of lists of modules."""
    found: list[nn.Module] = []
    for inner in module.children():
        holds = isinstance(inner, nn.ModuleList | nn.ModuleDict)
        found += callees(inner) if holds else [inner]
    return found


def like_one(modules: list[nn.Module]) -> bool:
    """Whether two or three projections are spread over `modules`. In one alone, that is the MLP."""
    counts = [like_a_projection(m) or len(list(projections(m))) for m in modules]
    return sum(counts) in (2, 3) and sum(map(bool, counts)) > 1


def match(
    module: nn.Module,
    method: str,
    *,
    function: Callable[..., Any] | None = None,
    opaque: bool = False,
) -> Dense:
    """The plan of `module` if its `method` (or `function` in its place) is a dense MLP, in training
    and in eval, on any device alike; raises NoMatch, which says why not."""
    modes = {m: m.training for m in module.modules()}
    plans: list[Dense] = []
    try:
        for training in (True, False):
            for m in modes:
                m.training = training
            plans += _on_devices(module, method, function, opaque)
    finally:
        for m, training in modes.items():
            m.training = training
    if any(plan != plans[0] for plan in plans):
        alike = "in training and in eval, on a CPU and on a GPU"
        error = NoMatch(f"its {method} is not the same MLP {alike}")
        error.chained = True
        raise error
    return plans[0]


def _on_devices(module: nn.Module, method: str, function: Any, opaque: bool) -> Iterator[Dense]:
    for device in ("cpu", "cuda"):
        traced = follow(module, method, whole=opaque, device=device, function=function)
        try:
            plan = Flow(module, traced, method, opaque).plan()
        except NoMatch as error:
            error.chained = _leads_on(module, traced.graph)
            raise
        yield plan
        if not traced.devices:
            return


def _leads_on(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether a projection's result comes to another projection."""
    behind: set[object] = set()
    for node in graph.nodes:
        after = any(argument in behind for argument in node.all_input_nodes)
        projects = node.op == "call_module" and like_a_projection(child(module, str(node.target)))
        if after and projects:
            return True
        if after or projects:
            behind.add(node)
    return False
