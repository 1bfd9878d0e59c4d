"""The whole brief plan without a GPU: the real command and the real steps on a device that stands
in, with a fault of each kind planted. What comes back is complete."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaign_steps import gone

from fusedmlp.bench.campaign import plans, resume, worker
from fusedmlp.bench.report import ledger as book
from fusedmlp.bench.report.command import collect

STANDIN = Path(__file__).parents[2] / "support" / "standin"
BRIEF = plans.PLANS["brief"].steps()
# regex of a command line, what is planted, the call at which it happens.
FAULTS = [
    [r" check --op binary_linear$", "hang", 3],
    [r" check --op linear_act$", "crash", 5],
    [r" check --op gated_act$", "illegal access", 4],
    [r" time .*--case gated_act ", "out of memory", 6],
    [r" time .*--case binary_linear ", "failed capture", 4],
]


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """The environment of a machine that stands in for one with a GPU."""
    folder = tmp_path_factory.mktemp("standin")
    path = f"/tmp/fusedmlp-standin-{os.getpid()}"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSEDMLP_BACKEND")}
    env |= {"PYTHONPATH": str(worker.ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, str(STANDIN / "server.py"), path, str(folder / "checkout")]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        yield {**env, "STANDIN": path, "FUSEDMLP_COMMIT": "5eed"}, server.pid
        server.kill()
    os.unlink(path)


def start(standin, out, *arguments, faults=()):
    env = {**standin[0], "STANDIN_FAULTS": json.dumps(faults)}
    argv = [sys.executable, str(STANDIN / "campaign.py"), "--out", str(out), *arguments]
    return subprocess.Popen(
        argv, env=env, cwd=worker.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def children(pid):
    """Processes whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def rehearsed(standin, tmp_path_factory):
    """(output, exit code, seconds, folder) of the brief plan with every fault in it."""
    out = tmp_path_factory.mktemp("out")
    begin = time.monotonic()
    with start(standin, out, "--minutes", "4", faults=FAULTS) as command:
        text, _ = command.communicate(timeout=240)
    print(text)  # which CI shows
    return text, command.returncode, time.monotonic() - begin, out


@pytest.fixture(scope="module")
def ledger(rehearsed):
    (found,) = book.load_all(rehearsed[3])
    return found


def test_every_step_of_the_plan_is_in_the_ledger(rehearsed, ledger):
    steps = {s["name"]: s for s in ledger.steps}
    assert set(steps) == {step.name for step in BRIEF}, rehearsed[0]
    bad = {name for name, s in steps.items() if s["status"] in ("failed", "killed")}
    planted = {"check:binary_linear", "check:linear_act", "check:gated_act", "time:bits", "tests"}
    assert bad == planted, "\n".join(steps[name]["detail"] for name in bad - planted)
    # Baselines of packages that are not here.
    skipped = {name for name, s in steps.items() if s["status"] == "skipped"}
    assert all(name.startswith("time:rival:") for name in skipped)
    assert not any(s["detail"].startswith(resume.OUT_OF_TIME) for s in ledger.steps)
    assert rehearsed[1] == 1


def test_a_hang_and_a_crash_cost_their_own_step(ledger):
    steps = {s["name"]: s for s in ledger.steps}
    assert steps["check:binary_linear"]["status"] == "killed"
    assert steps["check:binary_linear"]["detail"].startswith("killed at its limit")
    assert "died of SIGSEGV" in steps["check:linear_act"]["detail"]
    # What they had found by then is there.
    for op in ("binary_linear", "linear_act"):
        found = [r for r in ledger.of_kind("check") if r["op"] == op and r["passed"]]
        assert found, op
    assert steps["check:binary_gated_linear"]["status"] == "ok"


def test_an_illegal_access_costs_its_case_and_says_what_was_not_run(ledger):
    found = [r for r in ledger.of_kind("check") if r["op"] == "gated_act" and r["M"] != 2048]
    passed = [r for r in found if r["passed"]]
    wrong = [r for r in found if "illegal memory access" in r.get("error", "")]
    rest = [r for r in wrong if r["error"].startswith("not run: the CUDA context is lost")]
    assert passed
    assert len(wrong) - len(rest) == 1
    assert rest
    assert len(passed) + len(wrong) == len(found)


