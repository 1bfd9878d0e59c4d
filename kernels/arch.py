"""The table of all tiles, and the choice among them.

One `Arch` row is one GPU generation: what fits its shared memory and which tiles each kernel may
use, the preferred first. Host code picks a `Tile`; the kernel obeys it. The sizes below were chosen
from the compiler's own report (no spill, fits shared memory, tensor-core opcode present); none has
been timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

SKINNY_M = 16  # up to this many rows a GEMM is bound by its weight's bytes


@dataclass(frozen=True)
class Tile:
    """How one GEMM launch is cut.

    subtiles: the epilogue handles the tile in that many column parts, so that fewer registers are
    live. loads: "tma" moves tiles by TMA descriptors under a persistent grid; "vector" by pointers,
    16 bytes a thread; "element" makes no demand on strides or sizes. group_m: rows of tiles visited
    together, for L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    subtiles: int = 1
    loads: Literal["tma", "vector", "element"] = "vector"
    group_m: int = 8

    @property
    def tma(self) -> bool:
        return self.loads == "tma"

    @property
    def skinny(self) -> bool:
        return self.block_m <= SKINNY_M

    def __str__(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k}, {self.num_warps} warps, "
            f"{self.num_stages} stages, {self.loads} loads"
        )


# (kernel, bytes of an element) -> tiles. A kernel is a launcher's name: gated_linear_fwd and so on.
Tiles = Mapping[tuple[str, int], tuple[Tile, ...]]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: choices are cached by Arch
class Arch:
    """capability: 10 * major + minor of the first GPU it serves. shared_memory: bytes a block may
    use. hyper: of hyper_attention's kernels, which have one tile each for any strides and sizes."""

    name: str
    capability: int
    shared_memory: int
    tma: bool
    tiles: Tiles
    hyper: Tiles = field(default_factory=dict)

    def row(self, kernel: str, size: int) -> tuple[Tile, ...]:
        return self.hyper.get((kernel, size)) or self.tiles[kernel, size]

    def with_row(self, kernel: str, size: int, tiles: tuple[Tile, ...]) -> Arch:
        key = kernel, size
        if key in self.hyper:
            return dataclasses.replace(self, hyper={**self.hyper, key: tiles})
        return dataclasses.replace(self, tiles={**self.tiles, key: tiles})


