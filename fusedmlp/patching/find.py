"""Whether a module is a dense MLP, whole or among other parts, or holds one in its forward.

The layers of OPT, Whisper and BART call fc1, activation and fc2 in their own forward, and those of
DeBERTa a module for each half:

    h = self.act(self.fc1(h))        ->        h = self._fused_run(h)
    h = dropout(h, p=...)
    h = self.fc2(h)

A run of statements that makes one value of one variable is a function of it, and is traced and
matched as a forward is. The method is then compiled again with one call in the place of the run;
all other statements stay what they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .compiled import RUN, run_of, runs_of
from .dense import Dense
from .experts import plan_of
from .form import is_experts
from .match import callees, like_one, match
from .plan import Plan
from .projection import full_name, like_a_projection, projections
from .trace import NoMatch

# Methods that hold a whole MLP where it is spread over submodules.
METHODS = (
    "feed_forward_chunk", "ff_chunk", "feed_forward_chunk_query", "_ff_block", "forward",
)  # fmt: skip


class Chained(str):
    """Why there is no plan, of a module whose data flow leads from one projection to another."""


class Direct(Chained):
    """The same where its own forward calls both, as no part of it does."""


def find(module: nn.Module) -> Plan | str | None:
    """A plan, or why there is none, or None for what is like no MLP."""
    if is_experts(module):
        return plan_of(module)
    if _are_experts_of_others(module):
        return f"what {full_name(type(module))} makes of its weights is not known"
    reason = None
    for method in (m for m in METHODS if hasattr(module, m)):
        if method == "forward" and (reason or not _may_be_one(module)):
            break
        try:
            return match(module, method)
        except NoMatch as error:
            chained = method != "forward" or error.chained
            reason = reason or (Chained(error) if chained else str(error))
    found = _of_any_parts(module, "forward") or _cut(module)
    return reason if isinstance(found, str) and isinstance(reason, Chained) else found or reason


def _are_experts_of_others(module: nn.Module) -> bool:
    """Whether it has weights and no parts, as stacked experts have: a quantiser's for example."""
    own = [p for p in module._parameters.values() if p is not None]
    stacked = sum(p.dim() > 2 for p in own) > 1 or type(module).__name__.endswith("Experts")
    return bool(own) and stacked and not module._modules


def _may_be_one(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    return like_one(callees(module))


def _of_any_parts(module: nn.Module, method: str) -> Plan | None:
    """With modules that are no projections, but may hold them: adapters of any library."""
    holding = [m for m in callees(module) if any(True for _ in m.parameters())]
    if len(holding) not in (2, 3):
        return None
    try:
        plan = match(module, method, opaque=True)
    except NoMatch:
        return None
    return plan if plan.way(module)[0] else None


def _cut(module: nn.Module) -> Dense | Chained | None:
    """The plan of the first run of statements in the forward of `module` that is a dense MLP; or
    why one is none in which a projection leads to another."""
    own: Any = type(module)
    forward: Any = getattr(own, "forward", None)
    if len(list(projections(module))) < 2:
        return None
    reason: Chained | None = None
    for cut, mentions, may_be_called in runs_of(inspect.unwrap(forward)):
        found = _mentioned(module, mentions)
        if like_one(found) and (may_be_called or reason is None):
            try:
                plan = match(module, RUN, function=run_of(own, cut))
            except NoMatch as error:
                if reason is None and error.chained:
                    bare = all(like_a_projection(m) or not any(projections(m)) for m in found)
                    reason = (Direct if bare else Chained)(error)
                continue
            if may_be_called:
                return replace(plan, method="forward", cut=cut)
    return reason


def _mentioned(module: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    for path in paths:
        inner: Any = module
        for name in path.split("."):
            part = getattr(inner, name, None)  # of a ModuleDict perhaps its method values
            inner = part if isinstance(part, nn.Module) else inner
        holds = isinstance(inner, nn.ModuleList | nn.ModuleDict)
        for m in list(inner.children()) if holds else [inner]:
            if isinstance(m, nn.Module) and m is not module:
                found[id(m)] = m
    return list(found.values())
