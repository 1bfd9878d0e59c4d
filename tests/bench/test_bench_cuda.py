"""The CUDA kernels in the bench: providers and variants, the phase dglu; through an extension
that computes on the CPU."""

import dataclasses
import json
from pathlib import Path

import cuda_fake
import pytest
import torch
from cuda_fake import installed
from timing_fake import FakeTimer, of

import fusedmlp
from fusedmlp.backends.cuda import gated_linear as cuda_gated_linear, loader
from fusedmlp.backends.cuda.gated_linear import variant
from fusedmlp.bench import check, variants
from fusedmlp.bench.campaign import worker
from fusedmlp.bench.options import Refusal
from fusedmlp.bench.report import drawing, ledger, plots, summary, tables, targets
from fusedmlp.bench.rivals import RIVALS
from fusedmlp.bench.timing import calls, command as timing, session
from fusedmlp.bench.timing.session import Options
from fusedmlp.bench.work import DGLU, Work
from fusedmlp.ops import gated_linear
from fusedmlp.testing import CASES, assert_close_to

pytestmark = pytest.mark.interpreter  # the fake stands for a GPU on CPU tensors

SAMPLE = Path(__file__).parents[1] / "data" / "synthetic.json"
VARIANTS = [variants.provider(name) for name in variants.VARIANTS]
bf16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(session, "COPY_BYTES", 4096)


def work(case="gated_linear", dtype="bfloat16", M=8, D=16, H=24):
    return Work(CASES[case], "silu", dtype, M, D, H)


def run(**changes):
    options = Options(**{
        "cases": ("gated_linear",), "shapes": ((8, 16, 24),), "phases": ("forward",), "rounds": 3,
        "providers": ("fusedmlp", "fusedmlp-cuda", *VARIANTS), **changes,
    })  # fmt: skip
    records = []
    timing.run(options, records.append, FakeTimer())
    for record in records:
        ledger.check_record(json.loads(json.dumps(record)), "record")
    return records


def variants_of(launched, kernel):
    names = cuda_fake.FWD if kernel.endswith("_fwd") else cuda_fake.BWD
    place = names.index("variant")
    return {numbers[place] for name, numbers in launched if name == kernel}


# ---- variants


def test_the_bench_names_the_variants_of_the_extension_in_their_order():
    assert list(variants.variants_of("gated_linear_fwd")) == cuda_fake.variants("kFwdSm90")
    assert list(variants.variants_of("gated_linear_bwd")) == cuda_fake.variants("kBwdSm90")


def forward():
    x, w = torch.ones(8, 16, dtype=bf16), torch.ones(24, 16, dtype=bf16)
    gated_linear.fwd(x, w, w, None, None, "silu", True, False)


def test_a_variant_is_forced_inside_its_context_alone():
    seen = []
    with installed() as launched, fusedmlp.backend("cuda"):
        for name in (None, "pingpong-cluster2", "cooperative-cluster2"):
            with variant("pingpong-cluster1"), variant(name):
                forward()
            seen.append(variants_of(launched, "gated_linear_fwd"))
            launched.clear()
        with pytest.raises(ZeroDivisionError), variant("pingpong-cluster1"):
            raise ZeroDivisionError
        forward()
        seen.append(variants_of(launched, "gated_linear_fwd"))
    assert seen == [{-1}, {2}, {0}, {-1}]
    assert cuda_gated_linear.forced() is None


def test_a_variant_that_a_kernel_has_not_is_an_error():
    message = "gated_linear_fwd: variant must be one of cluster2, cluster1, got 'pingpong-cluster2'"
    with (
        installed(gpu=100, archs=("sm_100a",)),
        fusedmlp.backend("cuda"),
        pytest.raises(ValueError, match=message),
        variant("pingpong-cluster2"),
    ):
        forward()


# ---- providers


def test_why_a_provider_cannot_serve():
    ours, cooperative = RIVALS["fusedmlp-cuda"], RIVALS["fusedmlp-cuda-cooperative-cluster2"]
    missing = (None, "the CUDA extension is not built: do so")
    assert ours.skip(work(), "forward") == "needs a GPU"
    with installed(loaded=missing):
        assert ours.skip(work(), "forward") == missing[1]
    with installed():
        assert ours.skip(work(), "forward") is None
        assert cooperative.skip(work(), "forward") is None
        assert "serve gated_act" in ours.skip(work("gated_act"), "forward")
        assert "bfloat16 and float16" in ours.skip(work(dtype="float32"), "forward")
        assert "multiples of 8" in ours.skip(work(D=20), "forward")
        reason = "gated_linear_bwd on sm_90a has variants pingpong-cluster2, pingpong-cluster1"
        assert cooperative.skip(work("gated_mlp"), "both") == reason
        del loader.load()[0].ACTIVATIONS["silu"]
        assert ours.skip(work(), "forward") == "has no functor for silu"
    with installed(gpu=80):
        assert "for sm_90a, and this GPU is sm_80" in ours.skip(work(), "forward")
    with installed(gpu=100, archs=("sm_100a",)):
        assert ours.skip(work(), "forward") is None
        assert "sm_100a has variants cluster2" in cooperative.skip(work(), "forward")