# Any strides, any size: per-element addresses cost registers, so the K step is short.
_ELEMENT = Tile(64, 32, 16, 4, 2, subtiles=2, loads="element")
_SKINNY = (Tile(16, 32, 128, 4, 4), Tile(16, 32, 32, 4, 2, loads="element"))
_MASKED_SKINNY = (Tile(16, 32, 32, 4, 5), Tile(16, 32, 32, 4, 2, loads="element"))
_MASKED_ELEMENT = Tile(64, 16, 16, 4, 2, loads="element")
_FP32_ELEMENT = Tile(32, 32, 16, 4, 2, loads="element")
_FP32_SKINNY = (Tile(16, 32, 32, 4, 3), Tile(16, 32, 16, 4, 2, loads="element"))
_MOE_FP32 = {  # moe_up holds two accumulators
    ("moe_up", 4): (Tile(64, 64, 16, 8, 3, subtiles=2), Tile(16, 64, 16, 4, 3), _FP32_ELEMENT),
    ("moe_down", 4): (Tile(64, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3), _FP32_ELEMENT),
    ("moe_dh", 4): (Tile(64, 64, 32, 8, 3, subtiles=4), Tile(16, 64, 32, 4, 3), _FP32_ELEMENT),
    ("moe_wgrad", 4): (Tile(64, 64, 32, 8, 3), _FP32_ELEMENT),
}
_FP32 = _MOE_FP32 | {  # CUDA cores unless the caller allows TF32; one set of tiles for all
    ("gated_linear_fwd", 4): (Tile(64, 64, 16, 8, 3, subtiles=2), _FP32_ELEMENT, *_FP32_SKINNY),
    ("linear_act_fwd", 4): (Tile(64, 64, 16, 8, 3), _FP32_ELEMENT, *_FP32_SKINNY),
    ("gated_linear_bwd", 4): (Tile(64, 64, 32, 8, 3, subtiles=4), _FP32_ELEMENT),
    ("linear_act_bwd", 4): (Tile(64, 64, 32, 8, 3, subtiles=4), _FP32_ELEMENT),
    ("masked_gated_linear_fwd", 4): (Tile(64, 64, 16, 8, 3), _FP32_ELEMENT, *_FP32_SKINNY),
    ("masked_gated_linear_fwd_group", 4): (
        Tile(32, 64, 16, 8, 3),
        Tile(32, 32, 16, 8, 2, loads="element"),
        Tile(16, 32, 16, 4, 3),
        Tile(16, 16, 16, 4, 2, loads="element"),
    ),
    ("masked_gated_linear_dx", 4): (Tile(64, 64, 16, 8, 3), _FP32_ELEMENT),
    ("masked_gated_linear_dw", 4): (Tile(64, 32, 16, 8, 3), _FP32_ELEMENT),
}
# Of the experts' GEMMs, the tile is chosen by the rows that an expert has, hence a tile for few.
_MOE_FEW = (Tile(32, 64, 64, 4, 4), Tile(16, 64, 64, 4, 4))
_MOE_WGRAD = {("moe_wgrad", 2): (Tile(128, 128, 32, 8, 5), Tile(64, 64, 32, 4, 5), _ELEMENT)}
_MOE_MMA = {
    ("moe_up", 2): (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 4), *_MOE_FEW, _ELEMENT),
    ("moe_down", 2): (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), *_MOE_FEW, _ELEMENT),
    ("moe_dh", 2): (
        Tile(128, 128, 32, 8, 4, subtiles=4),
        Tile(64, 64, 32, 4, 4, subtiles=2),
        *_MOE_FEW,
        _ELEMENT,
    ),
    ("masked_gated_linear_fwd", 2): (
        Tile(128, 64, 32, 8, 4),
        Tile(64, 64, 32, 4, 4),
        _ELEMENT,
        *_SKINNY,
    ),
    ("masked_gated_linear_fwd_group", 2): (
        Tile(128, 32, 32, 8, 4),
        _MASKED_ELEMENT,
        *_MASKED_SKINNY,
    ),
    ("masked_gated_linear_dx", 2): (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), _ELEMENT),
    ("masked_gated_linear_dw", 2): (
        Tile(128, 64, 32, 8, 4, subtiles=2),
        Tile(64, 64, 32, 4, 4, subtiles=2),
        _ELEMENT,
    ),
}
_MMA = (
    _MOE_MMA
    | _MOE_WGRAD
    | {  # mma.sync, 100 KB of shared memory: sm_80, 86, 89, 120
        ("gated_linear_fwd", 2): (
            Tile(128, 64, 32, 8, 4),
            Tile(64, 64, 32, 4, 4),
            _ELEMENT,
            *_SKINNY,
        ),
        ("linear_act_fwd", 2): (
            Tile(128, 128, 32, 8, 4),
            Tile(64, 64, 32, 4, 4),
            _ELEMENT,
            *_SKINNY,
        ),
        ("gated_linear_bwd", 2): (
            Tile(128, 128, 32, 8, 4, subtiles=4),
            Tile(64, 64, 32, 4, 4, subtiles=2),
            _ELEMENT,
        ),
        ("linear_act_bwd", 2): (
            Tile(128, 128, 32, 8, 4, subtiles=4),
            Tile(64, 64, 32, 4, 4, subtiles=2),
            _ELEMENT,
        ),
    }
)
_MOE_FEW_TMA = tuple(dataclasses.replace(tile, loads="tma") for tile in _MOE_FEW)
_MOE_TMA = {  # weights by TMA, and rows in expert order; gathered rows by 16-byte loads
    ("moe_up", 2): (
        # Two subtiles spill under Triton 3.6 with an activation that takes an erf.
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=4, loads="tma"),
        *_MOE_FEW_TMA,
        _ELEMENT,
    ),
    ("moe_down", 2): (
        Tile(128, 256, 64, 8, 3, subtiles=4, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=2, loads="tma"),
        *_MOE_FEW_TMA,
        _ELEMENT,
    ),
    ("moe_dh", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=4, loads="tma"),
        *_MOE_FEW_TMA,
        _ELEMENT,
    ),
    # Its depth is an expert's rows: TMA would read those of the next into the sum.
    ("moe_wgrad", 2): (
        Tile(128, 256, 64, 8, 3, subtiles=4),
        Tile(64, 128, 64, 4, 4, subtiles=2),
        _ELEMENT,
    ),
}
_TMA = _MOE_TMA | {  # wgmma on sm_90, tcgen05 on sm_100
    ("gated_linear_fwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=2, loads="tma"),
        _ELEMENT,
        *_SKINNY,
    ),
    ("linear_act_fwd", 2): (
        Tile(128, 256, 64, 8, 3, subtiles=4, loads="tma"),
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=2, loads="tma"),
        _ELEMENT,
        *_SKINNY,
    ),
    ("gated_linear_bwd", 2): (
        # 128x256 spills: its accumulator takes 128 of 255 registers, the dGLU epilogue the rest.
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=4, loads="tma"),
        _ELEMENT,
    ),
    ("linear_act_bwd", 2): (
        Tile(128, 256, 64, 8, 3, subtiles=8, loads="tma"),
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=4, loads="tma"),
        _ELEMENT,
    ),
    ("masked_gated_linear_fwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=4, loads="tma"),
        _ELEMENT,
        *_SKINNY,
    ),
    ("masked_gated_linear_fwd_group", 2): (
        Tile(128, 32, 64, 8, 4, loads="tma"),
        _MASKED_ELEMENT,
        *_MASKED_SKINNY,
    ),
    ("masked_gated_linear_dx", 2): (
        Tile(128, 128, 64, 8, 4, loads="tma"),
        Tile(64, 128, 64, 4, 4, loads="tma"),
        _ELEMENT,
    ),
    ("masked_gated_linear_dw", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        _ELEMENT,
    ),
}
_INTERPRETED_SKINNY = (Tile(16, 32, 16, 4, 2), Tile(16, 32, 16, 4, 2, loads="element"))
_MOE_INTERPRETED = {
    (kernel, size): (
        Tile(
            32,
            32,
            32,
            4,
            2,
            subtiles=2,
            loads="vector" if kernel == "moe_wgrad" else "tma",
            group_m=2,
        ),
        Tile(16, 32, 32, 4, 2, loads="vector" if kernel == "moe_wgrad" else "tma", group_m=2),
        Tile(32, 32, 32, 4, 2, subtiles=2, loads="element", group_m=2),
    )
    for kernel in ("moe_up", "moe_down", "moe_dh", "moe_wgrad")
    for size in (2, 4)
} | {
    (kernel, size): (
        Tile(32, 64, 32, 4, 2, subtiles=2, loads="tma", group_m=2),
        Tile(32, 64, 32, 4, 2, subtiles=2, loads="element", group_m=2),
        *(_INTERPRETED_SKINNY if "_fwd" in kernel else ()),
    )
    for kernel in (
        "masked_gated_linear_fwd",
        "masked_gated_linear_fwd_group",
        "masked_gated_linear_dx",
        "masked_gated_linear_dw",
    )
    for size in (2, 4)
}
_INTERPRETED = (
    _MOE_INTERPRETED
    | {  # small, so that small inputs cross several tiles, K steps and ragged edges
        (kernel, size): (
            Tile(32, 32, 32, 4, 2, subtiles=subtiles, loads="tma", group_m=2),
            Tile(32, 32, 32, 4, 2, subtiles=subtiles, loads="element", group_m=2),
            *(_INTERPRETED_SKINNY if kernel.endswith("_fwd") else ()),
        )
        for kernel, subtiles in (
            ("gated_linear_fwd", 2),
            ("linear_act_fwd", 1),
            ("gated_linear_bwd", 4),
            ("linear_act_bwd", 2),
        )
        for size in (2, 4)
    }
)

