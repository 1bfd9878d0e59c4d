"""`time` without its clock: a fake timer runs every call once and says how long it took."""

import dataclasses
import functools
import json
import subprocess
from pathlib import Path

import pytest
import torch
from timing_fake import FakeTimer, of

from fusedmlp.bench.campaign import base
from fusedmlp.bench.options import collecting
from fusedmlp.bench.shapes import DENSE
from fusedmlp.bench.timing import calls, clock, command as timing, session
from fusedmlp.bench.timing.session import Options, Peaks, Session, plan, record_of
from fusedmlp.bench.work import PHASES, Work
from fusedmlp.testing import CASES

PROVIDERS = ("fusedmlp", "eager", "eager-packed")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(session, "COPY_BYTES", 4096)


def run(**changes):
    options = Options(**{
        "cases": ("gated_linear",), "shapes": ((8, 16, 24),), "providers": PROVIDERS,
        "rounds": 6, **changes,
    })  # fmt: skip
    records, timer = [], FakeTimer()
    timing.run(options, collecting(records), timer)
    return records, timer


def test_one_record_per_provider_and_phase():
    records, _ = run()
    times = of(records, kind="time")
    assert [(r["provider"], r["phase"]) for r in times] == [
        (provider, phase) for provider in PROVIDERS for phase in PHASES
    ]
    assert set(times[0]) == {
        "kind", "case", "op", "provider", "phase", "activation", "dtype", "M", "D", "H", "model",
        "median_ms", "q20_ms", "q80_ms", "flops", "bytes", "tflops", "gbps", "of_cublas",
        "of_copy", "peak_memory_bytes", "skipped", "backend", "graph", "sm_mhz",
    }  # fmt: skip


def test_the_ledger_takes_every_record():
    from fusedmlp.bench.report.ledger import check_record

    records, _ = run(providers=(*PROVIDERS, "liger"))
    for record in records:
        check_record(json.loads(json.dumps(record)), "record")


def test_numbers_of_a_record_by_hand():
    work = Work(CASES["gated_linear"], "silu", "bfloat16", 8, 16, 24)
    record = record_of(
        work, "eager", "forward", [2.0, 1.0, 3.0], 77, Peaks(cublas=1e-5, copy=1e-3), None
    )
    flops, moved = 4 * 8 * 16 * 24, 2 * (8 * 16 + 2 * 24 * 16 + 8 * 24)
    assert record["flops"] == flops
    assert record["bytes"] == moved
    assert (record["q20_ms"], record["median_ms"], record["q80_ms"]) == pytest.approx((1.4, 2, 2.6))
    assert record["tflops"] == pytest.approx(flops / 2e-3 / 1e12)
    assert record["gbps"] == pytest.approx(moved / 2e-3 / 1e9)
    assert record["of_cublas"] == pytest.approx(record["tflops"] / 1e-5)
    assert record["of_copy"] == pytest.approx(record["gbps"] / 1e-3)
    assert record["peak_memory_bytes"] == 77


def test_a_skipped_record_has_no_numbers():
    work = Work(CASES["gated_act"], "silu", "bfloat16", 8, 16, 24)
    record = record_of(work, "quack", "both", None, None, Peaks(1.0, 1.0), "not here")
    assert record["skipped"] == "not here"
    measured = ("median_ms", "q20_ms", "q80_ms", "tflops", "gbps", "of_cublas", "of_copy",
                "peak_memory_bytes")  # fmt: skip
    assert all(record[field] is None for field in measured)
    with pytest.raises(ValueError, match="either samples or a reason"):
        record_of(work, "quack", "both", None, None, Peaks(1.0, 1.0), None)


