"""What a fused call passes by, as patch() found it: with another in its place the call would be
another function, so it raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from .plan import Plan, child, hooked

# The holder is None for the patched module itself: no module refers to itself.
_Part = tuple[str, nn.Module | None, str, nn.Module, int]
_Function = tuple[str, nn.Module | None, str, Any]


class Kept(NamedTuple):
    """What one patched module keeps in its __dict__, so that copies and pickles have their own.

    children: how many submodules it has.
    parts: (path, the module that holds it, its key there, itself, how many submodules it has).
    functions: (path, the module that holds it, its name there, itself): `self.act = torch.relu`.
    """

    children: int
    parts: tuple[_Part, ...]
    functions: tuple[_Function, ...]


def keep(module: nn.Module, plan: Plan) -> Kept:
    parts = tuple(_part(module, path) for path in plan.passes_by())
    functions = [f for path, _, _, inner, _ in parts for f in _functions(path, inner, inner)]
    own = _functions("", None, module)
    return Kept(len(module._modules), parts, (*own, *functions))


def _part(module: nn.Module, path: str) -> _Part:
    above, _, key = path.rpartition(".")
    holder = child(module, above) if above else None
    inner = child(module, path)
    return path, holder, key, inner, len(inner._modules)


def _functions(path: str, holder: nn.Module | None, of: nn.Module) -> Iterator[_Function]:
    for key, value in vars(of).items():
        if callable(value) and not isinstance(value, nn.Module):
            yield f"{path}.{key}".lstrip("."), holder, key, value


def changed(module: Any, kept: Kept) -> str | None:
    """What is no longer as patch() found it."""
    # Asked on every call, and traced by torch.compile: plain look-ups alone.
    if len(module._modules) != kept.children:
        return "the number of its submodules has changed"
    for path, holder, key, inner, children in kept.parts:
        if (module if holder is None else holder)._modules.get(key) is not inner:
            return f"{path} is another module than at patch()"
        if len(inner._modules) != children:
            return f"the number of submodules of {path} has changed"
        if around := hooked(inner):
            return f"{path} {around}"
    for path, holder, key, function in kept.functions:
        if (module if holder is None else holder).__dict__.get(key) is not function:
            return f"{path} is another function than at patch()"
    return None


def stale(module: Any) -> str | None:
    """Why the calls of a patched module raise by now."""
    plan: Plan = module._plan
    if module._kept is not None and (change := changed(module, module._kept)):
        return change
    for path in plan.bypassed():
        if around := hooked(child(module, path)):
            return f"{path} {around}"
    return plan.obstacle(module)
