"""A launcher's call at given sizes: its operands, the call, and what it must return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .arch.tile import Tile

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
# (M, D, H), of a family with a size of its own followed by that: masks, experts.
Size = tuple[int, ...]
# One more call: its name, its dtype, and the call itself, which holds its operands.
Extra = tuple[str, torch.dtype, Callable[[], object]]

# Prefix of an operand's name -> its dtype, where that is not the call's.
_DTYPES = {
    "planes": torch.uint8, "q_": torch.int32, "s_": torch.float16, "tokens": torch.int32,
    "offsets": torch.int32, "expert": torch.int64, "position": torch.int64, "wide_": torch.float32,
}  # fmt: skip


def no_values(size: Size, device: torch.device) -> Tensors:
    return {}


def no_extras() -> Iterator[Extra]:
    return iter(())


@dataclass(frozen=True)
class Launch:
    """One launcher, or one of the tiles that it takes.

    name: the row of the tile table that the call reads, or the launcher's own name. shapes:
    operands by name; "a+b" is one tensor cut in two along its last dimension but one, as halves of
    a packed weight. call: from operands, whether all is stored that training needs, and the
    activation. reference: what it must return when training, by name; None where no tile is
    searched.

    For the gate: size and ragged, real ones whose rows lie on 16 bytes and which do not; none where
    `everywhere` says all. dtypes: those to compile where the table of tiles has none of its name.
    activated: whether every activation makes another kernel; gated: with an up projection, which
    gates ask for. odd: variant -> size of what few calls
    meet, and extras, calls that only one architecture is asked to compile; everywhere: extras for
    all of them.

    For the search: values of the operands that are not drawn, tile_of: the table's choice if not
    that of an (M, H) result; scales of what is drawn; sizes, if not an MLP's; checked: the size to
    check numbers at.
    """

    name: str
    call: Callable[..., Tensors] | None = None
    shapes: Callable[..., Shapes] = lambda *size: {}  # noqa: E731
    size: Size = ()
    ragged: Size = ()
    reference: Callable[[Mapping[str, Tensor]], Tensors] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    activated: bool = False
    gated: bool = True
    odd: Mapping[str, Size] = field(default_factory=dict)
    extras: Callable[[], Iterator[Extra]] = no_extras
    everywhere: Callable[[], Iterator[Extra]] = no_extras
    values: Callable[[Size, torch.device], Tensors] = no_values
    tile_of: Callable[[Tensor, Size], Tile] | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    sizes: tuple[tuple[int, int, int], ...] = ()
    checked: tuple[int, int, int] = (33, 48, 40)


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an operand in a call of `dtype`."""
    return next((own for prefix, own in _DTYPES.items() if name.startswith(prefix)), dtype)


def cut(name: str, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """An operand by its name; both halves of a tensor named "a+b"."""
    names = name.split("+")
    return zip(names, t.chunk(len(names), -2) if len(names) > 1 else (t,), strict=True)


def empty(launch: Launch, size: Size, dtype: torch.dtype) -> Tensors:
    """Operands for the gate: memory that is never touched costs nothing."""
    return {
        part: half
        for name, shape in launch.shapes(*size).items()
        for part, half in cut(name, torch.empty(shape, dtype=dtype_of(name, dtype)))
    }


def draw(launch: Launch, size: Size, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Random operands of variance 1, weights scaled by their depth. Zeros would run faster."""
    generator = torch.Generator(device).manual_seed(0)
    operands = launch.values(size, device)
    for name, shape in launch.shapes(*size).items():
        if name in operands:
            continue
        own = dtype_of(name, dtype)
        if not own.is_floating_point:
            low, high = (0, 256) if own == torch.uint8 else (-(1 << 31), 1 << 31)
            t = torch.randint(low, high, shape, generator=generator, device=device, dtype=own)
        else:
            t = (2 * torch.rand(shape, generator=generator, device=device) - 1) * 3**0.5
            t = t * launch.scales.get(name, 1)
            depth = shape[-2] if name == "w_down" else shape[-1]
            t = (t / depth**0.5 if name.startswith("w") else t).to(own)
        operands |= cut(name, t)
    return operands


def sizes_of_one(M: int, D: int, H: int, *rest: int) -> dict[str, Size]:
    """Sizes of 1, which Triton compiles in."""
    sizes = [(1, D, H), (1, 1, H), (M, 1, H), (M, D, 1)]
    return {"x".join(map(str, size)): (*size, *rest) for size in sizes}
