"""Batch invariance, asked for or not: `batch_invariant()`, and what the package reads of it.

The promise and its limits are on docs/batch_invariance.md. Who keeps it:

| | |
|---|---|
| kernels/pick.py | tiles as for ROWS rows, however many there are |
| kernels/plans.py | the mode is in a launch plan's key |
| backends/library.py | rows laid out by their width alone; the mode in compiled code |
| backends/derivatives.py | backward runs in the mode of its forward |
| ops/linear_act.py | products that are PyTorch's elsewhere |
| reference/rows.py | the formulas on a CPU, by parts of one size |
"""

from __future__ import annotations

import os
import threading
from contextlib import ContextDecorator


def _asked() -> bool:
    value = os.environ.get("FUSEDMLP_BATCH_INVARIANT", "0")
    if value not in ("0", "1"):
        raise ValueError(f"FUSEDMLP_BATCH_INVARIANT must be 0 or 1, got {value!r}")
    return value == "1"


class _State(threading.local):
    def __init__(self) -> None:
        self.on = _asked()


STATE = _State()


def invariant() -> bool:
    """Is batch invariance asked for in this thread?"""
    return STATE.on


class batch_invariant(ContextDecorator):  # noqa: N801 - it is used like a function
    """Inside, in this thread, a row's result and its gradient with respect to x are the same bits
    alone and in any batch. In a `with`, or as a decorator; `batch_invariant(False)` takes it back.

    Backward runs in the mode of its forward, wherever it is called. The environment variable
    FUSEDMLP_BATCH_INVARIANT=1 asks for it in every thread. docs/batch_invariance.md says what is
    promised, across what, and what it costs. Raises TypeError for an `on` that is no bool.

    Examples:
        >>> import torch, fusedmlp
        >>> x, w_in, w_out = torch.randn(33, 64), torch.randn(128, 64), torch.randn(64, 128)
        >>> with fusedmlp.batch_invariant():
        ...     alone, among = fusedmlp.mlp(x[5:6], w_in, w_out), fusedmlp.mlp(x, w_in, w_out)
        >>> torch.equal(alone[0], among[5])
        True
    """

    def __init__(self, on: bool = True) -> None:
        if not isinstance(on, bool):
            raise TypeError(f"batch_invariant: on must be True or False, got {on!r}")
        self._on = on

    def __enter__(self) -> None:
        self._previous, STATE.on = STATE.on, self._on

    def __exit__(self, *_: object) -> None:
        STATE.on = self._previous

    def _recreate_cm(self) -> batch_invariant:
        return type(self)(self._on)
