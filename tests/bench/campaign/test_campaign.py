"""The campaign's machinery on small fake steps: nothing is lost, nothing hangs, it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from campaign_steps import MACHINE, PRELUDE, emitting, gone, run, statuses, step

from fusedmlp.backends.cuda import loader
from fusedmlp.bench import process
from fusedmlp.bench.campaign import command, plans, resume, runner, worker
from fusedmlp.bench.campaign.steps import Step
from fusedmlp.bench.gate import cache
from fusedmlp.bench.options import Refusal
from fusedmlp.bench.report import ledger as book, summary
from fusedmlp.testing import CASES


@pytest.fixture(autouse=True)
def no_other_results(monkeypatch, tmp_path):
    monkeypatch.setattr(resume, "RESULTS", tmp_path / "published")


def test_records_and_steps_are_kept(tmp_path):
    ran = run([step("a", emitting(1, 2)), step("b", emitting(3))], tmp_path)
    loaded = book.load(ran.path)
    assert statuses(loaded) == {"a": "ok", "b": "ok"}
    assert [r["bytes"] for r in loaded.records] == [1, 2, 3]


def test_a_record_is_on_disk_before_its_step_ends(tmp_path):
    seen = tmp_path / "seen.json"
    code = (
        emitting(7)
        + f"""
import glob
for _ in range(200):
    texts = [open(p).read() for p in glob.glob({str(tmp_path / "out")!r} + "/*.json")]
    if any('"bytes": 7' in t for t in texts):
        open({str(seen)!r}, "w").write("yes")
        break
    time.sleep(0.02)
"""
    )
    run([step("a", code)], tmp_path / "out")
    assert seen.exists()


def test_a_hanging_step_dies_with_its_grandchild(tmp_path):
    pids = tmp_path / "pids"
    code = (
        emitting(1)
        + f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print("about to hang", flush=True)
time.sleep(60)
"""
    )
    start = time.monotonic()
    ran = run([step("hangs", code, budget_s=1.5), step("next", emitting(2))], tmp_path / "out")
    assert time.monotonic() - start < 15
    parent, grandchild = map(int, pids.read_text().split())
    assert gone(parent)
    assert gone(grandchild)
    assert statuses(ran) == {"hangs": "killed", "next": "ok"}
    assert "limit of 2 s" in ran.steps[0]["detail"]
    assert "about to hang" in ran.steps[0]["detail"]
    assert [r["bytes"] for r in ran.records] == [1, 2]


def test_a_grandchild_left_behind_by_a_finished_step_dies_too(tmp_path):
    pid = tmp_path / "pid"
    code = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid)!r}, "w").write(str(child.pid))
"""
    ran = run([step("leaves", code)], tmp_path / "out")
    assert statuses(ran) == {"leaves": "ok"}
    assert gone(int(pid.read_text()))


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("raise RuntimeError('device lost')", "device lost"),
        ("os.abort()", "died of SIGABRT"),
        ("sys.exit(3)", "exit code 3"),
    ],
)
def test_a_crash_is_recorded_and_passed_over(tmp_path, code, detail):
    ran = run([step("bad", emitting(1) + code), step("next", emitting(2))], tmp_path)
    assert statuses(ran) == {"bad": "failed", "next": "ok"}
    assert detail in ran.steps[0]["detail"]
    assert [r["bytes"] for r in ran.records] == [1, 2]


def test_a_bad_record_fails_its_step_and_costs_no_other(tmp_path):
    code = emitting(1) + "emit({'kind': 'peak', 'name': 'copy'})\n" + emitting(2)
    code += "open(os.environ['FUSEDMLP_RECORDS'], 'a').write('{\"kind\": \"st')\n"
    ran = run([step("bad", code)], tmp_path)
    assert [r["bytes"] for r in ran.records] == [1, 2]
    assert statuses(ran) == {"bad": "failed"}
    assert "dtype: expected the field, got nothing" in ran.steps[0]["detail"]
    assert "half a record" in ran.steps[0]["detail"]


def test_a_step_may_judge_itself(tmp_path):
    verdict = {"step": {"status": "skipped", "detail": "no such tool"}}
    ran = run([step("a", f"emit({verdict!r})")], tmp_path)
    assert statuses(ran) == {"a": "skipped"}
    assert ran.steps[0]["detail"] == "no such tool"


def test_it_goes_on_where_it_stopped(tmp_path):
    """The first run has no time for c; the second runs c first, then tries what failed again."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def marking(name: str, code: str = "") -> Step:
        mark = f"open({str(marks)!r} + '/order', 'a').write('{name}')\n"
        return step(name, mark + code)

    a, b = marking("a", emitting(1)), marking("b", "sys.exit(1)")
    c = marking("c", emitting(3))
    out = tmp_path / "out"
    stopped = run([a, b], out)  # as if it had been cut off before c
    assert (marks / "order").read_text() == "ab"
    resumed = run([a, b, c], out)
    assert resumed.path == stopped.path
    assert (marks / "order").read_text() == "abcb"
    assert statuses(resumed) == {"a": "ok", "c": "ok", "b": "failed"}
    assert [r["bytes"] for r in resumed.records] == [1, 3]
    # All steps have had their turn: the next run is a new ledger.
    again = run([a, b, c], out)
    assert again.path != stopped.path
    assert len(list(out.glob("*.json"))) == 2