# Of one-bit weights: block_k (of dx and dh: block_n) lies in one group of 128. The ds tile's
# columns are a group.
_BINARY_FWD = ("binary_linear_fwd", "binary_gated_linear_fwd")
_BINARY_BWD = ("binary_linear_dx", "binary_gated_mlp_bwd")
_BINARY_SKINNY = (Tile(16, 64, 128, 4, 3), Tile(16, 32, 32, 4, 2, loads="element"))
_BINARY_FP32_SKINNY = (Tile(16, 32, 32, 4, 3), Tile(16, 32, 32, 4, 2, loads="element"))
_BINARY_FP32 = {
    ("binary_linear_fwd", 4): (
        Tile(32, 32, 32, 8, 3),
        Tile(32, 32, 32, 8, 2, loads="element"),
        *_BINARY_FP32_SKINNY,
    ),
    ("binary_gated_linear_fwd", 4): (
        Tile(32, 32, 32, 8, 3),
        Tile(32, 16, 32, 8, 2, loads="element"),
        *_BINARY_FP32_SKINNY,
    ),
    **{
        (kernel, 4): (
            Tile(64, 64, 32, 8, 3, subtiles=2),
            Tile(32, 32, 32, 8, 2, loads="element"),
        )
        for kernel in _BINARY_BWD
    },
    ("binary_linear_ds", 4): (
        Tile(32, 128, 16, 4, 3, subtiles=2),
        Tile(32, 128, 16, 8, 2, subtiles=2, loads="element"),
    ),
}
_BINARY_ELEMENT = Tile(64, 32, 32, 4, 2, loads="element")
_BINARY_DH_ELEMENT = Tile(64, 32, 32, 8, 2, loads="element")
_BINARY_DS_ELEMENT = Tile(32, 128, 16, 4, 2, subtiles=2, loads="element")
_BINARY_MMA = {
    ("binary_linear_fwd", 2): (Tile(128, 128, 64, 8, 3), _BINARY_ELEMENT, *_BINARY_SKINNY),
    ("binary_gated_linear_fwd", 2): (Tile(128, 64, 64, 8, 3), _BINARY_ELEMENT, *_BINARY_SKINNY),
    ("binary_linear_dx", 2): (Tile(128, 128, 64, 8, 3), _BINARY_ELEMENT),
    ("binary_gated_mlp_bwd", 2): (Tile(128, 128, 64, 8, 3, subtiles=4), _BINARY_DH_ELEMENT),
    ("binary_linear_ds", 2): (Tile(64, 128, 32, 8, 4, subtiles=2), _BINARY_DS_ELEMENT),
}
_BINARY_TMA = {
    ("binary_linear_fwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        _BINARY_ELEMENT,
        *_BINARY_SKINNY,
    ),
    ("binary_gated_linear_fwd", 2): (
        Tile(128, 64, 64, 8, 4, loads="tma"),
        _BINARY_ELEMENT,
        *_BINARY_SKINNY,
    ),
    ("binary_linear_dx", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        _BINARY_ELEMENT,
    ),
    ("binary_gated_mlp_bwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        _BINARY_DH_ELEMENT,
    ),
    ("binary_linear_ds", 2): (
        Tile(64, 128, 64, 4, 4, subtiles=2, loads="tma"),
        _BINARY_DS_ELEMENT,
    ),
}
_BINARY_INTERPRETED = {
    (kernel, size): (
        Tile(32, 128, 128, 4, 2, subtiles=2, loads="tma", group_m=2),
        Tile(32, 64, 64, 4, 2, subtiles=2, loads="element", group_m=2),
        *(
            (Tile(16, 64, 64, 4, 2), Tile(16, 64, 64, 4, 2, loads="element"))
            if kernel in _BINARY_FWD
            else ()
        ),
    )
    for kernel in (*_BINARY_FWD, *_BINARY_BWD)
    for size in (2, 4)
} | {
    ("binary_linear_ds", size): tuple(
        Tile(64, 128, 32, 4, 2, subtiles=2, loads=loads, group_m=2) for loads in ("tma", "element")
    )
    for size in (2, 4)
}


