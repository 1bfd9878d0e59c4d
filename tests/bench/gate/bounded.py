"""Bounds for the process that compiles."""

from fusedmlp import ops  # noqa: F401  (its files enter their kernels' rows)
from fusedmlp.bench.gate.bound import derive, table
from fusedmlp.bench.gate.bound.row import Bound
from fusedmlp.kernels.arch import ARCHES


def fallen(arch: str, kernel: str, variant: str) -> tuple[list[str], list[Bound]]:
    """What the ratchet says of the first tile of a kernel, and what was derived."""
    tile = str(ARCHES[arch].tiles[kernel, 2][0])

    def wanted(first: Bound) -> bool:
        return (first.kernel, first.tile, first.variant) == (kernel, tile, variant)

    found = list(derive.all_bounds(ARCHES[arch], wanted))
    return table.fallen(found, table.read()), found