def test_no_time_left_is_recorded_and_taken_up_later(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LEAST_S", 0.5)
    monkeypatch.setattr(runner, "SUMMARY_S", 0.0)
    steps = [step("slow", "time.sleep(30)", budget_s=100), step("late", emitting(1), budget_s=100)]
    ran = run(steps, tmp_path, minutes=1.5 / 60)
    assert statuses(ran) == {"slow": "killed", "late": "skipped"}
    assert all(s["detail"].startswith(resume.OUT_OF_TIME) for s in ran.steps)
    assert [s.name for s in resume.order(ran, steps, [])] == ["slow", "late"]


@pytest.mark.parametrize("change", [{"gpu": "Synthetic 2"}, {"commit": "bad"}, {"source": "x"}])
def test_a_ledger_of_other_code_or_another_gpu_is_refused(tmp_path, change):
    """Except in bench/results, which holds the ledgers of every commit."""
    first = run([step("a", "")], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Refusal, match="give --out an empty folder") as refused:
        run([step("a", "")], tmp_path, machine={**MACHINE, **change})
    assert str(first.path) in str(refused.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run([step("a", "")], tmp_path / "published")
    other = run([step("a", "")], tmp_path / "published", machine={**MACHINE, **change})
    assert statuses(other) == {"a": "ok"}
    assert len(list((tmp_path / "published").glob("*.json"))) == 2


def test_what_no_gpu_has_done_with_this_code_comes_first(tmp_path):
    def done(where: Path, machine: dict, *names: str, status: str = "ok") -> None:
        one = book.Ledger(machine, machine["commit"], "2000-01-01")
        for name in names:
            one.add_step(name, status, 1, "")
        book.create(one, where)

    done(tmp_path / "published", MACHINE, "a", "b")
    done(tmp_path / "published", MACHINE, "c", status="failed")
    done(tmp_path / "published", {**MACHINE, "commit": "old"}, "d")
    steps = [step(name, "") for name in "abcd"]
    ran = run(steps, tmp_path / "out")
    assert [s["name"] for s in ran.steps] == ["c", "d", "a", "b"]


def marking(folder: Path, name: str, code: str = "", **more) -> Step:
    """A step that leaves its name in `folder`/order when it runs."""
    folder.mkdir(exist_ok=True)
    return step(name, f"open({str(folder)!r} + '/order', 'a').write('{name} ')\n" + code, **more)


def test_what_a_step_needs_and_did_not_get_leaves_it_out_with_a_reason(tmp_path):
    """A hang costs its own budget; what hangs on it costs nothing."""
    hang = step("check", "time.sleep(60)", budget_s=1, needs="build")
    time_it = marking(tmp_path, "time", needs="check")
    last = marking(tmp_path, "last", needs="time")
    ran = run([marking(tmp_path, "build"), hang, time_it, last, step("free", "")], tmp_path / "out")
    assert (tmp_path / "order").read_text() == "build "
    assert statuses(ran) == {
        "build": "ok", "check": "killed", "time": "skipped", "last": "skipped", "free": "ok",
    }  # fmt: skip
    details = {s["name"]: s["detail"] for s in ran.steps}
    assert details["time"] == "left out: check is killed"
    assert details["last"] == "left out: time is skipped"


def test_what_was_left_out_follows_the_second_try_of_what_it_needs(tmp_path):
    """The first run's machine cannot build. The second one's can, and a new machine has lost what
    was built: so the build comes first again."""
    marks, can = tmp_path / "marks", tmp_path / "can"
    build = marking(marks, "build", f"sys.exit(not os.path.exists({str(can)!r}))", again=True)
    check = marking(marks, "check", needs="build")
    late = marking(marks, "late", needs="check")
    run([build, check], tmp_path / "out")
    assert (marks / "order").read_text() == "build "
    can.touch()
    ran = run([build, check, marking(marks, "free"), late], tmp_path / "out")
    # late needs check, which has its second try after everything that has had none.
    assert (marks / "order").read_text() == "build free build check late "
    assert set(statuses(ran).values()) == {"ok"}


def test_needs_come_first_even_where_another_gpu_has_done_them(tmp_path):
    other = book.Ledger(MACHINE, MACHINE["commit"], "2000-01-01")
    for name in ("build", "check", "old"):
        other.add_step(name, "ok", 1, "")
    ledger = book.Ledger(MACHINE, MACHINE["commit"], "2000-01-01")
    steps = [
        step("old", ""), step("build", "", again=True), step("check", "", needs="build"),
        step("time", "", needs="check"), step("new", ""),
    ]  # fmt: skip
    names = [s.name for s in resume.order(ledger, steps, [other])]
    assert names == ["build", "check", "time", "new", "old"]


def test_a_provider_whose_check_is_not_ok_is_left_out(tmp_path):
    code = f"open({str(tmp_path / 'argv')!r}, 'w').write(' '.join(sys.argv[1:]))"
    timing = step("time", code, without={"a": "check:a", "b": "check:b", "c": "none"})
    run([step("check:a", "sys.exit(1)"), step("check:b", ""), timing], tmp_path / "out")
    assert (tmp_path / "argv").read_text() == "--without a c"


def test_a_broken_ledger_is_named_and_does_not_stop_it(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    said = []
    ran = run([step("a", "")], tmp_path, say=said.append)
    assert statuses(ran) == {"a": "ok"}
    assert any("broken.json" in line for line in said)


def test_sigterm_ends_the_child_and_keeps_the_ledger(tmp_path):
    """A machine that is called back: the campaign's own process is told to stop."""
    pid = tmp_path / "pid"
    child = emitting(1) + f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    code = f"""
import pathlib, sys
from fusedmlp.bench import process
from fusedmlp.bench.campaign import resume, runner, steps
process.end_on_sigterm()
step = steps.Step("slow", (sys.executable, "-c", {PRELUDE + child!r}), 60)
ledger = resume.open_ledger({MACHINE!r}, [step], pathlib.Path({str(tmp_path / "out")!r}), [])
runner.run_campaign(ledger, [step], runner.Box(5))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=worker.ROOT, stderr=subprocess.PIPE)
    for _ in range(400):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=60)
    assert gone(int(pid.read_text()))
    (ledger,) = book.load_all(tmp_path / "out")
    assert ledger.steps[0]["detail"] == resume.INTERRUPTED
    assert [r["bytes"] for r in ledger.records] == [1]
    assert resume.order(ledger, [Step("slow", (), 1)], [])


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    # One real round trip through the command line, the worker and machine.py.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-m", "fusedmlp.bench", "campaign", "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=worker.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "torch finds none: nothing was run or written" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_runs_the_plan_and_copies_its_records(tmp_path, monkeypatch, capsys):
    from fusedmlp.bench import cli

    made_up = lambda: [step("a", emitting(7)), step("b", "sys.exit(3)")]  # noqa: E731
    monkeypatch.setattr(command, "discover", lambda: MACHINE)
    # The process of these tests is older than any box.
    monkeypatch.setattr(command, "process_age_s", lambda: 0.0)
    monkeypatch.setitem(plans.PLANS, "brief", plans.Plan("brief", 8, "", made_up))
    file = tmp_path / "copy.json"
    code = cli.main(["campaign", "--out", str(tmp_path / "out"), "--json", str(file)])
    assert code == 1  # b failed
    assert [r["bytes"] for r in json.loads(file.read_text())["records"]] == [7]
    assert "b" in capsys.readouterr().out


def test_the_commit_of_a_tree_without_git_comes_from_the_environment(tmp_path, monkeypatch):
    records = tmp_path / "records"
    monkeypatch.setenv(process.RECORDS, str(records))
    monkeypatch.setenv("FUSEDMLP_COMMIT", "feedbeef")
    worker.environment()
    assert json.loads(records.read_text())["machine"]["commit"] == "feedbeef"


def test_the_plan_covers_every_op_and_every_command_of_it_parses():
    from fusedmlp.bench import cli

    steps = plans.PLANS["full"].steps()
    names = [s.name for s in steps]
    assert len(names) == len(set(names))
    for op in {case.op for case in CASES.values()}:
        assert {f"check:{op}", f"memcheck:{op}", f"racecheck:{op}", f"time:{op}"} <= set(names)
    portable = {"masked_gated_linear", "binary_gated_mlp", "top1_route"}
    for op in (*loader.ops_with_kernels(portable=False), *portable):
        assert f"check:cuda:{op}" in names
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert {f"{tool}:cuda:gated_mlp", f"{tool}:cuda:mlp"} <= set(names)
        assert {f"{tool}:cuda:{op}" for op in portable} <= set(names)
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in names))
    assert kinds == [
        "check", "build", "memcheck", "time", "racecheck", "synccheck", "tests", "tune",
    ]  # fmt: skip
    parser = cli.parser()
    for s in steps:
        module, arguments = s.argv[2], s.argv[3:]
        if module == "fusedmlp.bench":
            parser.parse_args(arguments)  # exits on an argument that the command does not know
            # What a campaign may add.
            parser.parse_args([*arguments, *(["--without", *s.without] if s.without else [])])
        elif arguments[0] == "sanitize":
            assert arguments[2] in CASES


def test_a_hang_of_a_kernel_under_development_costs_little():
    """Every CUDA step waits for the first check, which has 90 s; what others time leaves it out."""
    steps = {s.name: s for s in plans.PLANS["full"].steps()}
    first = steps["check:cuda:gated_linear"]
    assert first.budget_s <= 90
    assert first.needs == "build"
    for s in steps.values():
        if ":cuda:" in s.name and s is not first:
            needed = s
            while needed.needs and needed is not first:
                assert list(steps).index(needed.needs) < list(steps).index(needed.name)
                needed = steps[needed.needs]
            assert needed is first, s.name
        elif s.name.startswith("time:"):
            op = s.name.split(":")[1]
            named = f"check:cuda:{op}"
            served = {"fusedmlp-cuda": named} if named in steps else {}
            assert s.without == served
        assert all(needed in steps for needed in s.without.values())


def test_variants_are_timed_before_anything_is_compared_or_tuned():
    names = [s.name for s in plans.PLANS["full"].steps()]
    first = names.index("time:cuda:gated_linear_fwd")
    assert all(names.index(n) < first for n in names if n.startswith("check:"))
    assert first < names.index("time:gated_act") < names.index("tests")


@pytest.fixture
def building(tmp_path, monkeypatch):
    """worker.build() in a made-up checkout for an sm_90; returns (code, verdict, commands)."""
    from fusedmlp.kernels import device

    (tmp_path / "csrc").mkdir()
    records = tmp_path / "records"
    monkeypatch.setenv(process.RECORDS, str(records))
    monkeypatch.setattr(worker, "ROOT", tmp_path)
    monkeypatch.setattr(cache, "EXTENSION_STAMP", tmp_path / "_C.stamp")
    monkeypatch.setattr(device, "capability_of", lambda device: 90)

    def build(
        kernels=("gated_linear_sm90.cu",),
        code=0,
        tools=("cmake",),
        loaded=(None, "the CUDA extension ..."),
    ):
        for name in kernels:
            (tmp_path / "csrc" / name).touch()
        commands = []

        def ran(command, **options):
            commands.append(command)
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(worker.subprocess, "run", ran)
        monkeypatch.setattr(
            worker.shutil, "which", lambda name, path: name if name in tools else None
        )
        monkeypatch.setattr(loader, "load", lambda: loaded)
        done = worker.build()
        verdicts = records.read_text().splitlines() if records.exists() else []
        return done, [json.loads(line)["step"] for line in verdicts], commands

    return build


def test_the_build_is_for_this_gpu_and_into_this_checkout(building, tmp_path):
    extension = SimpleNamespace(CUDA="13.0", ARCHS="sm_90a")
    code, verdict, commands = building(loaded=(extension, ""))
    assert (code, verdict) == (0, [{"status": "ok", "detail": "CUDA 13.0, for sm_90a"}])
    assert json.loads((tmp_path / "_C.stamp").read_text()) == cache.extension_stamp()
    configure, build, install = commands
    assert "-DFUSEDMLP_CUDA_ARCHS=90;90a" in configure
    assert f"-DPython_EXECUTABLE={sys.executable}" in configure
    assert "--build" in build
    assert install[-1] == str(tmp_path / "fusedmlp")


def test_an_extension_that_was_carried_is_not_built_again(building, tmp_path):
    suffix = cache.extension_stamp()["python"]
    (tmp_path / f"_C{suffix}").touch()
    cache.stamp_extension()
    extension = SimpleNamespace(CUDA="13.0", ARCHS="sm_90a")
    code, (verdict,), commands = building(loaded=(extension, ""))
    assert (code, commands) == (0, [])
    assert verdict == {"status": "ok", "detail": "CUDA 13.0, for sm_90a, carried"}


def test_a_build_that_fails_says_so(building, tmp_path):
    assert building(code=2)[:2] == (2, [])
    assert not (tmp_path / "_C.stamp").exists()


def test_a_build_without_its_tools_says_which(building, capsys):
    code, verdict, commands = building(tools=())
    assert (code, verdict, commands) == (1, [], [])
    assert "pip install cmake ninja pybind11; there is no cmake" in capsys.readouterr().out


def test_a_build_that_does_not_load_says_so(building):
    assert building()[1] == [{"status": "failed", "detail": "the CUDA extension ..."}]


def test_nothing_is_built_where_no_kernel_is_written_for_the_gpu(building):
    code, (verdict,), commands = building(kernels=("gated_linear_sm100.cu",))
    assert (code, commands, verdict["status"]) == (0, [], "skipped")
    assert verdict["detail"].endswith("holds no CUDA kernel for sm_90")


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "ok"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ok"),
        (
            99,
            "========= Invalid __global__ read of size 16\n========= ERROR SUMMARY: 1 error",
            "failed",
        ),
        (0, "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", "failed"),
        (1, "========= ERROR SUMMARY: 0 errors", "failed"),
        (0, "it did not start", "failed"),
    ],
)
def test_the_sanitizers_words_are_understood(code, output, status):
    assert worker.read_sanitizer(code, output)[0] == status


def test_pytests_result_is_one_line_and_the_names_of_failures(tmp_path):
    (tmp_path / "test_made_up.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "def test_skipped(): pytest.skip('x')\n"
    )
    junit = tmp_path / "junit.xml"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    subprocess.run([*argv, str(tmp_path)], capture_output=True, cwd=tmp_path)
    lines = worker._junit(junit).splitlines()
    assert lines[0] == "1 passed, 1 failed, 1 skipped"
    assert len(lines) == 2
    assert lines[1].endswith("::test_bad")


def test_the_summary_never_passes_60_lines():
    sample = book.load(Path(__file__).parents[2] / "data" / "synthetic.json")
    checks, times = sample.of_kind("check"), sample.of_kind("time")
    for n in range(100):
        sample.add_step(f"step{n}", "failed", 1, "why\nmore")
        sample.add_record({**checks[0], "M": n, "passed": False})
        sample.add_record({**times[0], "op": f"op{n}", "case": f"op{n}"})
        sample.add_record({**sample.of_kind("sanitizer")[1], "case": f"case{n}"})
        sample.add_record({**sample.of_kind("tune")[0], "M": n})
    lines = summary.summary(sample)
    assert len(lines) <= summary.LIMIT
    text = "\n".join(lines)
    for head in ("steps: ", "check: ", "compute-sanitizer: ", "peak: ", "time: ", "tune: "):
        assert head in text
    assert "more lines" in text


def test_the_summary_names_failures_and_speeds():
    text = "\n".join(
        summary.summary(book.load(Path(__file__).parents[2] / "data" / "synthetic.json"))
    )
    assert "check: 3 of 4 passed" in text
    assert "gated_linear-bias silu bfloat16 509x1021x1531: dx" in text
    assert "killed   time:mlp" in text
    assert "6.393 ms, 602 TFLOP/s, 87.7% of cuBLAS, 0.93x quack" in text