def test_each_provider_is_checked_and_timed_on_its_own_kernels():
    with installed() as launched:
        records = run()
    assert variants_of(launched, "gated_linear_fwd") == {-1, 0, 1, 2, 3}
    times = {r["provider"]: r for r in of(records, kind="time")}
    assert all(r["skipped"] is None for r in times.values())
    backends = {name: r["backend"] for name, r in times.items()}
    assert backends == {
        "fusedmlp": "reference",
        **dict.fromkeys(["fusedmlp-cuda", *VARIANTS], "cuda"),
    }
    checks = [(r["backend"], r["variant"]) for r in of(records, kind="check")]
    assert checks == [
        ("reference", None),
        ("cuda", None),
        *(("cuda", v) for v in variants.VARIANTS),
    ]
    # So that none takes another's place in the ledger.
    assert len({ledger.identity(r) for r in of(records, kind="check")}) == len(checks)


def test_what_is_in_force_is_so_at_every_call():
    """Longer calls are in no CUDA graph: each chooses its kernel when it is made."""
    rival = RIVALS["fusedmlp-cuda-pingpong-cluster1"]
    with installed() as launched:
        for case, phase in (("gated_linear", "forward"), ("gated_mlp", "backward")):
            here = work(case)
            (call,) = calls.calls_of(rival, here, phase, [calls.draw(here, "cpu", 0)])
            launched.clear()
            call()
            assert launched
            assert variants_of(launched, launched[0][0]) == {3 if phase == "forward" else 1}
    assert fusedmlp.backends.choice.chosen() == "auto"


def test_a_wrong_variant_gets_no_speed_and_costs_no_other(monkeypatch):
    def wrong(*numbers):
        cuda_fake_fwd(*numbers)
        p = dict(zip(cuda_fake.FWD, numbers, strict=True))
        if p["variant"] == 2 and p["h"]:
            cuda_fake.at(p["h"], p["M"], p["H"], p["stride_h"], bf16).mul_(1.1)

    cuda_fake_fwd = cuda_fake.gated_linear_fwd
    monkeypatch.setattr(cuda_fake, "gated_linear_fwd", wrong)
    with installed():
        times = {r["provider"]: r for r in of(run(), kind="time")}
    bad = times.pop("fusedmlp-cuda-pingpong-cluster2")
    assert "its check failed here (wrong: out" in bad["skipped"]
    assert bad["median_ms"] is None
    assert all(r["skipped"] is None for r in times.values())


def test_variants_are_timed_only_by_name(monkeypatch):
    only = {n: r for n, r in RIVALS.items() if n.startswith("fusedmlp")}
    monkeypatch.setattr(session, "RIVALS", only)
    with installed():
        names = {r["provider"] for r in of(run(providers=()), kind="time")}
        assert names == {"fusedmlp", "fusedmlp-cuda"}
        left = run(without=("fusedmlp-cuda", *VARIANTS[1:]))
    assert {r["provider"] for r in of(left, kind="time")} == {"fusedmlp", VARIANTS[0]}


# ---- the phase dglu


def test_work_of_dglu_by_hand():
    here = work("gated_mlp")
    assert here.flops(DGLU) == 2 * 8 * 16 * 24
    assert here.bytes(DGLU) == 2 * (8 * 16 + 16 * 24 + 2 * 8 * 24 + 3 * 8 * 24)
    assert here.gemm(DGLU) == (8, 24, 16)
    assert here.gemm() == (8, 48, 16)


@pytest.mark.parametrize("name", ["fusedmlp", "fusedmlp-cuda", "fusedmlp-cuda-pingpong-cluster1"])
def test_dglu_is_the_gates_gradient_of_the_gemm(name):
    here = work("gated_mlp", M=37)
    inputs = calls.draw(here, "cpu", 0, DGLU)
    with installed() as launched:
        (call,) = calls.calls_of(RIVALS[name], here, DGLU, [inputs])
        dgu, h, db = call()
    assert bool(launched) == ("cuda" in name)
    assert db.numel() == 0
    eager = RIVALS["eager"].dglu(here)
    exact, rough = (eager({k: t.to(d) for k, t in inputs.items()}) for d in (torch.float64, bf16))
    for i, part in enumerate(dgu):
        assert_close_to(part, exact[0][i], rough[0][i], name=f"half {i}")
    assert_close_to(h, exact[1], rough[1], name="h")


