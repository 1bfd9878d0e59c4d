"""The speeds that this library means to reach, and which time records say whether it does.

A target speaks of every size that it names: the worst of them decides. It is measured on bfloat16
and on the plain case of its op, named like the op itself, unless it names others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..shapes import MOE, Model, cases_of
from ..variants import CUDA, DEFAULT
from ..work import DGLU
from .ledger import Record
from .summary import fastest, place

Where = Callable[[Record], bool]


@dataclass(frozen=True)
class Target:
    """share: a field of the record, or "" where `over` names the baselines to beat.
    field: of the records, in which those are compared. cases: those that it is about, if not the
    plain one. provider: ours that it is about. backend: which kernels that must have run on, if it
    matters.

    Without share and over no record of schema 1 can decide, and the report says that.
    """

    op: str
    text: str
    at_least: float
    phases: tuple[str, ...] = ("forward",)
    share: str = ""
    over: tuple[str, ...] = ()
    where: Where = lambda record: True
    field: str = "median_ms"
    cases: tuple[str, ...] = ()
    provider: str = DEFAULT
    backend: str | None = None

    @property
    def decidable(self) -> bool:
        return bool(self.share or self.over)


@dataclass(frozen=True)
class Measured:
    """The worst of `sizes` records against a target."""

    value: float
    record: Record
    sizes: int


def _many(record: Record) -> bool:
    return bool(record["M"] >= 4096)


def _few(record: Record) -> bool:
    return bool(record["M"] <= 16)


def _prefill(record: Record) -> bool:
    return bool(record["M"] >= 512)


def _past_l2(record: Record) -> bool:
    """Below that a kernel lasts hardly longer than its launch."""
    return bool(record["bytes"] >= 1 << 27)


def _narrow(record: Record) -> bool:
    return bool(record["D"] <= 2048)


# Case -> the model with experts that has it, however their tokens spread.
_EXPERTS: dict[str, Model] = {case: model for model in MOE.values() for case in cases_of(model)}
_TOP8 = tuple(case for case, model in _EXPERTS.items() if model.top_k == 8)


def _dense_experts(record: Record) -> bool:
    model = _EXPERTS[record["case"]]
    assert model.experts and model.top_k
    many = record["M"] * model.top_k >= 512 * model.experts
    return bool(record["H"] >= 2048 and many) and "uniform" in record["case"]


def masks(n: int) -> str:
    return f"{n} mask{'s' * (n > 1)}"


_COMPILED = ("compile", "compile-packed")

TARGETS: tuple[Target, ...] = (
    Target("gated_linear", "forward, M >= 4096: 82% of cuBLAS (Triton)", 0.82,
           share="of_cublas", where=_many, backend="triton"),
    Target("gated_linear", "forward, M >= 4096: 92% of cuBLAS (CUDA)", 0.92,
           share="of_cublas", where=_many, provider=CUDA),
    Target("gated_linear", "forward, M >= 4096: no slower than cuBLAS + one elementwise kernel",
           1.0,
           over=("compile", "compile-packed", "liger-elementwise"), where=_many),
    Target("gated_linear", "forward, M >= 4096: no slower than QuACK", 1.0,
           over=("quack",), where=_many),
    Target("gated_linear", "forward, M <= 16: 85% of copy", 0.85, share="of_copy", where=_few),
    Target("gated_mlp", "dGLU GEMM of the backward, M >= 4096: 87% of the bare GEMM (Triton)",
           0.87, (DGLU,), share="of_cublas", where=_many, backend="triton"),
    Target("gated_mlp", "dGLU GEMM of the backward, M >= 4096: 87% of the bare GEMM (CUDA)",
           0.87, (DGLU,), share="of_cublas", where=_many, provider=CUDA),
    Target("gated_mlp", "forward and backward: no slower than QuACK", 1.0, ("both",),
           over=("quack",)),
    Target("gated_mlp", "forward and backward, D <= 2048: 1.10 x torch.compile", 1.1, ("both",),
           over=_COMPILED, where=_narrow),
    Target("gated_act", "forward and backward, past L2: 92% of copy", 0.92, ("forward", "backward"),
           share="of_copy", where=_past_l2),
    *(
        Target("masked_gated_linear", f"decode, {masks(n)}: {share:.0%} of copy", share,
               share="of_copy", where=_few, cases=(f"masked_gated_linear-{n}-bits",))
        for n, share in ((1, 0.85), (2, 0.85), (4, 0.85), (8, 0.75))
    ),
    Target("masked_gated_linear", "decode, 4096 x 14336, 1 mask: 1.5 x the best two-matrix GLU",
           1.5, over=("two-matrix-glu",), cases=("masked_gated_linear-1-bits",),
           where=lambda r: (r["M"], r["D"], r["H"]) == (1, 4096, 14336)),
    *(
        Target("masked_gated_linear",
               f"{masks(n)}, M >= 4096: within 10% of {(n + 1) / 2:g} x gated_linear's time",
               0.9 / ((n + 1) / 2), ("forward", "both"), over=("two-matrix-glu",), where=_many,
               cases=(f"masked_gated_linear-{n}",))
        for n in (1, 4)
    ),
    Target("moe_mlp", "forward, H >= 2048, 512 tokens an expert: 75% of cuBLAS", 0.75,
           share="of_cublas", where=_dense_experts, cases=tuple(_EXPERTS)),
    Target("moe_mlp", "forward and backward, the same: 65% of cuBLAS", 0.65, ("both",),
           share="of_cublas", where=_dense_experts, cases=tuple(_EXPERTS)),
    Target("moe_mlp", "forward: no slower than SonicMoE", 1.0, over=("sonicmoe",),
           cases=tuple(_EXPERTS)),
    Target("moe_mlp", "8 experts a token, forward and backward: no slower than SonicMoE", 1.0,
           ("both",), over=("sonicmoe",), cases=_TOP8),
    Target("moe_mlp", "forward: 1.3 x torch's grouped GEMMs", 1.3, over=("grouped-mm",),
           cases=tuple(_EXPERTS)),
    Target("hyper_attention", "forward: 3 x upstream's chunks under torch.compile", 3.0,
           over=("compile-chunked",), cases=("hyper_attention-layer",)),
    Target("hyper_attention", "training, T = 4096: peak memory a tenth of dense PyTorch's", 10.0,
           ("both",), over=("eager",), where=lambda r: r["M"] == 16384,
           field="peak_memory_bytes", cases=("hyper_attention-layer",)),
    Target("hyper_attention", "forward: 50% of the rate of scaled_dot_product_attention", 0.5,
           over=("sdpa",), cases=("hyper_attention-layer",)),
    Target("hyper_attention_step", "decode, past L2: 70% of copy on cache and parameter bytes",
           0.7, share="of_copy", where=_past_l2, cases=("hyper_attention_step-layer",)),
    Target("binary_linear", "decode: 80% of copy", 0.8, share="of_copy", where=_few),
    Target("binary_linear", "decode: 6 x a bfloat16 GEMV", 6.0, over=("dequantised",), where=_few),
    Target("binary_linear", "M >= 512: 75% of cuBLAS", 0.75, share="of_cublas", where=_prefill),
    Target("every op", "at most 15 us on the host above plain PyTorch", 1.0),
)  # fmt: skip


def measure(target: Target, records: Sequence[Record]) -> Measured | None:
    """The worst that one GPU's time records say of a target; None if none of them is about it."""
    values = []
    for record in records:
        about = record["op"] == target.op and record["case"] in (target.cases or (target.op,))
        about = about and record["phase"] in target.phases
        about = about and record["dtype"] == "bfloat16" and record["provider"] == target.provider
        # Records from before the CUDA kernels name no backend.
        ran = record.get("backend") or "triton"
        if not about or target.backend not in (None, ran):
            continue
        if record["skipped"] is None and target.where(record):
            value = _value(target, record, records)
            if value is not None:
                values.append((value, record))
    if not values:
        return None
    value, record = min(values, key=lambda pair: pair[0])
    return Measured(value, record, len(values))


def _value(target: Target, record: Record, records: Iterable[Record]) -> float | None:
    if target.share:
        share = record[target.share]
        return None if share is None else float(share)
    rivals = (r for r in records if r["provider"] in target.over and place(r) == place(record))
    if target.field == "median_ms":
        best = fastest(rivals)
        return None if best is None else float(best["median_ms"] / record["median_ms"])
    least = min((r[target.field] for r in rivals if r["skipped"] is None), default=None)
    return None if least is None else float(least / record[target.field])


def verdict(target: Target, measured: Measured | None) -> str:
    if not target.decidable:
        return "not measured (no record can tell yet)"
    if measured is None:
        return "not measured"
    return "met" if measured.value >= target.at_least else "missed"
