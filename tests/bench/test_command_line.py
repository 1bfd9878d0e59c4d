"""The `fusedmlp` command as it is typed: which files run, and one line where there is no more to
say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedmlp
from fusedmlp import cli, running
from fusedmlp.bench import cli as bench

ROOT = Path(__file__).parents[2]
OURS = ("TRITON_INTERPRET", "FUSEDMLP_BACKEND")


def typed(command, **env):
    """A shell's command, where `fusedmlp` is this checkout's."""
    clean = {k: v for k, v in os.environ.items() if k not in OURS} | env
    script = command.replace("fusedmlp ", f"{sys.executable} -m fusedmlp.cli ")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def the_line(done, code):
    """All that a failed command said on stderr."""
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_help_and_version(capsys):
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as end:
            cli.main([flag])
        assert end.value.code == 0
    text = capsys.readouterr().out
    assert "|" not in text and f"fusedmlp {fusedmlp.__version__}\n" in text
    assert all(re.search(rf"\n    {name}\s", text) for name in ("doctor", "bench", "patch-report"))


@pytest.mark.interpreter
def test_a_backend_that_cannot_run_here():
    done = typed("fusedmlp doctor", FUSEDMLP_BACKEND="triton")
    assert done.returncode == 2 and done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith(
        "nothing was checked: gated_mlp: backend 'triton' needs CUDA tensors, got cpu"
    )
    line = the_line(typed("fusedmlp bench check", FUSEDMLP_BACKEND="cuda"), 2)
    assert "the backend cuda needs a GPU" in line


@pytest.mark.parametrize("command", ["doctor", "bench predict"])
def test_a_misspelt_backend(command):
    line = the_line(typed(f"fusedmlp {command}", FUSEDMLP_BACKEND="tritn"), 2)
    assert line.startswith("fusedmlp: FUSEDMLP_BACKEND: backend must be one of auto, triton")


def test_output_that_goes_nowhere():
    done = typed("fusedmlp doctor | head -n 1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"fusedmlp {fusedmlp.__version__}, checkout: {ROOT}")
    assert "No space left on device" in the_line(typed("fusedmlp doctor > /dev/full"), 1)
    line = the_line(typed("fusedmlp bench predict --op mlp --json /dev/full"), 2)
    assert line == "fusedmlp bench: /dev/full was not written: No space left on device"


def test_the_module_is_the_same_command():
    line = the_line(typed(f"{sys.executable} -m fusedmlp.bench", FUSEDMLP_BACKEND="tritn"), 2)
    assert line.startswith("fusedmlp: ")


def test_a_hub_folder_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    done = typed(f"{sys.executable} -m fusedmlp.hub {file}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"folder must be new or empty, got {file}" in done.stderr.splitlines()[-1]


def test_patch_report_without_transformers(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    assert cli.main(["patch-report", str(tmp_path)]) == 2
    assert 'pip install "fusedmlp[hf]"' in capsys.readouterr().err


def test_lm_without_safetensors_says_so_before_it_trains(tmp_path, monkeypatch, capsys):
    from fusedmlp.bench.experiments import lm

    find = lm.importlib.util.find_spec
    monkeypatch.setattr(
        lm.importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name)
    )
    monkeypatch.setattr(lm, "Run", None)
    assert bench.main(["lm", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert 'pip install "fusedmlp[bench]"' in capsys.readouterr().err


def test_plots_of_what_is_no_ledger(tmp_path, capsys):
    argv = ["check", "--case", "gated_act", "--shape", "3x4x5", "--backend", "reference"]
    assert bench.main([*argv, "--json", str(tmp_path / "mine.json")]) == 0
    assert bench.main(["plots", "--results", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "plots draws ledgers, which campaign writes" in line and "mine.json" in line


def test_a_checkout_names_the_installed_copy_that_has_the_extension(tmp_path, monkeypatch):
    checkout, packages = tmp_path / "checkout", tmp_path / "site-packages"
    for folder in (checkout, packages):
        (folder / "fusedmlp").mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    monkeypatch.setattr(running, "FOLDER", checkout / "fusedmlp")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(checkout), str(packages)])
    (line,) = running.describe()
    assert line == f"fusedmlp {fusedmlp.__version__}, checkout: {checkout / 'fusedmlp'}"
    (packages / "fusedmlp/_C.cpython-311-x86_64-linux-gnu.so").touch()
    _, line = running.describe()
    assert line.startswith(f"{packages / 'fusedmlp'} has the CUDA extension, which this checkout")
    (checkout / "fusedmlp/_C.cpython-311-x86_64-linux-gnu.so").touch()
    assert len(running.describe()) == 1
    monkeypatch.setattr(running, "FOLDER", packages / "fusedmlp")
    (line,) = running.describe()
    assert line == f"fusedmlp {fusedmlp.__version__}, installed: {packages / 'fusedmlp'}"


def test_explain_says_which_files_run():
    assert fusedmlp.explain().startswith(
        f"fusedmlp {fusedmlp.__version__}, checkout: {Path(fusedmlp.__file__).parent}\n"
    )
