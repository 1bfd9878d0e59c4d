"""Runs a part of the suite on the releases that pyproject.toml promises, each set of them in an
environment of its own under build/floors.

| environment | torch, triton, numpy, transformers | Python |
|---|---|---|
| oldest | the least that pyproject.toml admits | the least, if it is on this machine |
| newest | what pip finds | the newest on this machine |
| mixed | old torch and Triton beside new NumPy, as on an image that lags | 3.12 |

    python tests/floors.py [oldest] [newest] [mixed]

Each takes 6 GB where pip brings a CUDA build of torch, which runs here without a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "floors"
PACKAGES = ("torch", "triton", "numpy", "transformers")
TESTS = (
    "tests/ops/test_each_op.py",
    "tests/kernels",
    "tests/layers/test_layers_every.py",
    "tests/patching",
    "tests/weights",
)
NEWEST_MINOR = 20


class Environment(NamedTuple):
    """`pythons`: minor versions of Python 3, the first of which is meant. `extras`: of the package;
    with quantisers' packages, patch-report is compared with models that are really quantised."""

    name: str
    pins: dict[str, str]
    pythons: Iterable[int]
    extras: str = "test"


def environments() -> list[Environment]:
    project = (ROOT / "pyproject.toml").read_text()
    least = dict(re.findall(r'"(\w+)>=([\d.]+)"', project))
    (minor,) = re.findall(r'requires-python = ">=3\.(\d+)"', project)
    oldest = {name: f"{least[name]}.0" for name in PACKAGES}
    mixed = {"torch": "2.11.*", "triton": "3.6.*", "numpy": "2.5.*", "transformers": "5.17.*"}
    return [
        Environment("oldest", oldest, range(int(minor), NEWEST_MINOR)),
        Environment("newest", {}, range(NEWEST_MINOR, int(minor) - 1, -1), "test,test-quantised"),
        Environment("mixed", mixed, (12,)),
    ]


def python(minors: Iterable[int]) -> str:
    """The first Python on this machine, on the PATH or among pyenv's, else the running one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in minors:
        name = f"python3.{minor}"
        for path in (name, *map(str, sorted(pyenv.glob(f"3.{minor}.*/bin/{name}")))):
            try:
                if not subprocess.run([path, "-c", ""], capture_output=True).returncode:
                    return path
            except OSError:
                continue
    return sys.executable


def made(environment: Environment) -> Path:
    """The Python of the environment, everything installed."""
    home = FOLDER / environment.name
    subprocess.run([python(environment.pythons), "-m", "venv", "--clear", home], check=True)
    pins = [f"{name}=={environment.pins[name]}" for name in PACKAGES if name in environment.pins]
    own = home / "bin/python"
    this = f"{ROOT}[{environment.extras}]"
    install = [own, "-m", "pip", "install", "--quiet", "--editable", this, *pins]
    subprocess.run(install, check=True, env={**os.environ, "FUSEDMLP_CUDA": "0"})
    return own


def found(python: Path) -> str:
    code = f"""if True:
        import platform
        from importlib.metadata import version
        print("Python", platform.python_version(), *(f"{{n}} {{version(n)}}" for n in {PACKAGES}))
    """
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def main(names: list[str]) -> int:
    known = environments()
    if unknown := set(names) - {e.name for e in known}:
        print(f"floors: must be of {', '.join(e.name for e in known)}, got {', '.join(unknown)}")
        return 2
    jobs = os.environ.get("JOBS", "auto")
    outcomes = []
    for environment in known:
        if not names or environment.name in names:
            interpreter = made(environment)
            tests = [interpreter, "-m", "pytest", "-n", jobs, *TESTS]
            failed = subprocess.run(tests, cwd=ROOT).returncode
            outcome = "failed" if failed else "passed"
            outcomes.append(f"{environment.name}: {outcome} with {found(interpreter)}")
    print(*outcomes, sep="\n")
    return int(any(": failed" in outcome for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
