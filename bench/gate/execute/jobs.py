"""What is executed: every tile of every table by its launcher, every Case by its public
function."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .... import ops, reference  # noqa: F401  (ops enter their kernels' rows)
from ....backends.op import KERNELS
from ....kernels.arch import ARCHES, Arch
from ....kernels.arch.tile import Tile
from ....kernels.launch import Launch, draw
from ....ops.tree_path import tree_path
from ....reference.activations import ACTIVATIONS
from ....testing import CASES, Case, doubled
from ....testing.case import evaluate, with_rounding, yardsticks
from ..kernels import distinct

__all__ = ["SHAPES", "Job", "jobs_of", "rows_with_tensor_cores"]

# Off every block, with several tiles in each direction and several trips of the persistent loop on
# three multiprocessors; rows on 16 bytes, which real models have, and rows that are not.
ALIGNED, RAGGED = (176, 208, 272), (131, 67, 101)
FEW = 13
DTYPES = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,)}  # by an element's bytes


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to execute on one architecture.

    covers: the rows of the tile tables that it runs, with the tile that serves each; of a Case its
    name, and "chosen" where the tables choose. what: the variant. prepare: makes the inputs, and
    says what runs on them and what must come out.
    """

    covers: tuple[tuple[str, str], ...]
    arch: Arch
    dtype: torch.dtype
    what: str
    prepare: Callable[[], Prepared]
    brief: bool = False

    @property
    def name(self) -> str:
        (kernel, tile), *more = self.covers
        several = f" and {len(more)} more" if more else ""
        return f"{self.arch.name} {kernel}{several} {str(self.dtype)[6:]} {self.what} {tile}"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """run: everything that is computed on the GPU. known: result -> (exact, eager, rounding)."""

    run: Callable[[], Mapping[str, Tensor]]
    known: Mapping[str, tuple[Tensor, Tensor, Any]]


def rows_with_tensor_cores() -> list[Arch]:
    """Rows of kernels/arch, but for those that resemble an older one."""
    return list(distinct(ARCHES.values()))


# ---- tiles


def _sizes(tile: Tile) -> tuple[int, int, int]:
    ragged = tile.loads == "element"
    if not tile.skinny:
        return RAGGED if ragged else ALIGNED
    parts = 8 * tile.block_k  # of K: deep enough to be cut
    return (FEW, parts + 5, 67) if ragged else (FEW, parts + 16, 80)


def _prepared_tile(launch: Launch, size: tuple[int, ...], dtype: torch.dtype) -> Prepared:
    assert launch.call is not None and launch.reference is not None
    operands = draw(launch, size, dtype, torch.device("cpu"))
    exact = functools.partial(launch.reference, doubled(operands))
    known = with_rounding(exact, launch.reference(operands), dtype)
    return Prepared(functools.partial(launch.call, operands, True), known)


def _tile_jobs(arch: Arch) -> Iterator[Job]:
    """Each tile of the tables once. Where a table has one tile for each of a call's kernels, as
    hyper_attention's, one call is enough for all of them."""
    launches = {
        launch.name: launch
        for kernel in KERNELS.values()
        for launch in kernel.launches
        if launch.reference is not None
    }
    together: dict[tuple[object, int], list[tuple[str, str]]] = {}
    for (name, size), tiles in arch.hyper.items():
        assert len(tiles) == 1, f"{name} has several tiles: a call for each is needed"
        together.setdefault((launches[name].call, size), []).append((name, str(tiles[0])))
    for (_, size), covers in together.items():
        launch = launches[covers[0][0]]
        for dtype in DTYPES[size]:
            prepare = functools.partial(_prepared_tile, launch, launch.checked, dtype)
            yield Job(tuple(covers), arch, dtype, "tile", prepare, brief=dtype == torch.bfloat16)
    for (name, size), tiles in arch.tiles.items():
        launch, kinds = launches[name], set()
        for tile in tiles:
            kind = (tile.loads, tile.skinny, tile.few)
            for dtype in DTYPES[size]:
                yield Job(
                    ((name, str(tile)),), arch.with_row(name, size, (tile,)), dtype, "tile",
                    functools.partial(_prepared_tile, launch, _sizes(tile), dtype),
                    brief=dtype == torch.bfloat16 and kind not in kinds,
                )  # fmt: skip
            kinds.add(kind)


# ---- cases


Inputs = dict[str, Tensor]


def _as_drawn(inputs: Inputs) -> Inputs:
    return inputs


def _strided(inputs: Inputs) -> Inputs:
    """Every tensor a part of a wider one: its rows are further apart than they are long."""

    def widened(t: Tensor) -> Tensor:
        wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 8)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]

    return {n: widened(t) if t.dim() > 1 else t for n, t in inputs.items()}


