"""Whether fusedmlp._cutlass is built: by the package, and by the option."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedmlp.bench.gate.csrc import compiler, inspect, objects

ROOT = Path(__file__).parents[2]


def find(path):
    """csrc/cutlass/find.py where packages lie in `path` alone."""
    script = ROOT / "csrc/cutlass/find.py"
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
    code += f"sys.path.append({str(path)!r}); exec(open({str(script)!r}).read())"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def package(folder, version, headers):
    info = folder / f"nvidia_cutlass-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: nvidia-cutlass\nVersion: {version}\n"
    )
    place = folder / "cutlass_library/source/include"
    if headers:
        (place / "cutlass").mkdir(parents=True)
        (place / "cutlass/cutlass.h").touch()
    return place


def test_where_the_headers_are(tmp_path):
    place = package(tmp_path, "4.2.1.0", headers=True)
    assert find(tmp_path).stdout.strip() == f"4.2.1.0;{place}"


@pytest.mark.parametrize(
    "version, headers, message",
    [(None, False, "the package nvidia-cutlass is not installed: pip install"),
     ("3.9.0", True, "nvidia-cutlass must be 4.2, got 3.9.0"),
     ("4.2.0.0", False, "nvidia-cutlass 4.2.0.0 holds no headers in ")],
)  # fmt: skip
def test_why_they_are_not_used(version, headers, message, tmp_path):
    if version:
        package(tmp_path, version, headers)
    result = find(tmp_path)
    assert result.returncode == 1 and message in result.stderr and not result.stdout


def configured(tmp_path, option, *extra):
    flags = (f"-DPython_EXECUTABLE={sys.executable}", f"-DFUSEDMLP_CUTLASS={option}", *extra)
    command = ("cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), *flags)
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, " ".join((result.stdout + result.stderr).split())


@pytest.mark.slow
@pytest.mark.nvcc
def test_the_option_is_off_where_it_is_asked_to_be(tmp_path):
    code, text = configured(tmp_path, "OFF", "-DFUSEDMLP_CUDA_ARCHS=90a")
    assert code == 0 and "_cutlass" not in text
    code, text = configured(tmp_path, "yes")
    assert code and "FUSEDMLP_CUTLASS must be AUTO, ON or OFF, got 'yes'" in text


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.cutlass
def test_the_option_is_on_where_the_package_is(tmp_path):
    code, text = configured(tmp_path, "AUTO", "-DFUSEDMLP_CUDA_ARCHS=90a")
    assert code == 0 and "fusedmlp: _cutlass by nvidia-cutlass 4.2" in text


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.cutlass
@pytest.mark.interpreter
def test_the_module_is_built_small_and_without_spills(tmp_path):
    """Ahead of time, as an installation does it; the gate finds no fault in its kernels. Without a
    GPU a launch is an error with a text, every time."""
    code, text = configured(tmp_path, "ON", "-DFUSEDMLP_CUDA_ARCHS=90a;100f", "-GNinja")
    assert code == 0, text
    build = ("cmake", "--build", str(tmp_path / "build"), "--target", "_cutlass")
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (tmp_path / "build").glob("_cutlass.*.so")
    assert path.stat().st_size <= 4e6
    kernels = [
        kernel
        for item in objects(tmp_path / "build")
        for kernel in inspect(item, compiler(tmp_path / "build"))
    ]
    names = [
        f"device_kernel<{t}, {g}>" for t in ("bfloat16_t", "half_t") for g in ("false", "true")
    ]
    assert [k.name for k in kernels] == 2 * names
    assert not [(k.key, k.faults) for k in kernels if k.faults or k.spills or k.stack]
    made = importlib.machinery.ExtensionFileLoader("_cutlass", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cutlass", made))
    made.exec_module(module)
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    numbers = (*[x.data_ptr()] * 8, *[64] * 8, 0, (0.0, 0.0, 0.0), 0, 0, 132, 0)
    for launch in 2 * list(module.OPS.values()):
        with pytest.raises(RuntimeError, match=r"\w"):
            launch(*numbers)
