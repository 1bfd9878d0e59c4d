"""What stands between the first projections and `down`: by its values, however it is spelled.

relu(z).square(), relu(z) ** 2; g * sigmoid(g) * u; halves by chunk, split, slices or unflatten: all
are functions of what the projections gave. The part of the graph that computes one is run in
float64, and compared with each activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..packing import ORDERS, Packed, halves
from ..reference.activations import resolve
from .activation import GRID
from .gate import InFloat64, numbers_of, spellings
from .plan import child
from .steps import is_dropout
from .trace import Attribute, NoMatch

# What a projection has that does not say its width.
_WIDTH = 32
_ALONE: tuple[tuple[Packed | None, bool], ...] = ((None, True),)
_SETTINGS = (int, float, str)
_HASHED = (*_SETTINGS, bool, type(None), FunctionType, BuiltinFunctionType)
_OF_A_MODULE = vars(nn.Module()).keys()
_Run = tuple[list[Tensor], Tensor]


class Spelled(NamedTuple):
    """first: the projections' nodes, gate before up. by: submodules that it calls."""

    first: tuple[fx.Node, ...]
    activation: str
    gated: bool
    packed: Packed | None
    by: tuple[str, ...]
    reads: tuple[Attribute, ...]


class Region:
    """The nodes between `h` and the projections that it is made of."""

    def __init__(self, module: nn.Module, h: fx.Node, projects: Callable[[Any], bool]) -> None:
        self.module, self.h = module, h
        found: dict[fx.Node, None] = {}
        firsts: dict[fx.Node, None] = {}
        todo = [h]
        while todo:
            node = todo.pop()
            if projects(node):
                firsts[node] = None
            elif node not in found:
                self._computes(node)
                found[node] = None
                todo += node.all_input_nodes
        order = {node: i for i, node in enumerate(h.graph.nodes)}
        self.first = sorted(firsts, key=order.__getitem__)
        self.nodes = sorted(found, key=order.__getitem__)

    def _computes(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr", "output"):
            raise NoMatch(f"{node} stands between its projections")
        inner = child(self.module, str(node.target)) if node.op == "call_module" else None
        if inner is not None and any(True for _ in (*inner.parameters(), *inner.buffers())):
            what = "neither a projection of x nor an activation that has a kernel"
            raise NoMatch(f"{inside(node, inner)} is {what}")
        if node.target is torch.nn.functional.dropout or (inner and is_dropout(inner)):
            raise NoMatch(f"{node} drops a part of what it multiplies")

    def closed(self) -> None:
        """Nothing else may be made of what a fused call does not make."""
        own = {*self.nodes}
        for node in (*self.first, *self.nodes):
            if node is not self.h and any(user not in own for user in node.users):
                raise NoMatch(f"{node} is used more than once")

    def by(self) -> tuple[str, ...]:
        return tuple(str(n.target) for n in self.nodes if n.op == "call_module")

    def shown(self) -> Any:
        """All that makes what it computes another: its nodes, and of modules that it calls the
        classes and settings; None where a setting is more than a number, a text or a function."""
        first = [str(node) for node in self.first]
        key: list[Any] = [tuple(first)]
        for node in self.nodes:
            key.append((node.target, str(node.args), str(node.kwargs)))
            if node.op == "call_module":
                inner = child(self.module, str(node.target))
                own = {k: v for k, v in vars(inner).items() if k not in _OF_A_MODULE}
                if inner._modules or any(type(v) not in _HASHED for v in own.values()):
                    return None
                key.append((type(inner), inner.training, *own.items()))
        return tuple(key)

    def numbers(self) -> list[float]:
        return numbers_of(self.module, self.nodes)

    def reads(self) -> tuple[Attribute, ...]:
        values = (v for n in self.nodes for v in _leaves((n.args, n.kwargs)))
        found = [v.read for v in values if hasattr(v, "read")]
        for path in self.by():
            own = vars(child(self.module, path)).items()
            found += [Attribute(path, k) for k, v in own if type(v) in _SETTINGS and k[0] != "_"]
        return tuple(dict.fromkeys(found))

    def __call__(self, *values: Tensor) -> Any:
        """What it computes of what the projections gave."""
        env: dict[fx.Node, Any] = dict(zip(self.first, (v.clone() for v in values), strict=True))
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            target: Any = node.target
            if node.op == "call_module":
                env[node] = _forward(child(self.module, target), *args, **kwargs)
            elif node.op == "call_method":
                env[node] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                env[node] = target(*args, **kwargs)
        return env[self.h]


def inside(node: fx.Node, of: nn.Module) -> str:
    """What a reader knows `node` by: the submodule that it comes from."""
    return f"{node.target} ({type(of).__name__})"


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Without hooks, which are not to see these numbers."""
    forward = getattr(type(module), "forward", None)
    return module(*args, **kwargs) if forward is None else forward(module, *args, **kwargs)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def spelled(region: Region, width: int | None) -> Spelled:
    """Raises NoMatch where no activation has the region's values."""
    count = len(region.first)
    if count not in (1, 2):
        raise NoMatch(f"{region.h} is made of {count} projections")
    key = region.shown()
    found = _FOUND.get((key, width)) or _looked_for(region, width if count == 1 else None)
    if key is not None:
        _FOUND[key, width] = found
    name, packed, gate_is_first = found
    first = region.first if gate_is_first else region.first[::-1]
    gated = packed is not None or count == 2
    return Spelled(tuple(first), name, gated, packed, region.by(), region.reads())


# Regions that show all that they compute: the layers of a model are alike.
_FOUND: dict[tuple[Any, int | None], tuple[str, Packed | None, bool]] = {}


def _looked_for(region: Region, width: int | None) -> tuple[str, Packed | None, bool]:
    count = len(region.first)
    runs = [_run(region, [width or _WIDTH] * count, dims) for dims in (2, 3, 4)]
    layouts = _layouts(count, runs[0])
    for name in spellings(region.numbers()):
        for packed, gate_is_first in layouts:
            if all(_agree(name, run, packed, gate_is_first) for run in runs):
                return name, packed, gate_is_first
    if count == 2:
        raise NoMatch("neither factor of its product is an activation that has a kernel")
    if layouts == _ALONE:
        raise NoMatch(f"{_what(region)} is no activation that has a kernel")
    raise NoMatch("its gate and up are not both halves of one projection, by an activation")


def _layouts(count: int, run: _Run) -> tuple[tuple[Packed | None, bool], ...]:
    """Where gate and up may be, and of two projections whether the first is the gate."""
    (z, *_), h = run
    if count == 2:
        return (None, True), (None, False)
    return _ALONE if h.shape == z.shape else tuple((order, True) for order in ORDERS)


def _agree(name: str, run: _Run, packed: Packed | None, gate_is_first: bool) -> bool:
    """1e-9 tells tanh-gelu from gelu (5e-4 apart) and takes a constant written to eight digits."""
    (z, *more), h = run
    if packed is not None and z.shape[-1] % 2:
        return False
    whole = (z, *more) if gate_is_first else (*more, z)
    parts: tuple[Tensor, ...] = whole if packed is None else halves(z, packed)
    try:
        row = resolve(name)
    except ValueError:  # a number that this parameter cannot be
        return False
    g, u = parts[0], parts[1] if len(parts) > 1 else None
    if u is None and row.row.up is not None:
        return False
    expected = row.phi(g) if u is None else row.phi(g) * row.psi(u)
    if h.shape != expected.shape or h.dtype != expected.dtype:
        return False
    # Parts that cancel are off by roundings of the largest of them.
    near = expected.abs() + (1 + g.abs()) * (1 if u is None else 1 + u.abs())
    return bool(((h - expected).abs() < 1e-9 * near).all())


def _what(region: Region) -> str:
    last = region.h
    if last.op == "call_module":
        return type(child(region.module, str(last.target))).__name__
    return str(last)


def _run(region: Region, widths: list[int], dims: int) -> _Run:
    """Arguments of `dims` dimensions that hold the whole grid, and the result."""
    z = [_drawn(width, (2, 3)[: dims - 2], seed) for seed, width in enumerate(widths)]
    try:
        with torch.no_grad(), InFloat64():
            h = region(*z)
    except Exception as error:
        what = str(error).partition("\n")[0]
        raise NoMatch(f"{region.h} cannot be computed: {type(error).__name__}: {what}") from None
    if not isinstance(h, Tensor):
        raise NoMatch(f"{region.h} is no tensor")
    return z, h


def _drawn(width: int, leading: tuple[int, ...], seed: int) -> Tensor:
    """The grid in both halves, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = prod(leading) * (1 + GRID.numel() // max(prod(leading) * (width // 2), 1))
    halves = []
    for part in (width // 2, width - width // 2):
        grid = GRID[torch.randperm(GRID.numel(), generator=generator)]
        grid = grid.repeat(1 + rows * part // grid.numel())
        halves.append(grid[: rows * part].view(*leading, -1, part) if part else None)
    return torch.cat([half for half in halves if half is not None], -1)
