"""The checks that a campaign's ledger holds already: the same code need not be checked twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

# Names the ledger of the campaign that started this process: it is of this very code.
LEDGER = "FUSEDMLP_LEDGER"
_ABOUT = ("case", "activation", "dtype", "M", "D", "H", "backend", "device", "variant")


def about(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a check's record is about, without what it found."""
    return tuple(record.get(name) for name in _ABOUT)


def passed() -> frozenset[tuple[Any, ...]]:
    """What passed so far; nothing where no campaign started this process."""
    path = os.environ.get(LEDGER)
    if not path:
        return frozenset()
    with open(path, encoding="utf-8") as file:
        records = json.load(file)["records"]
    return frozenset(about(r) for r in records if r["kind"] == "check" and r["passed"])
