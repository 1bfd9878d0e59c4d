"""A dense MLP in the graph of a forward, whose leaf modules are kept whole.

    x -> [head] -> gate, up -> act(g) * u -> [between] -> down -> [tail]
    x -> [head] -> first    -> act        -> [between] -> down -> [tail]

Head, between and tail are modules called one after another and dropout; the tail may add x. What
makes h of the projections is told by its values (spelling.py).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from .compiled import RUN
from .dense import Dense
from .plan import child, with_parents
from .projection import like_a_projection, width
from .spelling import Region, Spelled, spelled
from .steps import RESIDUAL, Dropout, Step, describe, is_dropout, paths
from .trace import NoMatch, Traced

_ADD = (operator.add, operator.iadd, torch.add)


class Flow:
    """With `opaque`, whatever holds parameters may stand where a projection does."""

    def __init__(self, module: nn.Module, traced: Traced, method: str, opaque: bool) -> None:
        self.module, self.traced, self.method, self.opaque = module, traced, method, opaque
        self.where = where = "forward" if method == RUN else method
        graph = traced.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        # A run of statements is given what a branch reads that is not taken.
        used = [node for node in inputs if node.users or method != RUN]
        if len(used) != 1:
            more = f" and {len(used) - 3} more" * (len(used) > 3)
            names = ", ".join(map(str, used[:3])) + more or "nothing"
            raise NoMatch(f"its {where} takes {names}, not x alone")
        (self.x,) = used
        self.argument = inputs.index(self.x)
        *_, output = graph.nodes
        self.out: Any = output.args[0]
        for node in graph.nodes:
            reads = node.op in ("output", "get_attr", "placeholder") or node.target is getattr
            if not node.users and not reads:  # it may write into x
                raise NoMatch(f"its {where} makes no use of {node}")

    def plan(self) -> Dense:
        down, tail = self.chain(self.out)
        if down is self.x:
            raise NoMatch(f"its {self.where} has no projection of its own behind another")
        found, between, idle = self.block(self.only(down.args[0]))
        first = tuple(str(node.target) for node in found.first)
        _, head = self.chain(self.start(found))
        projections = (*first, str(down.target))
        called = paths((*head, *between, *tail))
        every = with_parents((*found.by, *idle, *projections, *called))
        return Dense(
            first=first, down=projections[-1], activation=found.activation, gated=found.gated,
            packed=found.packed, head=head, between=between, tail=tail, method=self.method,
            argument=self.argument,
            around=tuple(p for p in every if p not in projections and p not in called),
            reads=tuple(dict.fromkeys((*self.traced.functions, *found.reads))),
        )  # fmt: skip

    def block(self, h: Any) -> tuple[Spelled, tuple[Step, ...], tuple[str, ...]]:
        """act(g) u, what follows it, and the Identities there, which are not called."""
        between: list[Step] = []
        idle: list[str] = []
        node, first = h, None
        while not self.projects(node):
            step, before = self.step(node)
            try:
                if not self.between(node):
                    return self.region(node), tuple(between), tuple(idle)
            except NoMatch as error:
                first = first or error
            if step is None or step == RESIDUAL:
                raise first or NoMatch(f"{self.named(node)} stands before its last projection")
            if self.is_identity(node):
                idle.append(str(step))
            else:
                between.insert(0, step)
            node = self.only(before)
        if first is None and idle and not between:
            return Spelled((node,), "identity", False, None, (), ()), (), tuple(idle)
        what = ", ".join(map(describe, between))
        what = f"{what} is no activation that has a kernel" if what else "there is no activation"
        raise first or NoMatch(f"between its projections {what}")

    def region(self, h: Any) -> Spelled:
        region = Region(self.module, h, self.projects)
        region.closed()
        return spelled(region, width(self.called(region.first[0])) if region.first else None)

    def start(self, found: Spelled) -> Any:
        """What the first projections take."""
        starts = [node.args[0] for node in found.first]
        other = next((node for node in starts if node is not starts[0]), None)
        if other is not None:
            raise NoMatch(f"its gate and up are of {starts[0]} and {other}, not both of x")
        start: Any = starts[0]
        used = isinstance(start, fx.Node) and start is not self.x
        if used and any(user not in found.first for user in start.users):
            raise NoMatch(f"{start} is used more than once")
        return start

    def chain(self, node: Any) -> tuple[Any, tuple[Step, ...]]:
        """Steps up to and with `node`, back to x or, from the end, to a projection."""
        steps: list[Step] = []
        ends = node is self.out
        while node is not self.x and not (ends and self.projects(node)):
            step, before = self.step(node)
            if step is None:
                where = "end in a projection" if ends else "begin with x"
                raise NoMatch(f"its {self.where} does not {where}: {node}")
            steps.insert(0, step)
            node = self.only(before) if ends else before
            if not ends and isinstance(node, fx.Node) and node is not self.x:
                self.only(node)
        return node, tuple(steps)

    def step(self, node: Any) -> tuple[Step | None, Any]:
        """One step, and what it is taken on."""
        if self.calls(node):
            return str(node.target), node.args[0]
        if isinstance(node, fx.Node) and node.target is torch.nn.functional.dropout:
            return self.dropout(node), node.args[0] if node.args else None
        writes_x = self.is_call(node, (operator.iadd,)) and node.args[0] is self.x
        if self.is_call(node, _ADD) and self.x in node.args and not writes_x:
            return RESIDUAL, next((a for a in node.args if a is not self.x), None)
        return None, None

    def dropout(self, node: fx.Node) -> Dropout | None:
        names = ("input", "p", "training", "inplace")
        given: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
        given |= dict(zip(names, node.args, strict=False)) | node.kwargs
        numbers = (given["p"], given["training"])
        if given["inplace"] or not node.args or any(isinstance(n, fx.Node) for n in numbers):
            return None
        return Dropout(*(getattr(number, "read", number) for number in numbers))

    def between(self, node: Any) -> bool:
        """Whether it is no part of an activation."""
        if isinstance(node, fx.Node) and node.target is torch.nn.functional.dropout:
            return True
        if not self.calls(node):
            return False
        inner = self.called(node)
        own = any(True for _ in (*inner.parameters(), *inner.buffers()))
        return own or is_dropout(inner) or type(inner) is nn.Identity

    def is_identity(self, node: Any) -> bool:
        return self.calls(node) and type(self.called(node)) is nn.Identity

    def named(self, node: Any) -> str:
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
        if not self.calls(node):
            return False
        inner = self.called(node)
        if like_a_projection(inner):
            return True
        return self.opaque and any(p.dim() > 1 for p in inner.parameters())
