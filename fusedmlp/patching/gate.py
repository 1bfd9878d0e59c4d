"""From a function of gate and up to the name of the gate that it computes, its parameters and the
layout that it reads.

By values, as of activations: what a class is called says nothing, and one class has a clamp at 7 in
one model and at 10 in another. The parameters of a row are looked for among the numbers that the
function's own trace holds, so a number is found wherever it stands: in the module, in a submodule,
in a configuration or in the code. What depends on a tensor, on data or on its neighbours is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..packing import Packed
from ..reference.activations import ACTIVATIONS, resolve
from .plan import child
from .trace import NoMatch, trace

_SETTING = (bool, int, float, str)
WIDTH = 7  # of a row of gates: no point stands beside the same one as in the grid


class Gate(NamedTuple):
    """activation: as functions take it, "swiglu_oai(limit=5.0)". packed: where gate and up lie in
    what the function reads, None where they come apart."""

    activation: str
    packed: Packed | None


class InFloat64(TorchFunctionMode):
    """What is computed in float32 on a function's own account is computed in float64: the kernels
    compute in float32 all the same, and a comparison in float64 tells one function from another."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = lambda a: torch.float64 if a is torch.float32 else a  # noqa: E731
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def points() -> tuple[Tensor, Tensor]:
    """(g, u), rows of WIDTH pairs: each of many g with each of fewer u, in no order."""
    grid: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    far = torch.logspace(-6, 5, 45, **grid)
    g = torch.cat((torch.linspace(-30, 30, 121, **grid), far, -far))
    u = torch.cat((torch.linspace(-30, 30, 25, **grid), far[::3], -far[::3]))
    pairs = torch.cartesian_prod(g, u)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    pairs = pairs[order[: len(pairs) // WIDTH * WIDTH]]
    g, u = pairs.T.reshape(2, -1, WIDTH)
    return g, u


def _computed(fn: Callable[..., Any], *args: Tensor) -> Tensor | None:
    """fn's values, or None where it gives no tensor of the shape and dtype of a gate."""
    try:
        with torch.no_grad(), InFloat64():
            y = fn(*(a.clone() for a in args))
    except Exception:  # whatever it is, it is no gate
        return None
    rows = args[0].shape[0]
    alike = isinstance(y, Tensor) and y.dtype == torch.float64 and y.shape == (rows, WIDTH)
    return y if alike else None


def _same(y: Tensor, text: str, g: Tensor, u: Tensor) -> bool:
    gate = resolve(text)
    expected = gate.phi(g) * gate.psi(u)
    # Parts that cancel are off by roundings of the largest of them.
    near = 1e-9 * expected.abs() + 1e-12 * (1 + g.abs()) * (1 + u.abs())
    return bool(((y - expected).abs() < near).all())


def spellings(numbers: Iterable[float]) -> Iterator[str]:
    """Every row of the table, and every choice of its parameters among `numbers`."""
    finite = {float(n) for n in numbers if math.isfinite(n)}
    found = sorted(finite | {abs(n) for n in finite})
    for row in ACTIVATIONS.values():
        choices = [(default, *found) for default in row.parameters.values()]
        values = itertools.product(*choices)
        yield from dict.fromkeys(
            row.spelled(**dict(zip(row.parameters, v, strict=True))) for v in values
        )


def gate_by_values(fn: Callable[[Tensor, Tensor], Any], numbers: Iterable[float]) -> str | None:
    """The activation whose gate has the values of fn(g, u), or None."""
    g, u = points()
    y = _computed(fn, g, u)
    if y is None:
        return None
    few = slice(None, None, 17)
    for text in spellings(numbers):
        try:
            fits = _same(y[few], text, g[few], u[few]) and _same(y, text, g, u)
        except ValueError:  # a number that this parameter cannot be
            continue
        if fits:
            return text
    return None


JOINED: dict[Packed, Callable[[Tensor, Tensor], Tensor]] = {
    "gate_up": lambda g, u: torch.cat((g, u), -1),
    "up_gate": lambda g, u: torch.cat((u, g), -1),
    "interleaved": lambda g, u: torch.stack((g, u), -1).flatten(-2),
}


# What was found, by the class and by what its trace shows in training and in eval.
_FOUND: dict[tuple[type, str, str], Gate | str] = {}


def gate_of(module: nn.Module, method: str) -> Gate | str:
    """The gate that `method` of `module` computes from gate and up in one tensor, in training and
    in eval alike, or why it is none."""
    try:
        graphs = [trace(module, method) for _ in in_both_modes(module)]
    except NoMatch as error:
        return str(error)
    training, evaluating = (_shown(module, graph) for graph in graphs)
    key = (type(module), training, evaluating)
    if key not in _FOUND:
        modes = zip(graphs, in_both_modes(module), strict=True)
        first, second = (_gate_of(module, method, graph) for graph, _ in modes)
        another = f"its {method} is not the same in training and in eval"
        _FOUND[key] = first if first == second else another
    return _FOUND[key]


def in_both_modes(module: nn.Module) -> Iterator[bool]:
    """True with all modules in training, then False with all in eval; at the end each as it was."""
    modes = {m: m.training for m in module.modules()}
    try:
        for training in (True, False):
            for m in modes:
                m.training = training
            yield training
    finally:
        for m, training in modes.items():
            m.training = training


def _shown(module: nn.Module, graph: fx.Graph) -> str:
    """All that makes one trace another: the graph, and of the modules that it calls the classes and
    their settings."""
    called = [child(module, str(n.target)) for n in graph.nodes if n.op == "call_module"]
    settings = [(type(m), [v for v in vars(m).values() if isinstance(v, _SETTING)]) for m in called]
    return f"{graph} {settings}"


def _gate_of(module: nn.Module, method: str, graph: fx.Graph) -> Gate | str:
    if (reads := tensor_read(module, graph.nodes)) is not None:
        return f"its {method} reads {reads}"
    numbers, fn = numbers_of(module, graph.nodes), getattr(module, method)
    for packed, joined in JOINED.items():
        activation = gate_by_values(lambda g, u: fn(joined(g, u)), numbers)  # noqa: B023
        if activation is not None:
            return Gate(activation, packed)
    return f"its {method} computes no gate that has a kernel"


def tensor_read(module: nn.Module, nodes: Iterable[fx.Node]) -> str | None:
    """A parameter or buffer that `nodes` of a trace of `module` read."""
    for node in nodes:
        if node.op == "get_attr":
            return f"the tensor {node.target}"
        if node.op == "call_module":
            inner = child(module, str(node.target))
            if any(True for _ in (*inner.parameters(), *inner.buffers())):
                return f"the tensors of {node.target}"
    return None


def numbers_of(module: nn.Module, nodes: Iterable[fx.Node]) -> list[float]:
    """The numbers in `nodes` of a trace of `module`: constants, and settings of what is called."""
    found: list[Any] = []
    for node in nodes:
        fx.node.map_aggregate((node.args, node.kwargs), found.append)
        if node.op == "call_module":
            found += vars(child(module, str(node.target))).values()
    return [v for v in found if isinstance(v, int | float) and not isinstance(v, bool)]
