"""Importing this adds a generation to the table: what a newcomer's new row would be."""

from fusedmlp.kernels.arch import ARCHES, Arch, arch_for
from fusedmlp.kernels.arch.roof import Roof

LIKE = arch_for(86)
ROOF = Roof("Made Up", 100, 1e12, dict.fromkeys(("bfloat16", "float16", "float32"), 1e14))
ROW = Arch(
    "made_up", 89, LIKE.mma, LIKE.shared_memory, LIKE.threads, LIKE.tiles, LIKE.hyper, (ROOF,)
)
ARCHES[ROW.name] = ROW
