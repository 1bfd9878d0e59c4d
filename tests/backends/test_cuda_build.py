"""Wheels with and without nvcc, built by pip and installed into clean venvs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".git", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache", ".venv*")
CLEAN = ("PYTHONPATH", "FUSEDMLP_CUDA", "FUSEDMLP_CUDA_ARCHS", "FUSEDMLP_CUTLASS", "CUDA_HOME",
         "CUDACXX", "TRITON_INTERPRET", "FUSEDMLP_BACKEND")  # fmt: skip

SHOW = """
import torch, fusedmlp, sys
x, w = torch.randn(3, 8), torch.randn(8, 8)
fusedmlp.mlp(x, w, w)
print(fusedmlp.__file__)
print(fusedmlp.explain())
"""


def run(*command, **options):
    env = {k: v for k, v in os.environ.items() if k not in CLEAN} | options.pop("env", {})
    return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, **options)


def good(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The checkout without what was built in it."""
    copy = tmp_path_factory.mktemp("tree") / "fusedmlp"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


def venv(folder):
    """A venv's Python that finds this process's torch and triton, and no fusedmlp."""
    good(run(sys.executable, "-m", "venv", folder))
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / "bin/python"


@pytest.fixture
def nowhere(tmp_path):
    """A PATH with nothing on it."""
    folder = tmp_path / "nothing"
    folder.mkdir()
    return {"PATH": str(folder)}


def wheel(tree, into, env, *flags):
    return run(sys.executable, "-m", "pip", "wheel", "--no-deps", *flags, "-w", into, tree, env=env)


def installed(tmp_path, built):
    python = venv(tmp_path / "venv")
    good(run(python, "-m", "pip", "install", "--no-deps", "--no-index", built))
    return python