def test_dglu_is_set_against_its_own_gemm():
    with installed():
        records = run(
            cases=("gated_mlp",), phases=("forward", DGLU),
            providers=("fusedmlp-cuda", "eager", *VARIANTS[:1]),
        )  # fmt: skip
    peaks = {(r["M"], r["N"], r["K"]): r["tflops"] for r in of(records, name="cublas")}
    assert set(peaks) == {(8, 48, 16), (8, 24, 16)}
    times = {(r["provider"], r["phase"]): r for r in of(records, kind="time")}
    for name in ("fusedmlp-cuda", "eager"):
        for phase, gemm in (("forward", (8, 48, 16)), (DGLU, (8, 24, 16))):
            r = times[name, phase]
            assert r["of_cublas"] == pytest.approx(r["tflops"] / peaks[gemm])
    assert "has variants" in times[VARIANTS[0], DGLU]["skipped"]
    (whole,) = of(run(cases=("gated_mlp",), phases=(DGLU,), providers=("compile",)), kind="time")
    assert whole["skipped"] == "has gradients of whole calls only"


def test_dglu_of_another_op_is_refused():
    (record,) = of(run(phases=(DGLU,), providers=("fusedmlp",)), kind="time")
    assert record["skipped"] == "gated_linear has no such GEMM"


def test_the_command_line_takes_it():
    from fusedmlp.bench import cli

    argv = ["time", "--case", "gated_mlp", "--phase", "dglu", "--provider", "fusedmlp-cuda"]
    args = cli.parser().parse_args([*argv, "--without", "eager"])
    assert (args.phase, args.without) == (["dglu"], ["eager"])
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["predict", "--phase", "dglu"])


# ---- check


