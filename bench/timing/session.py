"""The rounds: each piece of work with everyone who can do it, and cuBLAS beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...testing import CASES
from .. import machine
from ..check import check_one, unchecked
from ..lost import not_run, why_lost
from ..options import Emit, Record
from ..rivals import RIVALS, Fusedmlp, Rival
from ..shapes import DEFAULT_TOKENS, MODELS, cases_of
from ..work import ALL_CASES, DGLU, PHASES, Work, activations_of, case_of
from .calls import calls_of, checked, disagreement, rotated
from .clock import Call, CaptureFailed, Sampler, Timer, clock_range, note_clock
from .passed import about, passed
from .record import Peaks, failure, record_of
from .stats import interleave, summarize

# (D, H, model): where fusing gains least, and where most.
Width = tuple[int, int, "str | None"]
DEFAULT_WIDTHS: tuple[Width, ...] = (
    (4096, 14336, "llama3-8b"),
    (2048, 8192, "llama3.2-1b"),
)
COPY_BYTES = 1 << 29
# Below this the launches of an eager call may last as long as its kernels: everyone gets a CUDA
# graph.
GRAPH_BELOW_MS = 0.5


# One way of calling each op, the case of its name; the others differ in layout or bias, hardly in
# speed. Of an op that has no such case, whose cases differ in more, all without options.
PLAIN_CASES = tuple(
    name
    for name, case in CASES.items()
    if name == case.op or (case.op not in CASES and not case.options)
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time or predict.

    cases: None for each model's own calls. activations: None for each model's own, or the
    function's default. shapes: whole sizes, in place of widths x tokens. providers: () for all that
    serve the op, but those that want to be named. without: providers left out. keep_samples: add
    every sample to a record, as "samples_ms".
    """

    cases: tuple[str, ...] | None = PLAIN_CASES
    dtypes: tuple[str, ...] = ("bfloat16",)
    activations: tuple[str, ...] | None = None
    widths: tuple[Width, ...] = DEFAULT_WIDTHS
    tokens: tuple[int, ...] = DEFAULT_TOKENS
    shapes: tuple[tuple[int, int, int], ...] = ()
    phases: tuple[str, ...] = PHASES
    providers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    rounds: int = 20
    keep_samples: bool = False


def plan(options: Options) -> list[Work]:
    """Every piece of work that `options` names, in the order of its cases."""
    sizes: list[tuple[int, int, int, str | None]] = [(*s, None) for s in options.shapes] or [
        (M, D, H, model) for D, H, model in options.widths for M in options.tokens
    ]
    works = []
    for M, D, H, name in sizes:
        model = MODELS.get(name or "")
        own = cases_of(model) if model else PLAIN_CASES
        asked = options.activations or ((model.activation,) if model else None)
        works += [
            Work(case, activation, dtype, M, D, H, name)
            for case in map(case_of, own if options.cases is None else options.cases)
            for activation in activations_of(case, asked)
            for dtype in options.dtypes
        ]
    # --case and --op may name the same one.
    return sorted(dict.fromkeys(works), key=lambda work: list(ALL_CASES).index(work.case.name))


Key = tuple[str, str]  # provider, phase
CUBLAS = "cublas"  # the provider of a key; its phase is that of _gemm_of


@dataclasses.dataclass
class Prepared:
    """What is ready to be sampled for one piece of work, and why the rest is not. keys: in the
    order of records; graphs: whether calls are replayed from a CUDA graph."""

    keys: list[Key] = dataclasses.field(default_factory=list)
    arguments: dict[str, list[dict[str, Tensor]]] = dataclasses.field(default_factory=dict)
    graphs: dict[Key, bool] = dataclasses.field(default_factory=dict)
    samplers: dict[Key, Sampler] = dataclasses.field(default_factory=dict)
    memory: dict[Key, int] = dataclasses.field(default_factory=dict)
    reasons: dict[Key, str] = dataclasses.field(default_factory=dict)