def _hyper(rows: int, width: int, warps: int, values: int) -> Tile:
    """A square tile of scores: block_k columns of q and k at a time, block_n of v in an
    accumulator."""
    return Tile(rows, values, width, warps, 1, loads="element")


# (kernel, bytes of an element) -> tile of hyper_attention's passes; strides are free everywhere.
# Fewer rows where more would spill under Triton 3.6: 3.9 has room for 64 in dslots on sm_90 and
# sm_100, and for 32 in dq. No GPU has timed them.
_HYPER_FP32: Tiles = {
    (f"hyper_attention_{k}", 4): (_hyper(16, 32, 4, 64),)
    for k in ("h1", "h2", "out", "dz2", "dz1", "dq", "dk", "dv", "dslots")
}
# Of a step of decoding: the fewest sources of a block, how many values of each it loads at once
# (more sources where rows are short), and the most columns.
_HYPER_STEP: Tiles = {
    ("hyper_attention_step", size): (Tile(64, 128, 64, 4, 1, loads="element"),) for size in (2, 4)
}
_HYPER_SMALL = {
    ("hyper_attention_dq", 2): _hyper(16, 64, 4, 128),
    ("hyper_attention_dslots", 2): _hyper(16, 64, 8, 128),
}
_HYPER_MMA: Tiles = {
    **_HYPER_STEP,
    **_HYPER_FP32,
    **{key: (tile,) for key, tile in _HYPER_SMALL.items()},
    **{
        (f"hyper_attention_{k}", 2): (_hyper(32, 64, 8, 128),)
        for k in ("h2", "out", "dz1", "dk", "dv")
    },
    **{(f"hyper_attention_{k}", 2): (_hyper(64, 64, 8, 128),) for k in ("h1", "dz2")},
}
_HYPER_TMA: Tiles = {
    **_HYPER_STEP,
    **_HYPER_FP32,
    **{key: (tile,) for key, tile in _HYPER_SMALL.items()},
    **{(f"hyper_attention_{k}", 2): (_hyper(64, 64, 8, 128),) for k in ("h1", "h2", "dz2", "dz1")},
    **{(f"hyper_attention_{k}", 2): (_hyper(32, 64, 8, 128),) for k in ("out", "dk", "dv")},
}
_INTERPRETED_HYPER = {key: (_hyper(32, 16, 4, 16),) for key in _HYPER_MMA}

