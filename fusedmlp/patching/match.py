"""A dense MLP found by the data flow of its forward, traced with its leaf modules kept whole.

    x -> gate, up (projections, or both halves of one) -> act(g) * u -> [dropout] -> down -> [tail]
    x -> one projection -> act -> [dropout] -> down -> [tail]

The tail is modules called one after another and the addition of x. Anything else is no match.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..layers.parts.block import DROPOUTS
from .activation import name_by_values
from .dense import RESIDUAL, Dense, is_projection
from .experts import plan_of
from .form import is_experts
from .plan import Plan, child, with_parents
from .trace import NoMatch, trace

# Methods that hold a whole MLP where it is spread over submodules.
METHODS = ("feed_forward_chunk", "ff_chunk", "_ff_block", "forward")

_MUL = (operator.mul, operator.imul, torch.mul)
_ADD = (operator.add, operator.iadd, torch.add)


def _like_a_projection(module: nn.Module) -> bool:
    """A projection of any library: sized like one, or with quantised values, as it may not say its
    sizes."""
    sizes = ("in_features", "infeatures", "nf")
    if any(hasattr(module, name) for name in sizes):
        return True
    values = (*module._parameters.values(), *module._buffers.values())
    whole = (torch.int8, torch.uint8, torch.int32)
    return any(v is not None and v.dtype in whole and v.dim() == 2 for v in values)


def find(module: nn.Module) -> Plan | str | None:
    """A plan, or why there is none, or None for what is like no MLP."""
    if is_experts(module):
        return plan_of(module)
    method = next(m for m in METHODS if hasattr(module, m))
    depth = 2 if method.endswith("_chunk") else 1
    inner = [m for name, m in module.named_modules() if name and name.count(".") < depth]
    alike = [m for m in inner if _like_a_projection(m)]
    odd = [type(m).__name__ for m in alike if not is_projection(m)]
    if method == "forward" and len(alike) not in (2, 3):
        return None
    if odd and method == "forward":
        return f"{', '.join(dict.fromkeys(odd))} is no plain projection: quantised or adapted"
    try:
        return match(module, method)
    except NoMatch as error:
        return str(error)


def match(module: nn.Module, method: str) -> Dense:
    """The plan of `module` if its `method` is a dense MLP, in training and in eval alike; raises
    NoMatch, which says why not."""
    modes = {m: m.training for m in module.modules()}
    plans = []
    try:
        for training in (True, False):
            for m in modes:
                m.training = training
            plans.append(_match(module, method))
    finally:
        for m, training in modes.items():
            m.training = training
    if plans[0] != plans[1]:
        raise NoMatch(f"its {method} is one MLP in training and another in eval")
    return plans[0]


def _match(module: nn.Module, method: str) -> Dense:
    graph = trace(module, method)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise NoMatch(f"its {method} takes {len(inputs)} arguments, not x alone")
    *_, output = graph.nodes
    for node in graph.nodes:
        reads = node.op in ("output", "get_attr") or node.target is getattr
        if not node.users and not reads:  # it may write into x
            raise NoMatch(f"its {method} makes no use of {node}")
    return _Matcher(module, inputs[0], method).plan(output.args[0])


class _Matcher:
    def __init__(self, module: nn.Module, x: fx.Node, method: str) -> None:
        self.module, self.x, self.method = module, x, method

    def plan(self, out: Any) -> Dense:
        tail: list[str] = []
        node = out
        while not self.projects(node):
            node, step = self.before(node)
            tail.insert(0, step)
        down = node
        h, dropout = self.only(node.args[0]), None
        if self.calls(h) and isinstance(self.called(h), DROPOUTS):
            dropout, h = str(h.target), self.only(h.args[0])
        if self.is_call(h, _MUL):
            first, packed, (activation, by) = self.gated(*h.args)
        else:
            (activation, by), z = self.activation(h)
            first, packed = (self.projection_of_x(z),), None
        projections = (*first, str(down.target))
        called = [p for p in (dropout, *tail) if p and p != RESIDUAL]
        paths = with_parents((*by, *projections, *called))
        around = [p for p in paths if p not in projections and p not in called]
        return Dense(
            first=first, down=projections[-1], activation=activation,
            gated=self.is_call(h, _MUL), packed=packed, dropout=dropout, tail=tuple(tail),
            around=tuple(around), method=self.method,
        )  # fmt: skip

    def before(self, node: Any) -> tuple[Any, str]:
        """One step of the tail, and what came before it."""
        if self.calls(node):
            return self.only(node.args[0]), str(node.target)
        writes_x = self.is_call(node, (operator.iadd,)) and node.args[0] is self.x
        if self.is_call(node, _ADD) and self.x in node.args and not writes_x:
            return self.only(next(a for a in node.args if a is not self.x)), RESIDUAL
        raise NoMatch(f"its {self.method} does not end in a projection: {node}")

    def gated(self, a: Any, b: Any) -> tuple[tuple[str, ...], Any, tuple[str, tuple[str, ...]]]:
        a, b = self.only(a), self.only(b)
        for gate, up in ((a, b), (b, a)):
            try:
                name, g = self.activation(gate)
            except NoMatch:
                continue
            if self.projects(up):
                return (self.projection_of_x(g), self.projection_of_x(up)), None, name
            whole, halves = self.chunked(g, up)
            return (self.projection_of_x(whole),), halves, name
        raise NoMatch("neither factor of its product is an activation that has a kernel")

    def chunked(self, g: Any, u: Any) -> tuple[Any, str]:
        """The projection that g and u are halves of, and their order."""
        for half in (g, u):
            if not self.is_call(half, (operator.getitem,)):
                raise NoMatch("its gate and up are no projections, nor halves of one")
        pair = g.args[0]
        arguments = (*pair.args[1:], *pair.kwargs.values()) if isinstance(pair, fx.Node) else ()
        chunk = isinstance(pair, fx.Node) and pair.target in ("chunk", torch.chunk)
        order = (g.args[1], u.args[1])
        if not chunk or u.args[0] is not pair or arguments != (2, -1) or len(pair.users) != 2:
            raise NoMatch("its gate and up are not chunk(2, dim=-1) of one projection")
        halves = {(0, 1): "gate_up", (1, 0): "up_gate"}.get(order)
        if halves is None:
            raise NoMatch("its gate and up are the same half of one projection")
        return pair.args[0], halves

    def activation(self, node: Any) -> tuple[tuple[str, tuple[str, ...]], Any]:
        """((its name, the module passed by), its argument)."""
        fn: Callable[..., Any] | None = None
        by: tuple[str, ...] = ()
        if self.calls(node) and not self.projects(node):
            fn, by = self.called(node), (str(node.target),)
        elif isinstance(node, fx.Node) and node.op == "call_function" and node.args:
            rest, kwargs, target = node.args[1:], node.kwargs, node.target
            if not any(isinstance(a, fx.Node) for a in (*rest, *kwargs.values())):
                fn = lambda t: target(t, *rest, **kwargs)  # type: ignore[operator]  # noqa: E731
        name = name_by_values(fn) if fn is not None else None
        if name is None:
            what = type(fn).__name__ if isinstance(fn, nn.Module) else node
            raise NoMatch(f"{what} is no activation that has a kernel")
        return (name, by), self.only(node.args[0])

    def projection_of_x(self, node: Any) -> str:
        if not self.projects(node) or node.args[0] is not self.x:
            raise NoMatch(f"{self.inside(node)} is no projection of x")
        return str(node.target)

    def inside(self, node: Any) -> str:
        """What a reader knows `node` by: the submodule that it comes from."""
        stack = node.meta.get("nn_module_stack") if isinstance(node, fx.Node) else None
        if not stack:
            return str(node)
        path, kind = next(reversed(stack.values()))
        return f"{path} ({kind.__name__})"

    def only(self, node: Any) -> Any:
        """A value that is used once: else something is made of it that a fused call does not
        make."""
        if isinstance(node, fx.Node) and node is not self.x and len(node.users) > 1:
            raise NoMatch(f"{node} is used more than once")
        return node

    def calls(self, node: Any) -> bool:
        """A module called with one argument, by position."""
        return self.is_node(node, "call_module", 1)

    def called(self, node: fx.Node) -> nn.Module:
        return child(self.module, str(node.target))

    def is_call(self, node: Any, functions: tuple[Any, ...]) -> bool:
        """One of `functions` called with two arguments, by position."""
        return self.is_node(node, "call_function", 2) and node.target in functions

    def is_node(self, node: Any, op: str, arguments: int) -> bool:
        # An option by name (alpha of torch.add) would be another function.
        plain = isinstance(node, fx.Node) and node.op == op and not node.kwargs
        return plain and len(node.args) == arguments

    def projects(self, node: Any) -> bool:
        return self.calls(node) and is_projection(self.called(node)) and len(node.users) == 1
