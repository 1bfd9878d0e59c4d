"""A method of a module as an fx graph, its leaf modules kept whole, the module left as it was."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .projection import like_a_projection, projections


class NoMatch(Exception):
    """Says why a module is no dense MLP. chained: whether its data flow leads from one projection
    to another all the same."""

    chained = False


class Attribute(NamedTuple):
    """Where a module keeps a number or a function: the path of its holder, and its name there."""

    path: str
    name: str


class Fraction(float):
    """A float that says where it was read."""

    read: Attribute


class Whole(int):
    """An int, or a flag, that says where it was read."""

    read: Attribute


class _Called:
    """Stands for a function that a module keeps, and notes that it was called."""

    def __init__(self, function: Any, read: Attribute, seen: list[Attribute]) -> None:
        self.function, self.read, self.seen = function, read, seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(self.read)
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)


class Traced(NamedTuple):
    """functions: those that the module keeps and the method called. devices: whether it asked on
    which device a tensor lies."""

    graph: fx.Graph
    functions: tuple[Attribute, ...]
    devices: bool


class _Proxy(fx.Proxy):
    """fx takes `a += b` for a + b; who writes into x has to be seen."""

    tracer: _Tracer

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    @property
    def device(self) -> torch.device:
        self.tracer.devices = True
        return self.tracer.device


class _Tracer(fx.Tracer):
    def __init__(self, method: str, whole: bool, device: str) -> None:
        super().__init__()
        self.traced_func_name, self.whole = method, whole
        self.device, self.devices = torch.device(device), False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.whole or like_a_projection(m) or next(m.children(), None) is None:
            return True
        # A norm of any library.
        holds = any(True for _ in (*m.parameters(), *m.buffers()))
        return holds and next(projections(m), None) is None


def trace(module: nn.Module, method: str, whole: bool = False) -> fx.Graph:
    """With `whole` no submodule is traced into.

    Raises NoMatch where it cannot be traced, or changes the module: a fused call would not."""
    return follow(module, method, whole=whole).graph


def follow(
    module: nn.Module,
    method: str,
    *,
    whole: bool = False,
    device: str = "cpu",
    function: Callable[..., Any] | None = None,
) -> Traced:
    """trace(), and what it saw. `function` is taken for the method, as one of the module's class;
    `device` is where tensors say that they lie."""
    tracer = _Tracer(method, whole, device)
    try:
        with _unchanged(module, method), _of_class(module, method, function), _watched(module) as f:
            graph = tracer.trace(module)
    except NoMatch:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise NoMatch(f"its {method} cannot be traced: {type(error).__name__}: {reason}") from None
    return Traced(graph, tuple(dict.fromkeys(f)), tracer.devices)


@contextmanager
def _of_class(module: nn.Module, method: str, function: Any) -> Iterator[None]:
    """fx traces what a module's class has under a name."""
    own = type(module)
    if function is not None:
        module.__class__ = type(own.__name__, (own,), {method: function})
    try:
        yield
    finally:
        module.__class__ = own


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[Attribute]]:
    """The numbers and functions that modules keep say where they were read."""
    seen: list[Attribute] = []
    put: list[tuple[dict[str, Any], str, Any, Any]] = []
    for path, m in module.named_modules():
        if m is module or next(m.children(), None) is not None:
            for key, value in list(vars(m).items()):
                if (stand_in := _stand_in(value, Attribute(path, key), seen)) is not None:
                    put.append((vars(m), key, value, stand_in))
    try:
        for of, key, _, stand_in in put:
            of[key] = stand_in
        yield seen
    finally:
        for of, key, value, stand_in in put:
            if of.get(key) is stand_in:  # else the method has written it
                of[key] = value


def _stand_in(value: Any, read: Attribute, seen: list[Attribute]) -> Any:
    if type(value) is float:
        number: Any = Fraction(value)
    elif type(value) is int or read.name == "training":
        number = Whole(value)
    elif callable(value) and not isinstance(value, nn.Module | type):
        return _Called(value, read, seen)
    else:
        return None
    number.read = read
    return number


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