def test_out_of_memory_costs_one_number(ledger):
    times = [r for r in ledger.of_kind("time") if r["case"] == "gated_act"]
    reasons = [r["skipped"] for r in times if r["skipped"]]
    assert reasons == ["failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 200.00 GiB"]
    assert any(r["median_ms"] for r in times)


def test_a_failed_capture_leaves_what_was_found_before(ledger):
    times = [r for r in ledger.of_kind("time") if r["case"] == "binary_linear"]
    reasons = [r["skipped"] for r in times if r["skipped"]]
    assert sum(reason.startswith("failed: CaptureFailed") for reason in reasons) == 1
    after = [r for r in reasons if r.startswith("not run: a CUDA graph could not be captured")]
    assert len(after) == len(reasons) - 1 > 0
    assert any(r["median_ms"] for r in times if r["provider"] == "fusedmlp")


def test_everything_else_is_measured(ledger):
    assert {r["kind"] for r in ledger.records} == {
        "check", "time", "peak", "sanitizer", "tune", "tile", "answer",
    }  # fmt: skip
    assert {r["op"] for r in ledger.of_kind("check")} == {
        step.name.rpartition(":")[2] for step in BRIEF if re.match("check:[a-z0-9_]*$", step.name)
    }
    assert {r["question"] for r in ledger.of_kind("answer")} == {"stacked-box", "narrow-halves"}
    timed = [r for r in ledger.of_kind("time") if r["skipped"] is None]
    assert all(r["sm_mhz"]["median_mhz"] == 1980 for r in timed)
    assert {r["phase"] for r in timed} == {"forward", "backward", "both", "dglu"}


def test_three_files_come_back_and_they_agree(rehearsed, ledger):
    text, _, seconds, out = rehearsed
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".log", ".txt"]
    log = ledger.path.with_suffix(".log").read_text()
    for step in ledger.steps:
        assert f"{step['name']}| == {step['status']}" in log
    summary = ledger.path.with_suffix(".txt").read_text()
    assert summary.strip() in text
    assert len(summary.splitlines()) <= 60
    assert "SIGSEGV" in summary
    # Steps of one stage did run at the same time.
    assert sum(s["seconds"] for s in ledger.steps) > 1.3 * seconds or os.cpu_count() == 1
    # The report takes it, as soon as somebody says that it is made up.
    assert collect(out, made_up=True)[0].records == ledger.records


def test_a_killed_command_leaves_no_process_and_goes_on(standin, tmp_path):
    """SIGKILL in the pool of checks; then the same command again."""
    only = "^(time:first|check:(gated_act|mlp|moe_mlp|top1_route)|ask:)"
    argv = ("--only", only, "--minutes", "2")
    slow = [[" check --op (mlp|moe_mlp)$", "hang", 2]]
    command = start(standin, tmp_path / "out", *argv, faults=slow)
    path = None
    for _ in range(3000):
        found = list((tmp_path / "out").glob("*.json"))
        checked = bool(found) and len(book.load(found[0]).of_kind("check")) > 3
        if checked and len(children(standin[1])) > 1:
            path = found[0]
            break
        time.sleep(0.02)
    working = children(standin[1])
    os.kill(command.pid, signal.SIGKILL)
    command.communicate(timeout=30)
    assert path is not None
    assert working
    assert all(gone(pid) for pid in working)
    before = book.load(path)
    assert before.of_kind("time")
    with start(standin, tmp_path / "out", *argv) as again:
        text, _ = again.communicate(timeout=60)
    assert again.returncode == 0, text
    after = book.load(path)
    assert {book.identity(r) for r in before.records} <= {book.identity(r) for r in after.records}
    assert {s["status"] for s in after.steps} == {"ok"}
    assert len(after.steps) == 7
    assert len(list((tmp_path / "out").iterdir())) <= 6