ARCHES: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 80, 166_912, False, _MMA | _FP32 | _BINARY_MMA | _BINARY_FP32, _HYPER_MMA),
        Arch("sm_86", 86, 101_376, False, _MMA | _FP32 | _BINARY_MMA | _BINARY_FP32, _HYPER_MMA),
        Arch("sm_90", 90, 232_448, True, _TMA | _FP32 | _BINARY_TMA | _BINARY_FP32, _HYPER_TMA),
        Arch("sm_100", 100, 232_448, True, _TMA | _FP32 | _BINARY_TMA | _BINARY_FP32, _HYPER_TMA),
        Arch("sm_120", 120, 101_376, False, _MMA | _FP32 | _BINARY_MMA | _BINARY_FP32, _HYPER_MMA),
    )
}
INTERPRETER = Arch(
    "interpreter", 0, 1 << 30, True, _INTERPRETED | _BINARY_INTERPRETED, _INTERPRETED_HYPER
)

# kernel -> what it was last launched with, for explain().
LAST: dict[str, Tile] = {}


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _arch_of_gpu(index: int) -> Arch:
    capability = _capability(index)
    older = [a for a in ARCHES.values() if a.capability <= capability]
    if not older:
        raise RuntimeError(
            "fusedmlp: Triton kernels need compute capability 8.0 or newer, got "
            f"{capability / 10} ({torch.cuda.get_device_name(index)}); use backend('reference')"
        )
    return max(older, key=lambda a: a.capability)


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). triton.cdiv on the host costs 9 us a call."""
    return -(-a // b)


# What `pretend` put in place of the real device: (row, multiprocessors).
_pretended: tuple[Arch, int] | None = None


@contextmanager
def pretend(arch: Arch, multiprocessors: int) -> Iterator[None]:
    """Inside, every tensor is taken to lie on such a GPU: how launches are planned for a GPU that
    is not there, or with another table of tiles."""
    global _pretended
    previous, _pretended = _pretended, (arch, multiprocessors)
    try:
        yield
    finally:
        _pretended = previous


def arch_of(device: torch.device) -> Arch:
    """The row that serves `device`: the newest not newer than it; CPU tensors get INTERPRETER."""
    if _pretended:
        return _pretended[0]
    if device.type == "cpu":
        return INTERPRETER
    return _arch_of_gpu(_index(device))


def capability_of(device: torch.device) -> int:
    """10 * major + minor of the GPU itself, which may be newer than its row; 0 for a CPU."""
    if _pretended:
        return _pretended[0].capability
    return 0 if device.type == "cpu" else _capability(_index(device))


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side; 3 in the interpreter, so that persistent loops do loop."""
    if _pretended:
        return _pretended[1]
    if device.type == "cpu":
        return 3
    return _multiprocessors(_index(device))


