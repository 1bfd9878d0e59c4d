"""The campaign's steps that are no command.

    python -m fusedmlp.bench.campaign.worker STEP [ARGUMENT ...]

| step | does | hands over |
|---|---|---|
| environment | describes this machine | {"machine": ...} |
| tests [brief] | the tests that need a GPU; brief: without those of models' sizes | its verdict |
| build | the CUDA extension, for this GPU alone, into this checkout | its verdict |
| ask NAME | one question of questions.py | its answer |
| sanitize TOOL CASE [BACKEND] | one small case under compute-sanitizer | one sanitizer record |
| exercise CASE [BACKEND] | that case, forward and backward, on the kernels | nothing |
"""

from __future__ import annotations

import importlib
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

from ..gate import cache
from ..process import emitter

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck")
SANITIZERS_CUDA = (*SANITIZERS, "synccheck")
# Aligned with ragged tiles (TMA or vector loads), off every alignment (element loads), few rows.
SMALL = ((130, 136, 72), (67, 131, 45), (3, 136, 72))
# For the CUDA kernels: more tiles than multiprocessors, with tails on every side; one row of tiles.
SMALL_CUDA = ((1040, 72, 2184), (3, 136, 72))
# For those that decode: D in parts, and in one; in whole groups of one-bit weights.
SMALL_DECODED = ((16, 4224, 256), (3, 256, 128))


def _verdict(emit: Callable[[dict[str, Any]], None], status: str, detail: str) -> None:
    emit({"step": {"status": status, "detail": detail}})


def environment() -> None:
    from .. import machine

    found = machine.describe()
    # A copied tree has no git; whoever copied it can still say what it is.
    commit = os.environ.get("FUSEDMLP_COMMIT") or found["commit"] or "unknown"
    emitter()({"machine": {**found, "commit": commit}})


def gpu_tests(how: str = "") -> tuple[str, ...]:
    """pytest's selection of the tests that need a GPU; brief: without those of models' sizes."""
    return ("-m", "gpu and not slow", *(("-k", "not model_sizes") if how == "brief" else ()))


def tests(how: str = "") -> int:
    """pytest, in parallel where xdist is installed: most of its time on a GPU is compiling. What
    needs no GPU runs elsewhere."""
    emit = emitter()
    if not (ROOT / "tests").is_dir():
        _verdict(emit, "skipped", f"no tests at {ROOT}: not a checkout")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        argv = [sys.executable, "-m", "pytest", *gpu_tests(how), "-v", f"--junitxml={junit}"]
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


def build() -> int:
    """Unless one was carried along, of these very sources: one without a stamp may be older."""
    import torch

    from ...backends.cuda import loader
    from ...kernels.device import capability_of

    emit = emitter()
    capability = capability_of(torch.device("cuda"))
    if not any((ROOT / "csrc").glob(f"*_sm{capability}.cu")):
        status = "ok" if loader.available() else "skipped"
        _verdict(emit, status, f"{ROOT} holds no CUDA kernel for sm_{capability}")
        return 0
    carried = cache.extension_is_carried()
    if not carried and (code := build_for(capability)):
        return code
    importlib.invalidate_caches()
    extension, why = loader.load()
    says = why
    if extension is not None:
        says = f"CUDA {extension.CUDA}, for {extension.ARCHS}{', carried' if carried else ''}"
    _verdict(emit, "failed" if extension is None else "ok", says)
    return 0


def build_for(capability: int) -> int:
    """The extension into this checkout, with a stamp; the exit code of what failed."""
    folder = str(ROOT / "build" / f"bench-{sys.implementation.cache_tag}")
    archs = f"{capability};{capability}a"  # kernels for any architecture, and those of this one
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ["PATH"], *(f"{home}/bin" for home in homes if home)])
    for command in (
        ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja",
         f"-DPython_EXECUTABLE={sys.executable}", f"-DFUSEDMLP_CUDA_ARCHS={archs}",
         "-DFUSEDMLP_CUDA_STRICT=ON"],
        ["cmake", "--build", folder, "--parallel", str(min(8, os.cpu_count() or 1))],
        ["cmake", "--install", folder, "--prefix", str(ROOT / "fusedmlp")],
    ):  # fmt: skip
        program = shutil.which(command[0], path=path)
        if program is None:
            print("the extension needs nvcc, cmake, ninja and pybind11: pip install cmake ninja "
                  f"pybind11; there is no {command[0]}")  # fmt: skip
            return 1
        code = subprocess.run([program, *command[1:]], env={**os.environ, "PATH": path}).returncode
        if code:
            return code
    cache.stamp_extension()
    return 0


def exercise(name: str, on: str = "triton") -> None:
    """One case on the kernels at each small size; its numbers are check's business."""
    import torch

    from ... import backend
    from ...backends.cuda import loader
    from ...backends.cuda.gated_linear import variant
    from ...testing import CASES, evaluate

    case = CASES[name]
    decoded = on == "cuda" and loader.decoded(case.op)
    sizes, variants = (SMALL_CUDA, _variants(case.op)) if on == "cuda" else (SMALL, [None])
    if decoded:
        sizes = SMALL_DECODED
    with backend(on):
        for chosen in variants:
            for m, d, h in sizes:
                # This is all that is known of a run that hangs.
                print(f"{name} {m}x{d}x{h} on {on}, {chosen or 'own choice'}", flush=True)
                inputs = case.inputs(m, d, h, torch.bfloat16, "cuda")
                with variant(chosen):
                    y = case.run(inputs)
                    if not (decoded or case.forward_only):
                        evaluate(case.run, inputs, torch.ones_like(y))
                torch.cuda.synchronize()


def _variants(op: str) -> list[str | None]:
    """The kernels' own choice, then what all kernels of the op can be asked for here."""
    import torch

    from ...backends.cuda import loader
    from ...backends.cuda.gated_linear import variants
    from ...kernels.device import capability_of

    capability = capability_of(torch.device("cuda"))
    first, *rest = (variants(kernel, capability) for kernel in loader.kernels_of(op))
    return [None, *(name for name in first if all(name in others for others in rest))]


def ask(name: str) -> None:
    from .questions import record_of

    emitter()(record_of(name))


def find_sanitizer() -> str | None:
    """compute-sanitizer from PATH, a CUDA toolkit, or NVIDIA's Python packages."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [f"{home}/{sub}" for home in homes if home for sub in ("bin", "compute-sanitizer")]
    places += [str(path.parent) for path in site.glob("**/compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *places])
    return shutil.which("compute-sanitizer", path=path)


def sanitize(tool: str, case: str, on: str = "triton") -> None:
    emit = emitter()
    program = find_sanitizer()
    if program is None:
        _verdict(emit, "skipped", "compute-sanitizer is not installed here")
        return
    argv = [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    argv += [sys.executable, "-m", __spec__.name, "exercise", case, on]
    # torch's cache would hand out neighbours of a freed block, and hide an access past the end.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    status, detail = read_sanitizer(done.returncode, done.stdout + done.stderr)
    about = {"kind": "sanitizer", "tool": tool, "case": case, "backend": on}
    emit({**about, "status": status, "detail": detail})
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
    judged: dict[str, Callable[..., int]] = {"tests": tests, "build": build}
    if step in judged:
        return judged[step](*rest)
    steps: dict[str, Callable[..., None]] = {
        "ask": ask,
        "environment": environment,
        "exercise": exercise,
        "sanitize": sanitize,
    }
    steps[step](*rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
