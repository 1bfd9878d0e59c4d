"""Steps at the same time, files that come back, and a campaign that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaign_steps import MACHINE, PRELUDE, emitting, gone, run, statuses, step

from fusedmlp.bench import process
from fusedmlp.bench.campaign import outputs, resume, runner, worker
from fusedmlp.bench.campaign.runner import Box, process_age_s
from fusedmlp.bench.report import ledger as book


@pytest.fixture(autouse=True)
def no_other_results(monkeypatch, tmp_path):
    monkeypatch.setattr(resume, "RESULTS", tmp_path / "published")


def pooled(name, code, at_once=3, **more):
    return step(name, code, stage="pool", at_once=at_once, **more)


def meeting(folder, name, count):
    """Waits until `count` steps are here at the same time."""
    return f"""
import glob
open({str(folder)!r} + "/here-{name}", "w").close()
end = time.monotonic() + 15
while len(glob.glob({str(folder)!r} + "/here-*")) < {count}:
    assert time.monotonic() < end, "alone"
    time.sleep(0.01)
"""


def test_steps_of_a_stage_run_at_the_same_time_and_no_more_than_asked(tmp_path):
    steps = [pooled(n, meeting(tmp_path, n, 3) + emitting(i)) for i, n in enumerate("abc", 1)]
    late = f"assert len(os.listdir({str(tmp_path)!r})) == 4, os.listdir({str(tmp_path)!r})"
    ran = run([*steps, step("after", late)], tmp_path / "out")
    assert statuses(ran) == dict.fromkeys(["a", "b", "c", "after"], "ok")
    assert sorted(r["bytes"] for r in ran.records) == [1, 2, 3]


def test_a_pool_waits_for_what_a_step_needs_and_takes_another_meanwhile(tmp_path):
    note = lambda name: f"open({str(tmp_path)!r} + '/order', 'a').write('{name} ')\n"  # noqa: E731
    # Until the other has written: how long a process takes to begin is the machine's luck.
    order = repr(str(tmp_path / "order"))
    meanwhile = f"import os\nwhile not os.path.exists({order}): time.sleep(0.01)\n"
    steps = [
        pooled("build", meanwhile + note("build"), 2),
        pooled("check", note("check"), 2, needs="build"),
        pooled("other", note("other"), 2),
    ]
    ran = run(steps, tmp_path / "out")
    assert (tmp_path / "order").read_text() == "other build check "
    assert set(statuses(ran).values()) == {"ok"}


def test_a_hang_in_a_pool_costs_its_step_alone(tmp_path):
    steps = [
        pooled("hangs", emitting(1) + "time.sleep(60)", budget_s=5),
        pooled("crashes", emitting(2) + "os.abort()"),
        pooled("good", emitting(3)),
        pooled("needs", "", needs="hangs"),
    ]
    ran = run(steps, tmp_path / "out")
    assert statuses(ran) == {
        "hangs": "killed", "crashes": "failed", "good": "ok", "needs": "skipped",
    }  # fmt: skip
    assert sorted(r["bytes"] for r in ran.records) == [1, 2, 3]


def test_one_log_one_ledger_one_summary(tmp_path):
    code = "print('first line', flush=True)\nprint('x' * 50)\nprint('no newline', end='')"
    ran = run([step("a", code), step("b", "print('of b')")], tmp_path / "out")
    files = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert files == [".json", ".log", ".txt"]
    log = ran.path.with_suffix(".log").read_text()
    for line in ("a| first line", "a| no newline", "a| == ok after", "b| of b"):
        assert line in log
    assert "steps: 2 ok" in ran.path.with_suffix(".txt").read_text()


def test_what_one_step_prints_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "STEP_BYTES", 1000)
    monkeypatch.setattr(outputs, "LOG_BYTES", 3000)
    ran = run([step(n, "for i in range(500): print('line', i)") for n in "abcd"], tmp_path / "out")
    text = ran.path.with_suffix(".log").read_text()
    assert text.count("a| line") < 200
    assert "a| (more lines are left out)" in text
    assert len(text) < 3200


def test_a_missing_package_skips_its_step_without_a_process(tmp_path):
    ran = run([step("rival", "", module="no_such_package")], tmp_path / "out")
    assert statuses(ran) == {"rival": "skipped"}
    assert ran.steps[0]["detail"] == "the Python package no_such_package is not installed"


def test_a_step_is_told_which_ledger_it_belongs_to(tmp_path):
    code = "emit({'step': {'status': 'ok', 'detail': os.environ['FUSEDMLP_LEDGER']}})"
    ran = run([step("a", code)], tmp_path / "out")
    assert ran.steps[0]["detail"] == str(ran.path)


def test_the_box_counts_from_the_start_of_the_process():
    code = """
