"""What a block would launch on a GPU, planned by the launchers themselves; its FLOPs and bytes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..backends import choice
from ..backends.flops import bytes_moved
from ..backends.op import NAMESPACE
from ..kernels.arch import Arch
from ..kernels.arch.tile import ADAPTED, Tile
from ..kernels.pick import LAST
from .blocks import Block, backward, drawing_nothing, forward, stand_ins
from .driver import Untouched, here, launch_nothing, replaced, unwritten


@dataclass(frozen=True)
class Expected:
    """ops: public functions that the phase calls. kernels: what they launch, and the last tile of
    each that has some. flops: executed ones. moved: bytes of arguments and results alone."""

    phase: str
    ops: tuple[str, ...]
    kernels: tuple[tuple[str, Tile | None], ...]
    flops: int
    moved: int


class _Noting(Untouched):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == NAMESPACE:
            self.kernels[func._schema.name.rpartition("::")[2]] = None
            for t in tree_leaves(made):
                if not t.is_floating_point():
                    t.zero_()  # a router's results may be read: no token goes anywhere
        return made


def _last(name: str) -> Tile | None:
    """Several masks, and adapters, have tiles of their own."""
    rows = (name, f"{name}_group", f"{name}{ADAPTED}")
    return next((LAST[row] for row in rows if row in LAST), None)


def _noting_ops(ops: dict[str, None]) -> AbstractContextManager[None]:
    pick = choice.pick

    def noting(op: str, *rest: Any) -> str:
        ops[op] = None
        return pick(op, *rest)

    return replaced(choice, "pick", here(noting, pick))


def expected(block: Block, rows: int, arch: Arch, multiprocessors: int) -> list[Expected]:
    """A forward of `rows` rows, and in training its backward. Raises what the block's call
    raises where it reads results on the way."""
    with launch_nothing(arch, multiprocessors), drawing_nothing(block.module):
        tensors = stand_ins(block, unwritten)
        training = block.module.training and any(t.requires_grad for t in tensors.values())
        found: list[Expected] = []
        with torch.set_grad_enabled(training):
            _run(block, rows, tensors, training, found)
    return found


def _run(
    block: Block, rows: int, tensors: dict[str, Tensor], training: bool, found: list[Expected]
) -> None:
    inputs: tuple[Tensor, ...] = ()
    out: Any = None
    for phase in ("forward", "backward") if training else ("forward",):
        LAST.clear()
        ops: dict[str, None] = {}
        counter = FlopCounterMode(display=False)
        with _noting_ops(ops), _Noting() as noted, counter:
            if phase == "forward":
                inputs = block.inputs(rows, unwritten(block.like))
                inputs = tuple(t.requires_grad_(training and t.is_floating_point()) for t in inputs)
                out = forward(block, tensors, inputs)
            else:
                backward(out, tensors, inputs)
        kernels = tuple((name, _last(name)) for name in noted.kernels)
        results = sum(t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor))
        sizes = [(t.nbytes, t.requires_grad) for t in (*inputs, *tensors.values())]
        moved = bytes_moved(sizes, results, phase)
        found.append(Expected(phase, tuple(ops), kernels, counter.get_total_flops(), moved))