def _transposed(inputs: Inputs) -> Inputs:
    """Matrices of weights lie column by column."""

    def turned(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    return {n: turned(t) if n.startswith("w") and t.dim() > 1 else t for n, t in inputs.items()}


def _bad_rows(inputs: Inputs) -> Inputs:
    """NaN and Inf in one row each of the first input: no other row may know of it."""
    name = next(n for n, t in inputs.items() if t.is_floating_point())
    bad = inputs[name].clone()
    if bad.dim() == 2 and bad.shape[0] > 3:
        bad[1, -1], bad[3, 0] = float("nan"), float("inf")
    return {**inputs, name: bad}


@dataclasses.dataclass(frozen=True)
class Variant:
    """How Cases are called: at which size, on which strides or values. hyper: the size for
    hyper_attention; None where it has none, for its Cases take no tokens for one to decode."""

    shape: tuple[int, int, int]
    hyper: tuple[int, int, int] | None
    change: Callable[[Inputs], Inputs] = _as_drawn
    backward: bool = True


SHAPES: dict[str, Variant] = {
    "aligned": Variant((48, 80, 112), (48, 32, 16)),
    "ragged": Variant((37, 51, 43), (37, 36, 5)),
    "no rows": Variant((0, 80, 112), None),
    "one row": Variant((1, 80, 112), (1, 32, 16)),
    "few rows": Variant((13, 80, 112), (13, 32, 16)),
    "strided": Variant((48, 80, 112), (48, 32, 16), _strided),
    "transposed": Variant((48, 80, 112), (48, 32, 16), _transposed),
    "bad rows": Variant((48, 80, 112), (48, 32, 16), _bad_rows, False),
}


def _shape(case: Case, variant: Variant) -> tuple[int, int, int] | None:
    return variant.hyper if case.op.startswith("hyper") else variant.shape


def _prepared_case(case: Case, variant: Variant, dtype: torch.dtype) -> Prepared:
    shape = _shape(case, variant)
    assert shape is not None
    drawn = case.inputs(*shape, dtype)
    # Weights of bits and their like have a layout of their own, which the ops ask for.
    changed = variant.change({n: t for n, t in drawn.items() if n not in case.draws})
    inputs = {n: changed.get(n, t) for n, t in drawn.items()}
    dy = None
    with torch.no_grad():
        out = case.run_reference(inputs)
    if variant.backward and not case.forward_only:
        generator = torch.Generator().manual_seed(1)
        dy = (2 * torch.rand(out.shape, generator=generator) - 1).to(out)
    known = yardsticks(case.run_reference, inputs, dy)
    return Prepared(lambda: evaluate(case.run, inputs, dy), known)


def _case_jobs(arch: Arch) -> Iterator[Job]:
    for case in CASES.values():
        for what, variant in SHAPES.items():
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                first = dtype == torch.bfloat16
                if not first and what not in ("aligned", "ragged"):
                    continue
                if _shape(case, variant) is None:
                    continue
                yield Job(
                    ((case.name, "chosen"),), arch, dtype, what,
                    functools.partial(_prepared_case, case, variant, dtype),
                    brief=first and what == "aligned" and arch.thorough,
                )  # fmt: skip


# ---- activations


# One with all that a row can have, for the first gated Case of each op, whose epilogues differ;
# every row in gated_act, for a row's device function is one in all kernels.
GATE = "swiglu_oai"


def _activation_jobs(arch: Arch) -> Iterator[Job]:
    firsts = {case.op: case for case in reversed(CASES.values()) if _takes_gate(case)}
    asked = [(case, GATE) for case in firsts.values()]
    asked += [(CASES["gated_act"], name) for name in ACTIVATIONS if name not in ("silu", GATE)]
    for case, name in asked:
        variant = SHAPES["ragged"]
        prepare = functools.partial(
            _prepared_case, case.with_activation(name), variant, torch.bfloat16
        )
        brief = name == GATE and arch.thorough
        yield Job(((case.name, "chosen"),), arch, torch.bfloat16, name, prepare, brief)


def _takes_gate(case: Case) -> bool:
    return case.gated and "activation" in inspect.signature(case.fn).parameters


# ---- what has neither: its result is no floating number


DEPTH = 6


def _prepared_path(dtype: torch.dtype) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.rand((37, 2**DEPTH - 1), generator=generator) - 1).to(dtype)
    logits[3], logits[5] = 0, float("nan")
    path = reference.tree_path(logits, DEPTH).double()
    # As numbers of float64, in which the rule leaves a path no room to differ.
    run = lambda: {"path": tree_path(logits, depth=DEPTH).double()}  # noqa: E731
    return Prepared(run, {"path": (path, path, None)})


def _path_jobs(arch: Arch) -> Iterator[Job]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield Job(
            (("tree_path", "chosen"),), arch, dtype, "ragged",
            functools.partial(_prepared_path, dtype),
            brief=dtype == torch.bfloat16 and arch.thorough,
        )  # fmt: skip


def jobs_of(arch: Arch) -> Iterator[Job]:
    """All that is executed for one row of kernels/arch, in an order that does not change."""
    yield from _tile_jobs(arch)
    yield from _case_jobs(arch)
    yield from _activation_jobs(arch)
    yield from _path_jobs(arch)