def test_peaks_are_measured_in_the_same_run():
    records, _ = run()
    (copy,) = of(records, kind="peak", name="copy")
    # The first sampler made takes 1 ms: 4096 bytes read and 4096 written.
    assert copy["bytes"] == 8192
    assert copy["gbps"] == pytest.approx(8192 / 1e-3 / 1e9)
    (cublas,) = of(records, kind="peak", name="cublas")
    assert (cublas["M"], cublas["N"], cublas["K"]) == (8, 48, 16)
    eager = of(records, provider="eager", phase="forward")[0]
    assert eager["of_cublas"] == pytest.approx(eager["tflops"] / cublas["tflops"])
    assert eager["of_copy"] == pytest.approx(eager["gbps"] / copy["gbps"])


def test_elementwise_work_has_no_cublas():
    records, _ = run(cases=("gated_act",), providers=("fusedmlp", "eager"))
    assert not of(records, kind="peak", name="cublas")
    assert {r["of_cublas"] for r in of(records, kind="time")} == {None}


def test_a_failed_check_gives_no_speed(monkeypatch):
    wrong = {
        "tensors": {"dx": {"passed": False}}, "passed": False, "kind": "check", "backend": "triton",
    }  # fmt: skip
    monkeypatch.setattr(session, "check_one", lambda work: wrong)
    records, _ = run()
    ours = of(records, kind="time", provider="fusedmlp")
    assert len(ours) == 3
    assert all("its check failed here (wrong: dx)" in r["skipped"] for r in ours)
    assert all(r["median_ms"] is None for r in ours)
    assert all(r["skipped"] is None for r in of(records, kind="time", provider="eager"))


def test_a_broken_kernel_gives_no_speed(monkeypatch):
    """The same end to end: the op itself is wrong, by one factor."""
    case = CASES["gated_linear"]

    @functools.wraps(case.fn)
    def wrong(*arguments, **options):
        return 1.01 * case.fn(*arguments, **options)

    broken = dataclasses.replace(case, fn=wrong)
    works = [Work(broken, "silu", "float32", 8, 16, 24)]
    monkeypatch.setattr(timing, "plan", lambda options: works)
    records, _ = run()
    ours = of(records, kind="time", provider="fusedmlp")
    assert len(ours) == 3
    assert all("its check failed here" in r["skipped"] for r in ours)


def test_each_kernel_is_checked_once_however_often_it_is_timed():
    records, _ = run(shapes=((8, 16, 24), (8, 16, 24)), phases=("forward", "both"))
    assert len(of(records, kind="check")) == 1


def test_all_zero_inputs_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="w_up is all zero"):
        calls.refuse_zeros({"x": torch.ones(3), "w_up": torch.zeros(3)})
    calls.refuse_zeros({"x": torch.zeros(0)})
    monkeypatch.setattr(torch, "randn", lambda shape, **kw: torch.zeros(shape, dtype=kw["dtype"]))
    work = Work(CASES["gated_act"], "silu", "bfloat16", 8, 16, 24)
    with pytest.raises(ValueError, match="g is all zero"):
        calls.rotated(work, "cpu", 0)


@pytest.mark.parametrize("l2, expected", [(0, 1), (1000, 2), (10_000, 17)])
def test_buffers_outgrow_l2_three_times(l2, expected):
    work = Work(CASES["gated_linear"], "silu", "bfloat16", 8, 16, 24)
    one = 2 * (8 * 16 + 2 * 24 * 16)
    assert one == 1792
    sets = calls.rotated(work, "cpu", l2)
    assert len(sets) == expected
    assert len(sets) * one > 3 * l2
    assert not sets[0]["x"].equal(sets[-1]["x"]) or len(sets) == 1


def test_every_copy_is_called():
    _, timer = run(cases=("gated_act",), providers=("eager",), phases=("forward",))
    # One sampler for the copy's peak, one for eager: 3 * 1000 bytes of L2 against sets of 768.
    assert [count for count, _ in timer.made] == [1, 4]


def test_short_calls_get_graphs_and_long_ones_do_not(monkeypatch):
    _, timer = run(cases=("gated_act",), providers=("eager",), phases=("forward",))
    assert [graph for _, graph in timer.made] == [False, True]
    monkeypatch.setattr(session, "GRAPH_BELOW_MS", 0.0)
    _, timer = run(cases=("gated_act",), providers=("eager",), phases=("forward",))
    assert [graph for _, graph in timer.made] == [False, False]