def pick_tile(kernel: str, x: Any, M: int, N: int, aligned: bool) -> Tile:
    """The tile for an (M, N) result from rows like `x`: skinny up to SKINNY_M rows, else the first
    that gives every multiprocessor a tile, else the smallest. `aligned`: what tiles.aligned says of
    the operands; without it only element loads serve."""
    arch = arch_of(x.device)
    return _pick(arch, kernel, x.element_size(), M, N, aligned, multiprocessors(x.device))


@functools.lru_cache(4096)
def _pick(
    arch: Arch, kernel: str, size: int, M: int, N: int, aligned: bool, multiprocessors: int
) -> Tile:
    usable = [t for t in arch.tiles[kernel, size] if (t.loads != "element") == aligned]
    fitting = [t for t in usable if t.skinny] if M <= SKINNY_M else []
    fitting = fitting or [t for t in usable if not t.skinny]
    return next(
        (t for t in fitting if cdiv(M, t.block_m) * cdiv(N, t.block_n) >= multiprocessors),
        fitting[-1],
    )


def pick_grouped_tile(kernel: str, x: Any, T: int, groups: int, aligned: bool) -> Tile:
    """The tile for T rows in groups of their own: the smallest that holds a group's rows if all
    have as many, else the largest. A larger one multiplies rows that are not there."""
    rows = cdiv(T, max(groups, 1))
    return _pick_grouped(arch_of(x.device), kernel, x.element_size(), rows, aligned)


@functools.lru_cache(4096)
def _pick_grouped(arch: Arch, kernel: str, size: int, rows: int, aligned: bool) -> Tile:
    usable = [t for t in arch.tiles[kernel, size] if (t.loads != "element") == aligned]
    usable.sort(key=lambda t: t.block_m)
    return next((t for t in usable if t.block_m >= rows), usable[-1])


def pick_splits(tile: Tile, x: Any, N: int, K: int) -> int:
    """Into how many parts K is cut for a skinny GEMM: four blocks a multiprocessor, four K steps a
    part."""
    blocks = cdiv(N, tile.block_n)
    wanted = cdiv(4 * multiprocessors(x.device), blocks)
    return max(1, min(wanted, K // (4 * tile.block_k)))


def hyper_tile(kernel: str, x: Any) -> Tile:
    """The tile of one of hyper_attention's passes, or of its step."""
    return arch_of(x.device).hyper[kernel, x.element_size()][0]
