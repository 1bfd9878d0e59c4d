"""A module's class replaced by a subclass whose forward is a plan's, and put back."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from .plan import Plan


class Patched:
    """Mixed into the class of a patched module, before the module's own class."""

    _own_class: type
    _plan: Plan
    # Set by fusedmlp.distributed where the module's weights are sharded over ranks.
    _split: Any = None

    def path(self) -> str:
        """For explain()."""
        return f"patched, {self._plan.op} {self._plan.detail()}".rstrip()

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, {self.path()}" if own else self.path()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, where pickle cannot find it by name.
        state = super().__reduce_ex__(2)[2:]
        return (_rebuild, (self._own_class, self._plan), *state)


_classes: dict[tuple[type, Plan], type] = {}


def patched_class(own: type, plan: Plan) -> type:
    """A subclass of `own` under its name: others tell modules by their class names."""
    if (own, plan) not in _classes:
        _classes[own, plan] = _make(own, plan)
    return _classes[own, plan]


def _make(own: type, plan: Plan) -> type:
    @functools.wraps(getattr(own, plan.method))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._plan.run(self, *args, **kwargs)

    body = {"_own_class": own, "_plan": plan, plan.method: method}
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (Patched, own), body | names)


def _rebuild(own: type, plan: Plan) -> Any:
    cls: Any = patched_class(own, plan)
    return cls.__new__(cls)


def swap(module: nn.Module, plan: Plan) -> None:
    module.__class__ = patched_class(type(module), plan)


def restore(op: str, modules: Iterable[nn.Module]) -> None:
    """Give patched modules their own classes back. One that is not patched any more is skipped.

    Raises ValueError, when all others are restored, for one whose class another library replaced.
    """
    wrapped: list[str] = []
    for module in modules:
        if "_own_class" in type(module).__dict__:
            module.__class__ = type(module)._own_class  # type: ignore[attr-defined]
        elif isinstance(module, Patched):
            wrapped.append(type(module).__name__)
    if wrapped:
        raise ValueError(
            f"{op}: {', '.join(dict.fromkeys(wrapped))} was wrapped after patch(), by a class of "
            "another library; unwrap it first"
        )
