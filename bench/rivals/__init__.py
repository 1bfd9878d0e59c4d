"""The table of everything that is timed. A family's rivals are in a file of their own; a new one is
a class there, and its instance in that file's RIVALS."""

from __future__ import annotations

from . import (
    binary as rivals_binary,
    cuda as rivals_cuda,
    cudnn as rivals_cudnn,
    cutlass as rivals_cutlass,
    dense as rivals_dense,
    hyper as rivals_hyper,
    liger as rivals_liger,
    masked as rivals_masked,
    moe as rivals_moe,
)
from .dense import Fusedmlp, Rival

__all__ = ["RIVALS", "Fusedmlp", "Rival"]

FAMILIES = (
    rivals_dense,
    rivals_binary,
    rivals_cuda,
    rivals_cudnn,
    rivals_cutlass,
    rivals_hyper,
    rivals_liger,
    rivals_masked,
    rivals_moe,
)
RIVALS: dict[str, Rival] = {rival.name: rival for family in FAMILIES for rival in family.RIVALS}
