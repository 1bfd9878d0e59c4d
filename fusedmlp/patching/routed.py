"""What a block of experts gives its router and takes from it, read off the block's own forward.

A router returns several tensors, and their order and the router's input have changed from one
release of transformers to the next (5.17 and 5.24 differ in both). Shapes do not tell them apart:
with one expert, or by chance, all are alike. What the forward does with them does.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import fx, nn

from .trace import NoMatch, trace


class ToExperts(NamedTuple):
    """experts(x, routed[mask], routed[prob]), where routed = router(x), and `flat` says whether
    that x is (tokens, D) or as the block was given it."""

    mask: int
    prob: int
    flat: bool


class ToScale(NamedTuple):
    """x * routed[scores] goes to the experts, and routed[logits] is returned beside the result."""

    scores: int
    logits: int


def to_experts(block: nn.Module) -> ToExperts:
    """Raises NoMatch where the block's forward is another."""
    graph = _Graph(block)
    experts = _viewed(graph.result)
    if not graph.calls(experts, "experts", 3) or _viewed(experts.args[0]) is not graph.x:
        raise NoMatch("its forward is not experts(x, mask, prob) with what its router returns")
    mask, prob = (graph.item(_viewed(a)) for a in experts.args[1:])
    return ToExperts(mask, prob, graph.router.args[0] is not graph.x)


def to_scale(block: nn.Module) -> ToScale:
    """Raises NoMatch where the block's forward is another."""
    graph = _Graph(block)
    if not isinstance(graph.result, tuple) or len(graph.result) != 2:
        raise NoMatch("its forward does not return its result and its router's logits")
    logits = graph.item(graph.result[1])
    others = {graph.item(node) for node in graph.router.users} - {logits}
    if len(others) != 1:
        raise NoMatch("its forward does not scale x by one of two tensors that its router returns")
    return ToScale(others.pop(), logits)


class _Graph:
    """A block's forward, its submodules kept whole."""

    def __init__(self, block: nn.Module) -> None:
        graph = trace(block, "forward", whole=True)
        self.x, *more = (n for n in graph.nodes if n.op == "placeholder")
        routers = [n for n in graph.nodes if self.calls(n, "router", 1)]
        if more or len(routers) != 1 or _viewed(routers[0].args[0]) is not self.x:
            raise NoMatch("its forward does not call its router once, on x")
        (self.router,) = routers
        *_, output = graph.nodes
        self.result: Any = output.args[0]

    def calls(self, node: Any, name: str, arguments: int) -> bool:
        called = isinstance(node, fx.Node) and node.op == "call_module" and node.target == name
        return called and len(node.args) == arguments and not node.kwargs

    def item(self, node: Any) -> int:
        """i, where `node` is what the router returned at i."""
        taken = isinstance(node, fx.Node) and node.target is operator.getitem
        if not taken or node.args[0] is not self.router or not isinstance(node.args[1], int):
            raise NoMatch(f"its forward hands on {node}, which its router did not return as it is")
        return node.args[1]


def _viewed(node: Any) -> Any:
    """What `node` is in another shape."""
    while isinstance(node, fx.Node) and node.target in ("view", "reshape"):
        node = node.args[0]
    return node
