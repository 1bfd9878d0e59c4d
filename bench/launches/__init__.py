"""The launchers with a row in the tile table, of every family: how to call each, and what it must
return."""

from __future__ import annotations

from . import (
    binary as _launches_binary,
    dense as _launches_dense,
    hyper as _launches_hyper,
    masked as _launches_masked,
    moe as _launches_moe,
)
from .launch import Launch, draw

__all__ = ["LAUNCHES", "draw"]

LAUNCHES: dict[str, Launch] = {
    **_launches_moe.LAUNCHES,
    **_launches_dense.LAUNCHES,
    **_launches_binary.LAUNCHES,
    **_launches_hyper.LAUNCHES,
    **_launches_masked.LAUNCHES,
}
