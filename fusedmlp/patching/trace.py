"""A method of a module as an fx graph, its leaf modules kept whole, the module left as it was."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn


class NoMatch(Exception):
    """Says why a module is no dense MLP."""


class _Proxy(fx.Proxy):
    """fx takes `a += b` for a + b; who writes into x has to be seen."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self, method: str, whole: bool) -> None:
        super().__init__()
        self.traced_func_name, self.whole = method, whole

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.whole or next(m.children(), None) is None


def trace(module: nn.Module, method: str, whole: bool = False) -> fx.Graph:
    """With `whole` no submodule is traced into.

    Raises NoMatch where it cannot be traced, or changes the module: a fused call would not."""
    try:
        with _unchanged(module, method):
            return _Tracer(method, whole).trace(module)
    except NoMatch:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise NoMatch(f"its {method} cannot be traced: {type(error).__name__}: {reason}") from None


@contextmanager
def _unchanged(module: nn.Module, method: str) -> Iterator[None]:
    """Puts back what tracing, which runs the method on no data, has changed of the module."""
    saved = [_Saved(m) for m in module.modules() if next(m.children(), None) is not None]
    changes: list[str] = []
    try:
        yield
    finally:
        changes = [change for s in saved for change in s.put_back()]
    if changes:
        raise NoMatch(f"its {method} changes {', '.join(changes)} of the module")


class _Saved:
    """The attributes of one module that is traced into; of lists, dicts and sets the contents, of
    buffers the values."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.attributes = module, dict(vars(module))
        self.contents = {
            key: copy.copy(value)
            for key, value in self.attributes.items()
            if isinstance(value, list | dict | set)
        }
        self.buffers: list[tuple[str, Tensor, int, Tensor]] = [
            (key, b, b._version, b.clone()) for key, b in module._buffers.items() if b is not None
        ]

    def put_back(self) -> Iterator[str]:
        """Gives the names of what had changed."""
        now, missing = vars(self.module), object()
        for key in self.attributes.keys() | now.keys():
            if now.get(key, missing) is not self.attributes.get(key, missing):
                yield key
        now.clear()
        now.update(self.attributes)
        for key, before in self.contents.items():
            held = self.attributes[key]
            if list(map(id, _items(held))) != list(map(id, _items(before))):
                yield key
                held.clear()
                (held.extend if isinstance(held, list) else held.update)(before)
        for key, buffer, version, values in self.buffers:
            if buffer._version != version:
                yield key
                buffer.data.copy_(values)


def _items(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else [*container]