@pytest.mark.parametrize(
    "variables, builds",
    [({}, False), ({"CUDACXX": "{}/bin/nvcc"}, True), ({"CUDA_HOME": "{}"}, True),
     ({"PATH": "{}/bin"}, True), ({"PATH": "{}/bin", "FUSEDMLP_CUDA": "1"}, True),
     ({"PATH": "{}/bin", "FUSEDMLP_CUDA": "0"}, False),
     ({"PATH": "{}/bin", "FUSEDMLP_CUTLASS": "1"}, True),
     ({"PATH": "{}/bin", "FUSEDMLP_CUTLASS": "0"}, True)],
)  # fmt: skip
def test_the_extra_is_asked_for_where_there_is_an_extension(variables, builds, tmp_path, nowhere):
    """By the backend's hooks for wheels and for editable installs; CUTLASS only by name."""
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    ask = """if True:
        import setup
        print([setup.get_requires_for_build_wheel(), setup.get_requires_for_build_editable()])
    """
    env = nowhere | {name: value.format(tmp_path) for name, value in variables.items()}
    asked = ast.literal_eval(good(run(sys.executable, "-c", ask, cwd=ROOT, env=env)))
    extra = re.search(r"^cuda = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    *tools, cutlass = ast.literal_eval(extra[1])
    if variables.get("FUSEDMLP_CUTLASS") == "1":
        tools.append(cutlass)
    assert asked == 2 * [tools if builds else []]


@pytest.mark.parametrize(
    "script", (["setup.py", "--version"], ["-c", "import setup"]), ids=" ".join
)
@pytest.mark.parametrize(
    "name, value, message",
    [("CUDA", "1", "FUSEDMLP_CUDA=1 needs nvcc: put it on PATH, or set CUDA_HOME or CUDACXX"),
     ("CUDA", "yes", "FUSEDMLP_CUDA must be auto, 1 or 0, got 'yes'"),
     ("CUTLASS", "1", "FUSEDMLP_CUTLASS=1 needs nvcc, as FUSEDMLP_CUDA=1 does"),
     ("CUTLASS", "on", "FUSEDMLP_CUTLASS must be auto, 1 or 0, got 'on'")],
)  # fmt: skip
def test_what_cannot_be_built_fails_loudly(name, value, message, script, nowhere):
    """Run as a script by setuptools, and imported as the build backend."""
    env = {**nowhere, f"FUSEDMLP_{name}": value}
    result = run(sys.executable, *script, cwd=ROOT, env=env)
    assert result.returncode != 0 and message in result.stderr


@pytest.mark.slow
def test_a_wheel_without_nvcc(tree, tmp_path, nowhere):
    good(wheel(tree, tmp_path, nowhere))
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    text = good(run(installed(tmp_path, built), "-c", SHOW, cwd=tmp_path))
    assert str(tmp_path) in text
    assert "cuda backend: none: the CUDA extension is not built: reinstall fusedmlp" in text


@pytest.mark.slow
@pytest.mark.nvcc
def test_a_wheel_with_nvcc(tree, tmp_path):
    """Under build isolation; for one architecture, which keeps it short."""
    good(wheel(tree, tmp_path, {"FUSEDMLP_CUDA": "1", "FUSEDMLP_CUDA_ARCHS": "80"}))
    (built,) = tmp_path.glob("*.whl")
    assert "linux" in built.name
    assert sum(name.startswith("fusedmlp/_C.") for name in zipfile.ZipFile(built).namelist()) == 1
    python = installed(tmp_path, built)
    text = good(run(python, "-c", SHOW, cwd=tmp_path))
    assert str(tmp_path) in text and "cuda backend: built with CUDA" in text
    (extension,) = tmp_path.glob("venv/lib/python*/site-packages/fusedmlp/_C.*.so")
    needed = good(run("ldd", extension))
    assert "libcuda" not in needed and "torch" not in needed
    extension.write_bytes(b"not a library")
    text = good(run(python, "-c", SHOW, cwd=tmp_path))
    assert "cuda backend: none: the CUDA extension cannot be loaded (" in text
    assert "invalid ELF header" in text or "file too short" in text


@pytest.mark.slow
@pytest.mark.nvcc
def test_unknown_architectures(tree, tmp_path):
    """Left out by auto where others remain, refused by FUSEDMLP_CUDA=1."""
    result = wheel(tree, tmp_path, {"FUSEDMLP_CUDA_ARCHS": "80;999a;998f"}, "-v")
    text = " ".join((result.stdout + result.stderr).split())
    assert "does not know sm_999a: left out" in text
    # nvcc may know the first member of a family that it does not know.
    assert "does not know sm_998f: sm_998a instead" in text
    assert "does not know sm_998a: left out" in text
    good(result)
    result = wheel(tree, tmp_path, {"FUSEDMLP_CUDA": "1", "FUSEDMLP_CUDA_ARCHS": "80;999a"})
    text = " ".join((result.stdout + result.stderr).split())
    assert result.returncode != 0 and "does not know sm_999a; use a newer one or leave" in text
    assert "FUSEDMLP_CUDA=0 installs fusedmlp without its CUDA extension" in text


@pytest.mark.slow
@pytest.mark.nvcc
def test_a_failing_compiler_is_an_error_that_names_the_way_out(tree, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    result = wheel(tree, tmp_path, {"CUDACXX": str(broken)})
    assert result.returncode != 0
    assert "FUSEDMLP_CUDA=0 installs fusedmlp without" in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.nvcc
def test_without_isolation_and_from_an_sdist(tree, tmp_path):
    """The sdist holds all that a build needs; a second build compiles nothing."""
    python = venv(tmp_path / "builder")
    pip = (python, "-m", "pip")
    good(run(*pip, "install", "setuptools>=77"))
    sdist = "from setup import build_sdist; import sys; build_sdist(sys.argv[1])"
    good(run(python, "-c", sdist, tmp_path, cwd=tree, env={"FUSEDMLP_CUDA": "0"}))
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.glob("fusedmlp-*") if path.is_dir())
    for folder, kind in (("csrc", "*"), ("kernels", "*.py"), ("bench", "*.py")):
        for path in (ROOT / folder).glob(kind):
            if path.is_file():
                place = folder if folder == "csrc" else f"fusedmlp/{folder}"
                assert (unpacked / place / path.name).is_file(), path
    env = {"FUSEDMLP_CUDA": "1", "FUSEDMLP_CUDA_ARCHS": "80",
           "PATH": f"{python.parent}:{os.environ['PATH']}"}  # fmt: skip
    build = (*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, unpacked)
    good(run(*pip, "install", "cmake>=3.25", "ninja>=1.11", "pybind11>=2.13"))
    good(run(*build, env=env))
    assert list(tmp_path.glob("*linux*.whl"))
    again = run(*build, "-v", env=env)
    good(again)
    assert "ninja: no work to do" in again.stdout + again.stderr
