"""What patch() did, module by module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..quantize import QuantizationReport

LOOKED_FOR = (
    "modules that compute down(act(gate(x)) * up(x)) or down(act(first(x))) with nn.Linear or "
    "Conv1D projections, gate and up apart or in one, whatever their names; top-1 mixtures of "
    "experts of transformers (Switch, Llama 4); and classes given to register_patch()"
)


@dataclass(frozen=True)
class Entry:
    """One module: patched with `op` on `backend`, or left (op None) for the reason in `detail`."""

    name: str
    kind: str
    op: str | None
    backend: str | None
    detail: str

    def __str__(self) -> str:
        where = f"{self.name or 'the model'} ({self.kind})"
        if self.op is None:
            return f"{where}: left, {self.detail}"
        return f"{where}: {self.op} on {self.backend}, {self.detail}"


@dataclass(frozen=True)
class Report:
    """What patch() did: `patched` and `left`, each a tuple of entries; str() has a line for each.
    `quantized`: what was put into one-bit weights before, with its bytes, or None.

    `backend` of an entry is what runs it as things stand: on tensors like its parameters now, under
    the backend chosen now.
    """

    entries: tuple[Entry, ...]
    quantized: QuantizationReport | None = None

    @property
    def patched(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.op is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.op is None)

    def __str__(self) -> str:
        if not self.patched and self.quantized is None:
            head = f"nothing was patched; looked for {LOOKED_FOR}"
        else:
            head = f"{len(self.patched)} patched, {len(self.left)} left"
        bits = [] if self.quantized is None else [str(self.quantized)]
        return "\n".join([*bits, head, *map(str, self.entries)])