import time
time.sleep(1)
from fusedmlp.bench.campaign.runner import Box, process_age_s
print(process_age_s(), Box(1, process_age_s()).left_s())
"""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=worker.ROOT, capture_output=True, text=True
    )
    took = time.monotonic() - start
    age, left = map(float, done.stdout.split())
    assert 1 < age <= took
    assert left == pytest.approx(60 - runner.SUMMARY_S - age, abs=2)
    assert Box(1).left_s() == pytest.approx(60 - runner.SUMMARY_S, abs=2)
    assert process_age_s() > 0


def killed_campaign(tmp_path, code):
    """A campaign of one step, killed with SIGKILL once the step has written its process's id."""
    pids = tmp_path / "pids"
    child = f"{PRELUDE}\n{emitting(1, 2)}{code.format(pids=str(pids))}"
    program = f"""
import pathlib, sys
from fusedmlp.bench.campaign import resume, runner, steps
step = steps.Step("slow", (sys.executable, "-c", {child!r}), 60)
ledger = resume.open_ledger({MACHINE!r}, [step], pathlib.Path({str(tmp_path / "out")!r}), [])
runner.run_campaign(ledger, [step], runner.Box(5))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=worker.ROOT)
    path = None
    for _ in range(3000):
        found = list((tmp_path / "out").glob("*.json"))
        if pids.exists() and pids.read_text().endswith("\n") and found:
            path = found[0]
            if len(book.load(path).records) == 2:
                break
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    return path, [int(pid) for pid in pids.read_text().split()]


def test_a_killed_command_leaves_a_ledger_that_reads_and_no_process(tmp_path):
    code = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({pids!r}, "w").write(f"{{os.getpid()}} {{os.getppid()}} {{child.pid}}\\n")
time.sleep(60)
"""
    path, pids = killed_campaign(tmp_path, code)
    assert len(pids) == 3
    assert all(gone(pid) for pid in pids)
    ledger = book.load(path)
    assert [r["bytes"] for r in ledger.records] == [1, 2]
    assert resume.order(ledger, [step("slow", "")], []) != []


def test_a_guard_whose_parent_is_gone_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    argv = [sys.executable, str(process.GUARD), "1", "touch", str(mark)]
    done = subprocess.run(argv, start_new_session=True, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not mark.exists()


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV)],
)
def test_a_guard_ends_as_its_command_does(code, expected):
    argv = [sys.executable, str(process.GUARD), str(os.getpid()), sys.executable, "-c", code]
    done = subprocess.run(argv, start_new_session=True, capture_output=True)
    assert done.returncode == expected


def test_one_that_cannot_be_killed_does_not_stop_the_rest(tmp_path, monkeypatch):
    """As a process in the kernel's hands: SIGKILL is sent, and nothing ends."""
    monkeypatch.setattr(process, "REAP_S", 0.2)
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda pid, number: None)
    start = time.monotonic()
    steps = [step("stuck", "time.sleep(60)", budget_s=0.5), step("next", emitting(2))]
    ran = run(steps, tmp_path / "out")
    assert time.monotonic() - start < 30
    assert statuses(ran) == {"stuck": "killed", "next": "ok"}
    assert "cannot be killed" in ran.steps[0]["detail"]
    (pid,) = {int(p) for p in ran.steps[0]["detail"].split() if p.isdigit() and int(p) > 100}
    kill(pid, signal.SIGKILL)


def test_a_ledger_that_is_read_while_it_is_written_is_whole(tmp_path):
    reader = f"""
import glob
seen = 0
for i in range(1, 200):
    {emitting("i").strip()}
    for path in glob.glob({str(tmp_path / "out")!r} + "/*.json"):
        seen += bool(json.load(open(path))["machine"])
assert seen > 100
"""
    ran = run([step("a", reader)], tmp_path / "out")
    assert statuses(ran) == {"a": "ok"}
    assert len(ran.records) == 199
    assert json.loads(Path(ran.path).read_text())["records"] == ran.records
