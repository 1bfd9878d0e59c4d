"""The fused blocks of a model: its layers of this package and its patched modules, and how each is
called on rows of nothing.

A block is called beside its model: a copy of its modules on stand-ins of its parameters and
buffers, so that neither gradients nor running statistics nor another thread see it, and hooks are
not called.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import layers
from ..hyperglu import HyperGLU
from ..layers import GMLP
from ..layers.glu import GLUBase
from ..layers.gmlp import GMLPBlock
from ..layers.ngpt import SwiGLU
from ..layers.parts.around import HOOKS, hooked
from ..patching.plan import child
from ..patching.swap import Patched

Inputs = Callable[[int, Tensor], tuple[Tensor, ...]]
# Without kernels of their own, and around what has some.
_AROUND = ("L2Norm", "ResidualWrapper")
_LAYERS = (
    *(getattr(layers, name) for name in layers.__all__ if name not in _AROUND),
    *(GLUBase, GMLPBlock, HyperGLU, SwiGLU),
)


@dataclass(frozen=True)
class Block:
    """call: of the module and its inputs, what is fused of its forward. inputs: for a number of
    rows, of zeros, beside a tensor that they are like."""

    name: str
    module: nn.Module
    call: Callable[..., Any]
    inputs: Inputs

    @property
    def kind(self) -> str:
        return f"{self.name or 'the layer'} ({type(self.module).__name__})"

    @property
    def like(self) -> Tensor:
        """A tensor as the block's calls have."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        floating = (t for t in tensors if t.is_floating_point())
        return next(floating, torch.empty(0, dtype=torch.bfloat16))

    def alike(self) -> object:
        """Two blocks of the same launches have the same."""
        own = (*self.module.named_parameters(), *self.module.named_buffers())
        sizes = ((n, t.shape, t.stride(), t.dtype, t.requires_grad) for n, t in own)
        modes = tuple((m.training, hooked(m)) for m in self.module.modules())
        return type(self.module), repr(self.module), tuple(sizes), modes


def blocks_of(model: nn.Module) -> list[Block]:
    """The outermost ones, in the order of `named_modules`."""
    return list(_visit("", model))


def _visit(name: str, module: nn.Module) -> Iterator[Block]:
    inside: set[int] = set()
    if isinstance(module, Patched):
        plan = module._plan
        yield Block(name, module, plan.trial, lambda rows, like: plan.example(module, rows, like))
        inside = {id(child(module, path)) for path in plan.bypassed()}
    elif isinstance(module, _LAYERS):
        yield Block(name, module, _forward, lambda rows, like: (_zeros(module, rows, like),))
        return
    for key, inner in module.named_children():
        if id(inner) not in inside:
            yield from _visit(f"{name}.{key}".lstrip("."), inner)


def _forward(module: nn.Module, *inputs: Tensor) -> Any:
    return module.forward(*inputs)


def _zeros(module: nn.Module, rows: int, like: Tensor) -> Tensor:
    """x as the layer takes it, of at least so many rows."""
    if isinstance(module, HyperGLU):
        T = min(rows, module.config.block_size)
        shape = (math.ceil(rows / T), T, module.config.n_embd)
    elif isinstance(module, (GMLP, GMLPBlock)):
        shape = (math.ceil(rows / module.seq_len), module.seq_len, module.dim)
    else:
        return like.new_zeros(rows, _width(module))
    return like.new_zeros(shape)


def _width(module: nn.Module) -> int:
    """D: the columns of a layer's first matrix, since parameters stand in the order of calls."""
    for p in module.parameters():
        if p.dim() in (2, 3):
            return p.shape[-1]
    return next(int(m.in_features) for m in module.modules() if hasattr(m, "in_features"))  # type: ignore[arg-type]


def stand_ins(block: Block, make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What `make` makes of each parameter and buffer of the block, by its name."""
    module = block.module
    own = {name: make(p).requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    return own | {name: make(b) for name, b in module.named_buffers()}


def forward(block: Block, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Any:
    """The block's call on `inputs`, with `tensors` in the place of its own."""
    own = (*block.module.named_parameters(), *block.module.named_buffers())
    at = {id(t): tensors[name] for name, t in own}
    return block.call(_beside(block.module, at), *inputs)


def _beside(module: nn.Module, at: dict[int, Any]) -> nn.Module:
    """A module of the same classes on the tensors that `at` has for its own, by id. What a call may
    write to is its own too: attributes that are tensors, lists, dicts, sets, and whatever holds
    those or the module. Other objects are shared."""
    inner = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    at |= {id(m): m.__class__.__new__(m.__class__) for m in inner}

    def leaf(value: Any) -> Any:
        if id(value) in at:
            return at[id(value)]
        if isinstance(value, Tensor):
            return at.setdefault(id(value), value.clone())
        if isinstance(value, set):
            return set(value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, leaf(value.__self__))
        if isinstance(value, partial):
            # Once, since a patched module compares its functions with those of before.
            function, args, keywords = copy((value.func, value.args, value.keywords))
            return at.setdefault(id(value), partial(function, *args, **keywords))
        return value

    def copy(values: Any) -> Any:
        return tree_map(leaf, values)

    for m in inner:
        attributes = {k: _silent(v) if k in HOOKS else copy(v) for k, v in vars(m).items()}
        vars(at[id(m)]).update(attributes)
    return at[id(module)]


def _silent(hooks: dict[int, Any]) -> dict[int, Any]:
    """As many hooks, since a module without is fused otherwise. They do nothing, except PyTorch's
    own: those make weights (pruning, weight_norm)."""
    own = {k: (getattr(h, "__module__", None) or "").startswith("torch.") for k, h in hooks.items()}
    return OrderedDict((k, h if own[k] else _nothing) for k, h in hooks.items())


def _nothing(*_: Any, **__: Any) -> None:
    return None


def backward(out: Any, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Every gradient that training wants of such a call; none is kept."""
    results = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if results:
        wanted = [t for t in (*inputs, *tensors.values()) if t.requires_grad]
        ones = [torch.empty_like(t) for t in results]
        torch.autograd.grad(results, wanted, ones, allow_unused=True)


@contextmanager
def drawing_nothing(module: nn.Module) -> Iterator[None]:
    """Whatever a call draws is as if it had not been."""
    devices = {p.device for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng([d.index for d in devices]):
        yield