def test_a_rival_that_raises_costs_its_own_number_only(monkeypatch):
    class Broken(type(session.RIVALS["eager"])):
        name = "broken"

        def function(self, work):
            raise MemoryError("out of\nmemory")

    monkeypatch.setitem(session.RIVALS, "broken", Broken())
    records, _ = run(providers=("broken", "eager"), phases=("forward",))
    (broken,) = of(records, kind="time", provider="broken")
    assert broken["skipped"] == "failed: MemoryError: out of"
    (eager,) = of(records, kind="time", provider="eager")
    assert eager["skipped"] is None


def test_running_out_of_memory_in_the_rounds_is_on_record(monkeypatch):
    def interleave(samplers, rounds, after_round=None):
        if "copy" in samplers:
            return {"copy": [1.0]}
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "interleave", interleave)
    records, _ = run(providers=("eager",), phases=("forward",))
    (eager,) = of(records, kind="time")
    assert eager["skipped"] == "failed: OutOfMemoryError: CUDA out of memory"


def test_running_out_of_memory_before_the_rounds_is_on_record(monkeypatch):
    def rotated(work, device, l2_bytes, phase):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "rotated", rotated)
    records, _ = run()
    times = of(records, kind="time")
    assert len(times) == 9
    assert {r["skipped"] for r in times} == {"failed: OutOfMemoryError: CUDA out of memory"}


