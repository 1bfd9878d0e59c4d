"""What a fused call passes by, as patch() found it: with another in its place the call would be
another function, so it raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..layers.parts.around import bare
from .around import passed_over
from .lora import beneath
from .plan import Plan, child

# The holder is None for the patched module itself: no module refers to itself.
_Part = tuple[str, nn.Module | None, str, nn.Module, int, Any]
_Value = tuple[str, nn.Module | None, str, Any]


class Kept(NamedTuple):
    """What one patched module keeps in its __dict__, so that copies and pickles have their own.

    children: how many submodules it has; None where others than the MLP's may come and go.
    parts: (path, the module that holds it, its key there, itself, how many submodules it has, the
        forward of its class).
    values: (path, the module that holds it, its name there, itself): `self.act = torch.relu`.
    wrapped: paths of parts around which PEFT may put wrappers of their parameters.
    """

    children: int | None
    parts: tuple[_Part, ...]
    values: tuple[_Value, ...]
    wrapped: tuple[str, ...]


def keep(module: nn.Module, plan: Plan) -> Kept:
    parts = tuple(_part(module, path) for path in plan.passes_by())
    named = plan.values()
    if named is None:
        values = [v for path, _, _, inner, *_ in parts for v in _functions(path, inner, inner)]
        values += _functions("", None, module)
    else:
        values = [_value(module, path, name) for path, name in named]
    count = None if plan.is_part() else len(module._modules)
    return Kept(count, parts, tuple(values), plan.wrapped())


def _part(module: nn.Module, path: str) -> _Part:
    above, _, key = path.rpartition(".")
    holder = beneath(child(module, above)) if above else None
    inner = beneath(child(module, path))
    forward = getattr(type(inner), "forward", None)
    return path, holder, key, inner, len(inner._modules), forward


def _value(module: nn.Module, path: str, name: str) -> _Value:
    holder = child(module, path) if path else None
    value = vars(module if holder is None else holder)[name]
    return f"{path}.{name}".lstrip("."), holder, name, value


def _functions(path: str, holder: nn.Module | None, of: nn.Module) -> Iterator[_Value]:
    for key, value in vars(of).items():
        if callable(value) and not isinstance(value, nn.Module):
            yield f"{path}.{key}".lstrip("."), holder, key, value


def changed(module: Any, kept: Kept) -> str | None:
    """What is no longer as patch() found it."""
    # Asked on every call, and traced by torch.compile: plain look-ups alone.
    # Torch's parametrizations make parameters of its own, which are read through them.
    children = len(module._modules) - ("parametrizations" in module._modules)
    if kept.children is not None and children != kept.children:
        return "the number of its submodules has changed"
    for path, holder, key, inner, children, forward in kept.parts:
        now = (module if holder is None else holder)._modules.get(key)
        if now is not inner and not (path in kept.wrapped and beneath(now) is inner):
            return f"{path} is another module than at patch()"
        if len(inner._modules) != children:
            return f"the number of submodules of {path} has changed"
        if getattr(type(inner), "forward", None) is not forward:
            return f"the class of {path} has another forward than at patch()"
        if not bare(inner) and (around := passed_over(inner)):
            return f"{path} {around}"
    for path, holder, key, value in kept.values:
        now = (module if holder is None else holder).__dict__.get(key)
        if now is not value and now != value:
            if callable(value):
                return f"{path} is another function than at patch()"
            return f"{path} is {now!r}, and was {value!r} at patch()"
    return None


def stale(module: Any) -> str | None:
    """Why the calls of a patched module raise by now."""
    plan: Plan = module._plan
    if module._kept is not None and (change := changed(module, module._kept)):
        return change
    callable_ = plan.may_call()
    for path in plan.bypassed():
        if path not in callable_ and (around := passed_over(beneath(child(module, path)))):
            return f"{path} {around}"
    return plan.obstacle(module)
