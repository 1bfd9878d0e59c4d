"""The Makefile: each target is listed, what it runs is there, and what is missing is said; the
hooks of pre-commit run the same linters."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
TOOLS = ("awk", "make", "sh")


def make(*arguments, path=None, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDACXX")}
    environment |= {"PATH": path or environment["PATH"], **variables}
    environment.pop("MAKEFLAGS", None)
    return subprocess.run(
        [shutil.which("make"), "-C", str(ROOT), "--no-print-directory", *arguments],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip


@pytest.fixture
def bare(tmp_path):
    """A PATH with a shell and make, and neither nvcc nor Python."""
    for tool in TOOLS:
        (tmp_path / tool).symlink_to(shutil.which(tool))
    return str(tmp_path)


def test_the_default_lists_every_target(bare):
    done = make(path=bare)
    assert done.returncode == 0, done.stderr
    listed = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [target for _, target, _ in listed] == TARGETS
    assert all(command == "make" and text for command, _, text in listed)


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_target_runs_is_there(target):
    lines = make("-n", target, "PYTHON=python").stdout
    for module in re.findall(r"python -m ([\w.]+)", lines):
        if module != "mkdocs":  # of the extra "docs", which the tests do without
            assert importlib.util.find_spec(module), module
    for name in re.findall(r"\btests/[\w/.]+", lines):
        assert (ROOT / name).exists(), name


def test_mutants_of_a_file_are_asked_for_by_globs_that_the_shell_leaves_alone():
    asked = ("ROOM=patching layers", "FILE=patching/*.py gates.py", "COUNT=2", "SEED=3")
    said = " ".join(make("-n", "mutants", *asked).stdout.replace("\\\n", " ").split())
    files = "--file 'patching/*.py' 'gates.py'"
    assert said.endswith(f"tests/mutants --room patching layers {files} --count 2 --seed 3")


@pytest.mark.parametrize("target", ("gate", "gate-csrc"))
def test_no_nvcc_is_one_error(target, bare):
    done = make(target, "PYTHON=must-not-run", path=bare)
    assert done.returncode == 2 and done.stdout == ""
    said, after = done.stderr.splitlines()
    assert said.startswith(f"make {target}: needs nvcc, which is not there: install the CUDA")
    assert f"{target}]" in after  # make's own line


@pytest.mark.parametrize("variable", ("CUDA_HOME", "CUDACXX"))
def test_nvcc_is_found_as_setup_finds_it(variable, bare, tmp_path):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    where = str(tmp_path / "toolkit") if variable == "CUDA_HOME" else str(nvcc)
    done = make("gate-csrc", "PYTHON=must-not-run", path=bare, **{variable: where})
    assert "nvcc" not in done.stderr and "must-not-run" in done.stderr


@pytest.mark.parametrize(
    "target, package, extra",
    [
        ("test", "pytest", "test"),
        ("quick", "pytest", "test"),
        ("lint", "ruff", "test"),
        ("gate-triton", "triton", "test"),
        ("docs", "mkdocs", "docs"),
        ("mutants", "pytest", "test"),
        ("prove", "triton", "test"),
        ("bench", "torch", "bench"),
    ],
)
def test_a_missing_package_is_one_error(target, package, extra):
    # -I and -S: a Python that sees the standard library alone.
    done = make(target, f"PYTHON={sys.executable} -I -S")
    assert done.returncode == 2 and done.stdout == ""
    said, _ = done.stderr.splitlines()
    assert said.startswith(f"make {target}: needs the Python package {package}, which is not there")
    assert said.endswith(f'pip install -e ".[{extra}]"')


def test_floors_are_what_pyproject_promises():
    spec = importlib.util.spec_from_file_location("floors", ROOT / "tests/floors.py")
    spec.loader.exec_module(floors := importlib.util.module_from_spec(spec))
    oldest, newest, mixed = floors.environments()
    project = (ROOT / "pyproject.toml").read_text()
    assert set(oldest.pins) == {"torch", "triton", "numpy", "transformers"} and not newest.pins
    for name, version in oldest.pins.items():
        assert f'"{name}>={version.removesuffix(".0")}"' in project
    # What a machine was found with is within what is promised.
    for name, version in mixed.pins.items():
        least, found = (tuple(map(int, v.split(".")[:2])) for v in (oldest.pins[name], version))
        assert found >= least, name
    assert f'requires-python = ">=3.{next(iter(oldest.pythons))}"' in project
    assert all((ROOT / path).exists() for path in floors.TESTS)
    # A Python that is nowhere is the running one.
    assert floors.python([99]) == sys.executable


def test_pre_commit_has_the_ruff_of_pyproject():
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{pinned}\n" in hooks
    assert re.findall(r"- id: (\S+)", hooks) == ["ruff-check", "ruff-format", "mypy"]