def test_gradients_are_taken_in_backward_and_both():
    work = Work(CASES["gated_mlp"], "silu", "float32", 8, 16, 24)
    inputs = calls.draw(work, "cpu", 0)
    eager = session.RIVALS["eager"]
    both, backward = (calls.calls_of(eager, work, p, [inputs])[0] for p in ("both", "backward"))
    first, again = backward(), backward()
    assert len(first) == 4
    for a, b, c in zip(first, again, both(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)


def test_a_models_own_calls_and_activation():
    gpt2, llama = DENSE["gpt2"], DENSE["llama3-8b"]
    widths = tuple((m.D, m.H, m.name) for m in (gpt2, llama))
    works = plan(Options(cases=None, widths=widths, tokens=(16,)))
    found = {(w.case.name, w.activation, w.M, w.D, w.H, w.model) for w in works}
    assert ("mlp-bias", "gelu_tanh", 16, 768, 3072, "gpt2") in found
    assert ("gated_mlp", "silu", 16, 4096, 14336, "llama3-8b") in found
    assert len(found) == 5


def test_samples_are_kept_when_asked():
    records, _ = run(keep_samples=True, phases=("forward",))
    assert all(len(r["samples_ms"]) == 6 for r in of(records, kind="time"))


def test_without_a_gpu_nothing_is_timed(monkeypatch):
    with pytest.raises(timing.NothingTimed, match="interpreter has no speed"):
        timing.run(Options(), lambda record: None)
    monkeypatch.setattr(timing.choice, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(timing.NothingTimed, match="nothing was timed: torch finds no GPU"):
        timing.run(Options(), lambda record: None)


def test_show_lists_times_and_reasons(capsys):
    records, _ = run(providers=("eager", "liger"), phases=("forward",))
    timing.show(records)
    text = capsys.readouterr().out
    assert "Times measured on this GPU" in text
    assert "device copy:" in text
    assert "liger, gated_linear forward: " in text.split("Not timed:")[1]


def test_clock_range():
    assert clock.clock_range([1700, 1980, 1800]) == {
        "samples": 3, "min_mhz": 1700, "median_mhz": 1800, "max_mhz": 1980,
    }  # fmt: skip
    assert clock.clock_range([]) is None


def test_one_session_notes_clocks(monkeypatch):
    monkeypatch.setattr(session.machine, "clocks", lambda: {"sm_mhz": 1234})
    one = Session(Options(), lambda record: None, FakeTimer())
    one.note_clocks([])
    one.note_clocks([1700, 1980])
    assert one.clocks == [1234, 1700, 1980]


# --base


def repository(path: Path) -> Path:
    """A git repository of the right shape, whose first commit has an older bench."""
    for folder in ("bench", "fusedmlp"):
        (path / folder).mkdir(parents=True)
    (path / "bench" / "old.py").write_text("")
    (path / "fusedmlp" / "kernel.py").write_text("version = 1")
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    for arguments in (("init",), ("add", "."), ("commit", "-m", "one")):
        subprocess.run(["git", *identity, *arguments], cwd=path, check=True, capture_output=True)
    (path / "bench" / "old.py").unlink()
    (path / "bench" / "new.py").write_text("")
    (path / "fusedmlp" / "kernel.py").write_text("version = 2")
    return path


def worktrees(path: Path) -> int:
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=path, check=True, capture_output=True, text=True
    )
    return len(listed.stdout.splitlines())


def test_the_base_is_a_throwaway_worktree_measured_by_this_bench(tmp_path):
    root = repository(tmp_path / "repo")
    with base.worktree("HEAD", root) as tree:
        assert (tree / "fusedmlp" / "kernel.py").read_text() == "version = 1"
        assert (tree / "fusedmlp" / "bench" / "new.py").exists()
        assert not (tree / "bench" / "old.py").exists()
        assert worktrees(root) == 2
    assert not tree.exists()
    assert worktrees(root) == 1
    assert (root / "fusedmlp" / "kernel.py").read_text() == "version = 2"


def test_an_unknown_commit_is_named(tmp_path):
    root = repository(tmp_path / "repo")
    with pytest.raises(base.Refusal, match="no-such-ref"), base.worktree("no-such-ref", root):
        pass
    assert worktrees(root) == 1


def fake_turn(order, ms):
    def turn(tree, works, options):
        side = "base" if "fusedmlp-base-" in str(tree) else "here"
        order.append(side)
        records = [{"kind": "peak", "name": "copy", "gbps": 1000.0}]
        for work in works:
            for phase in options.phases:
                samples = [ms[side] + 0.1 * order.count(side)] * 2
                record = record_of(work, "fusedmlp", phase, samples, 1, Peaks(1.0, 1.0), None)
                records.append({**record, "samples_ms": samples})
        return records

    return turn


def test_both_sides_take_turns_and_their_samples_are_pooled(tmp_path):
    root = repository(tmp_path / "repo")
    order, records = [], []
    options = Options(cases=("gated_act",), shapes=((8, 16, 24),), phases=("forward",))
    turn = fake_turn(order, {"base": 2.0, "here": 1.0})
    pairs = base.compare("HEAD", options, records.append, turn, root)
    assert order == ["base", "here", "here", "base", "base", "here"]
    ((old, new),) = pairs
    assert (old["provider"], new["provider"]) == ("fusedmlp@HEAD", "fusedmlp")
    # Samples 1.1, 1.1, 1.2, 1.2, 1.3, 1.3.
    assert new["median_ms"] == pytest.approx(1.2)
    assert old["median_ms"] == pytest.approx(2.2)
    assert new["of_copy"] == pytest.approx(new["gbps"])
    assert len(of(records, kind="peak")) == 1
    assert "samples_ms" not in new


def test_a_side_that_failed_its_check_has_no_time(tmp_path):
    work = Work(CASES["gated_act"], "silu", "bfloat16", 8, 16, 24)
    good = {
        **record_of(work, "fusedmlp", "both", [1.0], 1, Peaks(1.0, 1.0), None),
        "samples_ms": [1],
    }
    bad = record_of(work, "fusedmlp", "both", None, None, Peaks(None, None), "its check failed")
    (pooled,) = base.pooled([[good], [bad]], "fusedmlp@x")
    assert pooled["skipped"] == "its check failed"
    assert pooled["median_ms"] is None
