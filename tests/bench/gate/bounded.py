"""Bounds for the process that compiles."""

import dataclasses

from fusedmlp import ops  # noqa: F401  (its files enter their kernels' rows)
from fusedmlp.bench.gate.bound import derive, hyper, table
from fusedmlp.bench.gate.bound.row import Bound
from fusedmlp.kernels.arch import ARCHES


def fallen(arch: str, kernel: str, variant: str) -> tuple[list[str], list[Bound]]:
    """What the ratchet says of the first tile of a kernel, and what was derived."""
    tile = str(ARCHES[arch].tiles[kernel, 2][0])

    def wanted(first: Bound) -> bool:
        return (first.kernel, first.tile, first.variant) == (kernel, tile, variant)

    found = list(derive.all_bounds(ARCHES[arch], wanted))
    return table.fallen(found, table.read()), found


def forward_of_two_heads() -> tuple[list[str], list[Bound], list[Bound], dict[int, float]]:
    """What the ratchet says of hyper_attention's forward on sm_90, what was derived; its second
    kernel with half of the columns in an accumulator, so that it goes over its weights twice as
    often; and clocks of blocks by visits, of it as it is."""
    arch, second = ARCHES["sm_90"], "hyper_attention_out"
    variant = "glu, H 2"
    rows = ("hyper_attention_h1", second)
    found = list(hyper.bounds(arch, lambda b: b.variant == variant and b.kernel in rows))
    (tile,) = arch.hyper[second, 2]
    narrow = dataclasses.replace(tile, block_n=tile.block_n // 2)
    changed = dataclasses.replace(arch, hyper={**arch.hyper, (second, 2): (narrow,)})
    slower = list(hyper.bounds(changed, lambda b: b.variant == variant and b.kernel == second))
    walked = hyper.walker(arch, second, variant)
    lengths = {visits: walked((visits, False)).clocks["order"] for visits in (4, 12)}
    return table.fallen(found, table.read()), found, slower, lengths