class Session:
    """One run: the checks and the copy's peak that all its pieces of work share."""

    def __init__(self, options: Options, emit: Emit, timer: Timer) -> None:
        self.options, self.emit, self.timer = options, emit, timer
        self.copy: float | None = None
        self.clocks: list[int] = []
        # Why nothing more can be timed here; see bench/lost.py.
        self.lost: str | None = None
        self._passed = passed()
        self._checks: dict[tuple[str, Work], tuple[str, str | None]] = {}
        self._agreement: dict[tuple[str, Work], str | None] = {}

    def note_clocks(self, seen: list[int]) -> None:
        """Keep what was seen in the rounds; where that was nothing, ask nvidia-smi once."""
        now = None if seen else machine.clocks()
        self.clocks += seen if now is None else [now["sm_mhz"]]

    def check(self, rival: Rival, work: Work) -> tuple[str, str | None]:
        """(the backend that a provider of ours runs on, the reason not to time `work` on it)."""
        key = rival.name, checked(work)
        if key not in self._checks:
            with rival.in_force():
                record = unchecked(checked(work))
                known = about(record) in self._passed
                record = {**record, "passed": True} if known else check_one(checked(work))
            if not known:
                self.emit(record)
            bad = [name for name, t in record["tensors"].items() if not t["passed"]]
            why = record.get("error") or f"wrong: {', '.join(bad)}"
            failed = None if record["passed"] else f"its check failed here ({why})"
            if failed:
                self._look(work, None)
            if self.timer.device == "cuda" and record["backend"] == "reference":
                failed = "its kernels are switched off: FUSEDMLP_BACKEND is reference"
            self._checks[key] = record["backend"], failed
        return self._checks[key]

    def refusal(self, rival: Rival, work: Work, phase: str) -> str | None:
        if phase == DGLU and work.case.op != "gated_mlp":
            return f"{work.case.op} has no such GEMM"
        if phase not in rival.phases:
            return "has gradients of whole calls only"
        reason = rival.skip(work, phase)
        if reason is None and isinstance(rival, Fusedmlp):
            reason = self.check(rival, work)[1]
        return reason

    def time_copy(self) -> None:
        """The copy's peak: once, since every work's bytes are set against it."""
        generator = torch.Generator(self.timer.device).manual_seed(0)
        source = torch.randn(COPY_BYTES // 4, device=self.timer.device, generator=generator)
        target = torch.empty_like(source)
        take = self.timer.sampler([lambda: target.copy_(source)], graph=False)
        ms = summarize(interleave({"copy": take}, self.options.rounds)["copy"]).median
        self.copy = 2 * COPY_BYTES / ms / 1e6
        self.emit({
            "kind": "peak", "name": "copy", "dtype": "float32", "bytes": 2 * COPY_BYTES,
            "tflops": None, "gbps": self.copy,
        })  # fmt: skip

    def time(self, work: Work) -> None:
        """Every provider and phase of one piece of work: ours and cuBLAS alone first, which are on
        record before any baseline can harm the process; then all in rounds that interleave them."""
        serving = [
            name for name, rival in RIVALS.items()
            if not rival.by_name and (not rival.ops or work.case.op in rival.ops)
        ]  # fmt: skip
        asked = self.options.providers or serving
        names = [name for name in asked if name not in self.options.without]
        keys = [(name, phase) for name in names for phase in self.options.phases]
        ours = [key for key in keys if isinstance(RIVALS[key[0]], Fusedmlp)]
        prepared = Prepared()
        self._time(work, ours, prepared)
        if len(ours) < len(keys):
            self._time(work, [key for key in keys if key not in ours], prepared)

    def _time(self, work: Work, keys: Sequence[Key], prepared: Prepared) -> None:
        """Prepare `keys`, then sample and emit all that is prepared; `keys` alone if it fails."""
        prepared.keys += keys
        samples: dict[Key, list[float]] = {}
        seen: list[int] = []
        try:
            self._prepare_all(work, keys, prepared)
            if self.lost is None:
                after = lambda: note_clock(seen)  # noqa: E731
                samples = interleave(prepared.samplers, self.options.rounds, after)
        except Exception as error:  # arguments, cuBLAS, no memory for all at once: nobody's fault
            for key in keys:
                prepared.reasons.setdefault(key, failure(error))
            self._look(work, error)
        if self.lost is not None:
            for key in keys:
                prepared.reasons.setdefault(key, not_run(self.lost))
        self.note_clocks(seen)
        self._emit(work, samples, prepared, prepared.keys if samples else keys, clock_range(seen))

    def _look(self, work: Work, error: Exception | None) -> None:
        """Note it if whatever has just failed took the device with it."""
        if self.lost is None:
            why = str(error) if isinstance(error, CaptureFailed) else why_lost(self.timer.device)
            self.lost = why and f"{why}, at {work.case.name} {work.size}"

    def _emit(
        self,
        work: Work,
        samples: Mapping[Key, Sequence[float]],
        prepared: Prepared,
        keys: Sequence[Key],
        clocks: Record | None,
    ) -> None:
        rates = {gemm: self._cublas(work, gemm, samples.get((CUBLAS, gemm)))
                 for gemm in dict.fromkeys(map(_gemm_of, self.options.phases))}  # fmt: skip
        for key in keys:
            memory = prepared.memory.get(key) if key in samples else None
            reason = prepared.reasons.get(key)
            peaks = Peaks(rates[_gemm_of(key[1])], self.copy)
            record = record_of(work, *key, samples.get(key), memory, peaks, reason)
            # Which kernels ran, where the provider is ours; whether in a graph; at what clocks.
            record["backend"] = self._checks.get((key[0], checked(work)), (None,))[0]
            record["graph"] = prepared.graphs.get(key)
            record["sm_mhz"] = clocks
            if self.options.keep_samples:
                record["samples_ms"] = samples.get(key)
            self.emit(record)

    def _prepare_all(self, work: Work, keys: Sequence[Key], prepared: Prepared) -> None:
        """Fill `prepared` with a sampler of each key, or with why there is none; and cuBLAS."""
        gemms = list(dict.fromkeys(map(_gemm_of, self.options.phases)))
        if self.lost is not None:
            return
        if not prepared.arguments:
            for g in gemms:
                sets = rotated(work, self.timer.device, self.timer.l2_bytes, g)
                prepared.arguments[g] = sets
            for gemm in filter(work.gemm, gemms):
                prepared.samplers[CUBLAS, gemm] = self._gemm_sampler(work, gemm)
        for key in keys:
            if self.lost is not None:
                return
            rival, phase, sets = RIVALS[key[0]], key[1], prepared.arguments[_gemm_of(key[1])]
            try:
                reason = self.refusal(rival, work, phase) or self._known_to_agree(rival, work)
                if reason is None:
                    self._prepare(key, work, sets, prepared)
            except Exception as error:  # a rival's failure costs its own number only
                reason = failure(error)
                self._look(work, error)
            if reason is not None:
                prepared.reasons[key] = reason

    def _known_to_agree(self, rival: Rival, work: Work) -> str | None:
        if rival.trusted:
            return None
        key = rival.name, checked(work)
        if key not in self._agreement:
            self._agreement[key] = disagreement(rival, work, self.timer.device)
        return self._agreement[key]

    def _prepare(
        self, key: Key, work: Work, sets: Sequence[Mapping[str, Tensor]], prepared: Prepared
    ) -> None:
        rival, phase = RIVALS[key[0]], key[1]
        ms = machine.shortest_ms(work.flops(phase), work.bytes(phase), work.dtype)
        graph = ms < GRAPH_BELOW_MS and not rival.waits(work)
        with rival.preparing(phase):
            calls = calls_of(rival, work, phase, sets)
            prepared.memory[key] = self.timer.peak_bytes(calls[0])
            prepared.samplers[key] = self.timer.sampler(calls, graph)
            prepared.graphs[key] = graph

    def _gemm_sampler(self, work: Work, phase: str) -> Sampler:
        gemm = work.gemm(phase)
        assert gemm is not None
        M, N, K = gemm
        # A generator of its own: the default one belongs to whoever captures.
        generator = torch.Generator(self.timer.device).manual_seed(0)
        make = lambda *shape: torch.randn(  # noqa: E731
            shape, device=self.timer.device, dtype=work.torch_dtype, generator=generator
        )
        size = (M + N) * K * work.torch_dtype.itemsize
        # Weights as they lie in a model: rows of K, but w_down in the backward has columns of it.
        weight = lambda: make(K, N) if phase == DGLU else make(N, K).t()  # noqa: E731
        pairs = [(make(M, K), weight()) for _ in range(3 * self.timer.l2_bytes // size + 1)]
        calls: list[Call] = [lambda a=a, b=b: torch.mm(a, b) for a, b in pairs]  # type: ignore[misc]
        moved = size + M * N * work.torch_dtype.itemsize
        ms = machine.shortest_ms(2 * M * N * K, moved, work.dtype)
        return self.timer.sampler(calls, ms < GRAPH_BELOW_MS)

    def _cublas(self, work: Work, phase: str, samples: Sequence[float] | None) -> float | None:
        gemm = work.gemm(phase)
        if gemm is None or samples is None:
            return None
        M, N, K = gemm
        tflops = 2 * M * N * K / summarize(samples).median / 1e9
        self.emit({
            "kind": "peak", "name": "cublas", "dtype": work.dtype, "M": M, "N": N, "K": K,
            "tflops": tflops, "gbps": None,
        })  # fmt: skip
        return tflops


def _gemm_of(phase: str) -> str:
    """The phases that share arguments and cuBLAS's GEMM are named by one of them."""
    return DGLU if phase == DGLU else "forward"
