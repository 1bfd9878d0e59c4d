"""The campaign's steps that are no command: python -m fusedmlp.bench.worker STEP [ARGUMENT ...]

| step | does | hands over |
|---|---|---|
| environment | describes this machine | {"machine": ...} |
| tests | the test suite on the GPU | its verdict |
| sanitize TOOL CASE | one small case under compute-sanitizer | one sanitizer record |
| exercise CASE | that case, forward and backward, on the kernels | nothing |
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .process import emitter

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck")
# Aligned with ragged tiles (TMA or vector loads), off every alignment (element loads), few rows.
SMALL = ((130, 136, 72), (67, 131, 45), (3, 136, 72))


def _verdict(emit: Callable[[dict[str, Any]], None], status: str, detail: str) -> None:
    emit({"step": {"status": status, "detail": detail}})


def environment() -> None:
    from . import machine

    found = machine.describe()
    # A copied tree has no git; whoever copied it can still say what it is.
    commit = os.environ.get("FUSEDMLP_COMMIT") or found["commit"] or "unknown"
    emitter()({"machine": {**found, "commit": commit}})


def tests() -> int:
    """pytest, in parallel where xdist is installed: most of its time on a GPU is compiling."""
    emit = emitter()
    if not (ROOT / "tests").is_dir():
        _verdict(emit, "skipped", f"no tests at {ROOT}: not a checkout")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        argv = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu or not slow",
            "-v",
            f"--junitxml={junit}",
        ]
        if importlib.util.find_spec("xdist") is not None:
            argv += ["-n", str(min(8, os.cpu_count() or 1))]
        code = subprocess.run(argv, cwd=ROOT).returncode
        detail = _junit(junit) if junit.exists() else f"pytest wrote no result, exit code {code}"
    _verdict(emit, "ok" if code == 0 else "failed", detail)
    return 0


def _junit(path: Path) -> str:
    """One line of totals, then the names of what failed."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    first = f"{passed} passed, {len(bad)} failed, {total['skipped']} skipped"
    return "\n".join([first, *bad])


def exercise(name: str) -> None:
    """One case on the kernels at each of the SMALL sizes; its numbers are check's business."""
    import torch

    from .. import backend
    from ..testing import CASES, evaluate

    case = CASES[name]
    with backend("triton"):
        for m, d, h in SMALL:
            inputs = case.inputs(m, d, h, torch.bfloat16, "cuda")
            dy = torch.ones_like(case.run(inputs))
            evaluate(case.run, inputs, dy)
    torch.cuda.synchronize()


def find_sanitizer() -> str | None:
    """compute-sanitizer from PATH, a CUDA toolkit, or NVIDIA's Python packages."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [f"{home}/{sub}" for home in homes if home for sub in ("bin", "compute-sanitizer")]
    places += [str(path.parent) for path in site.glob("**/compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *places])
    return shutil.which("compute-sanitizer", path=path)


def sanitize(tool: str, case: str) -> None:
    emit = emitter()
    program = find_sanitizer()
    if program is None:
        _verdict(emit, "skipped", "compute-sanitizer is not installed here")
        return
    argv = [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    argv += [sys.executable, "-m", __spec__.name, "exercise", case]
    # torch's cache would hand out neighbours of a freed block, and hide an access past the end.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    status, detail = read_sanitizer(done.returncode, done.stdout + done.stderr)
    record = {"kind": "sanitizer", "tool": tool, "case": case, "status": status, "detail": detail}
    emit(record)
    _verdict(emit, status, detail)


def read_sanitizer(code: int, output: str) -> tuple[str, str]:
    """(status, first finding): ok needs both exit code 0 and a summary that counts nothing."""
    lines = [line.lstrip("= ").strip() for line in output.splitlines() if line.startswith("=====")]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), None)
    if summary is None:
        return "failed", f"no summary, exit code {code}: {output[-300:]}"
    # "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    found = any(int(n) for n in re.findall(r"\d+", summary))
    if code == 0 and not found:
        return "ok", summary
    first = next((line for line in lines if re.search(r"(?i)invalid|race|error", line)), "")
    return "failed", f"{summary}; exit code {code}; {first}"


def main(argv: list[str]) -> int:
    step, *rest = argv
    if step == "tests":
        return tests()
    steps: dict[str, Callable[..., None]] = {
        "environment": environment,
        "exercise": exercise,
        "sanitize": sanitize,
    }
    steps[step](*rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
