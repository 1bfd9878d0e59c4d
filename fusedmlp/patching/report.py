"""What patch() did, module by module."""

from __future__ import annotations

from dataclasses import dataclass

LOOKED_FOR = (
    "modules that compute down(act(gate(x)) * up(x)) or down(act(first(x))) with nn.Linear or "
    "Conv1D projections, gate and up apart or in one, whatever their names; experts of "
    "transformers (its table, Switch, Llama 4); and classes given to register_patch()"
)


@dataclass(frozen=True)
class Entry:
    """One module: patched with `op` on `backend`, or left (op None) for the reason in `detail`.
    `partly`: fused as far as its projections, which are called, allow; `detail` says why.
    `spared`: bytes a token that recompute=True does not save for backward. `slow`: a sentence for
    each width or stride that keeps its kernels off fast loads. `elsewhere`: what would run it on
    a GPU, where a CPU's reference is `backend`."""

    name: str
    kind: str
    op: str | None
    backend: str | None
    detail: str
    partly: bool = False
    spared: int = 0
    slow: tuple[str, ...] = ()
    elsewhere: str | None = None

    def __str__(self) -> str:
        where = f"{self.name or 'the model'} ({self.kind})"
        if self.op is None:
            return f"{where}: left, {self.detail}"
        bytes_ = f" ({self.spared:,} bytes)" if self.spared else ""
        runs = f"on {self.backend}"
        if self.elsewhere is not None:
            runs = f"on CUDA: {self.elsewhere}; here: {self.backend}"
        own = f"{where}: {self.op} {runs}, {self.detail}{bytes_}"
        return "; ".join((own, *self.slow))


@dataclass(frozen=True)
class Quantized:
    """One MLP: bytes of its parameters and buffers, before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantised, and bytes: of the MLPs and of the whole model, before and after; and what
    was left, an entry with the reason for each.

    Examples:
        >>> from fusedmlp import QuantizationReport
        >>> print(QuantizationReport("q1_0", (), model_before=0, model_after=0))
        no further MLP in q1_0
    """

    format: str
    layers: tuple[Quantized, ...]
    model_before: int
    model_after: int
    left: tuple[Entry, ...] = ()

    @property
    def before(self) -> int:
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        return sum(layer.after for layer in self.layers)

    def __str__(self) -> str:
        head = f"no further MLP in {self.format}"
        if self.layers:
            head = (
                f"{len(self.layers)} MLPs in {self.format}: {_mib(self.before)} -> "
                f"{_mib(self.after)} ({self.before / self.after:.1f} times smaller); the model "
                f"{_mib(self.model_before)} -> {_mib(self.model_after)}"
            )
        return "\n".join([head, *(f"not in {self.format}: {entry}" for entry in self.left)])


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


@dataclass(frozen=True)
class Report:
    """What patch() did, a tuple of entries each; str() has a line for each. `patched`: fused, whole
    or in part; `left`: not fused, whole or in part; `partly`: what is among both.
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
        return tuple(e for e in self.entries if e.op is None or e.partly)

    @property
    def partly(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.partly)

    def __str__(self) -> str:
        if not self.patched and self.quantized is None:
            head = f"nothing was patched; looked for {LOOKED_FOR}"
        else:
            part = f" ({len(self.partly)} in part)" if self.partly else ""
            whole = len(self.left) - len(self.partly)
            head = f"{len(self.patched)} patched{part}, {whole} left"
            if spared := sum(entry.spared for entry in self.entries):
                head += f"; {spared:,} bytes a token less are saved for backward"
        bits = [] if self.quantized is None else [str(self.quantized)]
        return "\n".join([*bits, head, *map(str, self.entries)])