def test_check_on_cuda_visits_what_its_kernels_take():
    works = check.plan(
        check.CheckOptions(backend="cuda", cases=("gated_linear", "gated_linear-interleaved-bias"))
    )
    assert {work.case.name for work in works} == {"gated_linear"}
    with pytest.raises(Refusal, match="the CUDA kernels take no interleaved halves"):
        check.plan(check.CheckOptions(backend="cuda", cases=("gated_mlp-interleaved-bias",)))
    assert {w.dtype for w in works} == {"bfloat16", "float16"}
    assert all(w.D % 8 == w.H % 8 == 0 for w in works)
    # Some size gives every multiprocessor several tiles, some has tails on every side.
    assert any(w.M // 128 * (w.H // 128) > 4 * 132 for w in works)
    assert any(w.M % 128 and w.H % 128 and w.D % 64 and w.M > 128 for w in works)


def test_check_of_variants(capsys):
    from fusedmlp.bench import cli

    argv = ["check", "--backend", "cuda", "--case", "gated_linear", "--shape", "8x16x24"]
    names = list(variants.VARIANTS)
    with installed() as launched:
        assert cli.main([*argv, "--variant", *names]) == 0
    assert variants_of(launched, "gated_linear_fwd") == {0, 1, 2, 3}
    assert "8x16x24, pingpong-cluster2" in capsys.readouterr().out
    assert cli.main(["check", "--variant", names[0]]) == 2
    assert "needs --backend cuda" in capsys.readouterr().err


@pytest.mark.interpreter
def test_check_of_cuda_needs_a_gpu(capsys):
    from fusedmlp.bench import cli

    assert cli.main(["check", "--backend", "cuda", "--case", "gated_linear"]) == 2
    assert "the backend cuda needs a GPU" in capsys.readouterr().err


def test_small_cases_run_every_variant(monkeypatch, capsys):
    inputs = type(CASES["mlp"]).inputs
    monkeypatch.setattr(
        type(CASES["mlp"]),
        "inputs",
        lambda self, m, d, h, dtype, device: inputs(self, m, d, h, dtype),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(worker, "SMALL_CUDA", ((8, 16, 24),))
    with installed() as launched:
        worker.exercise("gated_mlp", "cuda")
    assert variants_of(launched, "gated_linear_fwd") == {-1, 2, 3}
    assert variants_of(launched, "gated_linear_bwd") == {-1, 0, 1}
    assert "gated_mlp 8x16x24 on cuda, pingpong-cluster1" in capsys.readouterr().out


# ---- what is said of the records


def times_of(*found, case="gated_linear", phase="forward", **fields):
    """Records of (provider, milliseconds) at one size."""
    base = next(
        r for r in ledger.load(SAMPLE).of_kind("time")
        if (r["op"], r["M"], r["provider"]) == ("gated_linear", 4096, "fusedmlp")
    )  # fmt: skip
    return [
        {**base, "case": case, "op": case, "phase": phase, "provider": name, "D": 4096, "H": 14336,
         "median_ms": ms, "q20_ms": ms, "q80_ms": ms, "of_cublas": 1 / ms, **fields}
        for name, ms in found
    ]  # fmt: skip


def book(records):
    return dataclasses.replace(ledger.load(SAMPLE), records=records)


RACE = [("fusedmlp", 1.25), ("fusedmlp-cuda", 1.1), ("quack", 1.2)]
FORCED = [(VARIANTS[i], ms) for i, ms in enumerate((1.1, 1.14, 1.12, 1.16))]


def test_none_of_ours_is_a_baseline():
    records = times_of(*RACE, *FORCED)
    assert [r["provider"] for r in records if not summary.is_ours(r)] == ["quack"]
    assert [r["provider"] for r in records if summary.is_default(r)] == ["fusedmlp"]
    assert [r["provider"] for r in records if summary.is_variant(r)] == VARIANTS
    text = "\n".join(summary.summary(book(records)))
    assert "gated_linear forward 4096x4096x14336: 1.25 ms" in text
    assert "0.96x quack" in text
    line = next(line for line in text.splitlines() if line.startswith("cuda: "))
    assert line.startswith(
        "cuda: gated_linear forward 4096x4096x14336: cuda 90.9%, cuda-cooperative"
    )


def test_targets_are_each_decided_by_their_own_provider():
    triton, cuda = (t for t in targets.TARGETS if t.op == "gated_linear" and t.share == "of_cublas")
    records = times_of(*RACE, *FORCED)
    assert targets.measure(triton, records).value == pytest.approx(0.8)
    assert targets.verdict(triton, targets.measure(triton, records)) == "missed"
    assert targets.measure(cuda, records).value == pytest.approx(1 / 1.1)
    # What auto took may have been the CUDA kernel.
    assert targets.measure(triton, times_of(("fusedmlp", 1.0), backend="cuda")) is None
    rival = next(t for t in targets.TARGETS if t.over == ("quack",) and t.op == "gated_linear")
    assert targets.measure(rival, records).value == pytest.approx(1.2 / 1.25)
    assert targets.measure(rival, records).sizes == 1


def test_the_dglu_target_is_decided_by_its_phase():
    triton, cuda = (t for t in targets.TARGETS if DGLU in t.phases)
    records = times_of(*RACE, case="gated_mlp", phase=DGLU)
    assert targets.verdict(triton, targets.measure(triton, records)) == "missed"
    assert targets.verdict(cuda, targets.measure(cuda, records)) == "met"
    assert targets.measure(cuda, times_of(*RACE, case="gated_mlp", phase="backward")) is None


def test_a_table_has_forced_variants_and_a_plot_has_not():
    records = times_of(*RACE, *FORCED) + times_of(*RACE, *FORCED, M=8192)
    text = tables.times(records)
    assert "| fusedmlp-cuda |" in text
    assert f"| {VARIANTS[0]} |" in text
    assert "quack / ours" in text
    row = next(
        r for r in tables.readme([book(records)], ["gated_linear"]).splitlines() if "ms" in r
    )
    assert "1.25 ms" in row
    (drawn,) = [p for p in plots.plots_of([book(records)], ["gated_linear"]) if "panels" in p.data]
    (panel,) = drawn.data["panels"].values()
    assert set(panel["lines"]) == {"fusedmlp", "fusedmlp-cuda", "quack"}
    names = drawn.data["providers"]
    assert names == ["fusedmlp", "fusedmlp-cuda", "quack"]
    looks = [drawing._look(name, names) for name in names]
    assert looks[0] != looks[1]
    assert looks[0]["color"] == looks[1]["color"] == "black" != looks[2]["color"]


def test_the_state_of_an_op_is_told_by_backend():
    good = ledger.load(SAMPLE).of_kind("check")[0]
    bad = {**good, "backend": "cuda", "variant": "pingpong-cluster2", "passed": False}
    text = tables.state([book([good, bad])], ["gated_linear"])
    assert "| triton | 1: all passed |" in text
    assert "| cuda | 1: 1 FAILED |" in text
    assert "(cuda, pingpong-cluster2): " in tables.errors([good, bad])


def test_a_sanitizer_says_of_which_kernels():
    clean = ledger.load(SAMPLE).of_kind("sanitizer")[0]
    one = book([])
    one.add_record(clean)
    one.add_record({**clean, "backend": "cuda", "status": "failed"})
    assert len(one.records) == 2
    assert f"`{clean['case']}` (cuda)" in tables.sanitizers(one)
