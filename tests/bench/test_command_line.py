"""The `fusedmlp` command as it is typed: which files run, and one line where there is no more to
say."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import traceback
import types
from pathlib import Path

import pytest

import fusedmlp
from fusedmlp import cli, running
from fusedmlp.bench import check, cli as bench, machine, options, predict, render
from fusedmlp.bench.experiments import lm, lm_page, lm_train
from fusedmlp.bench.experiments.lm_train import Run
from fusedmlp.bench.gate import kernels
from fusedmlp.bench.report.ledger import load_own
from fusedmlp.bench.report.plots import plots_of
from fusedmlp.bench.timing import tune
from fusedmlp.bench.work import ops

ROOT = Path(__file__).parents[2]
OURS = ("TRITON_INTERPRET", "FUSEDMLP_BACKEND")


def typed(command, **env):
    """A shell's command, where `fusedmlp` is this checkout's."""
    clean = {k: v for k, v in os.environ.items() if k not in OURS} | env
    script = command.replace("fusedmlp ", f"{sys.executable} -m fusedmlp ")
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


def test_a_misspelt_backend():
    """doctor says so and goes on: it is for whoever has such a setting."""
    for command in ("doctor", "bench predict"):
        done = typed(f"fusedmlp {command}", FUSEDMLP_BACKEND="tritn")
        line = the_line(done, 2)
        assert line.startswith("fusedmlp: FUSEDMLP_BACKEND: backend must be one of auto, triton")
        assert done.stdout.count(": right\n") == (3 if command == "doctor" else 0)


@pytest.mark.parametrize("wrong", (0, 1, 2))
@pytest.mark.parametrize("tensor", ("out", "dx"))
def test_doctor_fails_where_any_tensor_of_an_op_is_wrong(tensor, wrong, monkeypatch, capsys):
    of = iter(range(3))

    def judged(*_):
        bad = tensor if next(of) == wrong else ""
        return {name: types.SimpleNamespace(passed=name != bad) for name in ("out", "dx")}

    monkeypatch.setattr("fusedmlp.testing.judge", judged)
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert (shown.count(": WRONG\n"), shown.count(": right\n")) == (1, 2)


def test_doctor_survives_whatever_a_setting_breaks(monkeypatch, capsys):
    def broken(*_):
        raise FileNotFoundError("no C compiler\nmore")

    monkeypatch.setattr("fusedmlp.testing.judge", broken)
    assert cli.main(["doctor"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "nothing was checked: FileNotFoundError: no C compiler"


def test_output_that_goes_nowhere():
    done = typed("fusedmlp doctor | head -n 1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"fusedmlp {fusedmlp.__version__}, checkout: {ROOT}")
    assert "No space left on device" in the_line(typed("fusedmlp doctor > /dev/full"), 1)
    line = the_line(typed("fusedmlp bench predict --op mlp --json /dev/full"), 2)
    assert line == "fusedmlp bench: /dev/full was not written: No space left on device"


def test_the_module_is_the_same_command():
    command = f"{sys.executable} -m fusedmlp.bench"
    line = the_line(typed(command, FUSEDMLP_BACKEND="tritn"), 2)
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


@pytest.mark.parametrize("package", ["safetensors", "matplotlib"])
@pytest.mark.parametrize("command", ["lm --device cpu", "plots"])
def test_a_missing_package_is_named_before_work_starts(
    package, command, tmp_path, monkeypatch, capsys
):
    find = options.importlib.util.find_spec
    monkeypatch.setattr(
        options.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    monkeypatch.setattr(lm, "Run", None)
    assert bench.main([*command.split(), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    if (package, command) == ("safetensors", "plots"):
        assert "no times to draw" in line
    else:
        assert f'{package}: pip install "fusedmlp[bench]"' in line
    assert not list(tmp_path.iterdir())


def test_plots_of_what_is_no_ledger(tmp_path, capsys):
    mine = str(tmp_path / "mine.json")
    argv = ["check", "--case", "gated_act", "--shape", "3x4x5", "--backend", "reference"]
    assert bench.main([*argv, "--json", mine]) == 0
    (tmp_path / "text").write_text("no JSON")
    for arguments, said in (
        (
            ["--results", str(tmp_path)],
            "a folder of ledgers, which campaign writes",
        ),
        (["--results", mine], "--results must be a folder of ledgers"),
        ([mine], "mine.json has no times to draw; time --json FILE, on a GPU, takes them"),
        ([str(tmp_path / "text")], "expected JSON"),
        ([str(tmp_path / "none")], "FILE must be a file"),
    ):
        assert bench.main(["plots", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_plots_of_ones_own_times(tmp_path, monkeypatch, capsys):
    """What --json of time writes: a machine and records, no commit where the copy is a wheel's."""
    made = json.loads((ROOT / "tests/data/synthetic.json").read_text())
    machine = {**made["machine"], "commit": None, "fusedmlp": "1.2.3"}
    text = json.dumps({"schema": 1, "machine": machine, "records": made["records"]})
    (tmp_path / "times.json").write_text(text)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/holiday.svg").touch()
    monkeypatch.chdir(tmp_path)
    assert bench.main(["plots", "times.json"]) == 0
    written = re.findall(r"wrote (\S+)", capsys.readouterr().out)
    assert "plots/roofline-forward-synthetic.svg" in written and len(written) > 1
    assert all(Path(name).is_file() for name in written)
    assert len(list(tmp_path.glob("plots/*"))) == len(written) + 1
    (ledger,) = map(load_own, [tmp_path / "times.json"])
    assert "fusedmlp 1.2.3" in plots_of([ledger], ops())[0].title


def test_report_leaves_an_installed_copy_alone(monkeypatch, capsys):
    monkeypatch.setattr(running, "is_checkout", lambda: False)
    assert bench.main(["report"]) == 2
    assert "report needs a checkout" in capsys.readouterr().err


def test_a_check_that_is_interrupted_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    run = check.run

    def half(options, emit):
        run(dataclasses.replace(options, cases=options.cases[:1]), emit)
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "run", half)
    argv = ["check", "--case", "gated_act", "linear_act", "--shape", "3x4x5"]
    argv += ["--backend", "reference", "--dtype", "float32"]
    assert bench.main([*argv, "--json", str(tmp_path / "half.json")]) == 130
    out = capsys.readouterr().out
    assert "1 checked, 0 failed" in out and "Interrupted: the rest was not checked." in out
    rest = "check --backend reference --case linear_act --dtype float32 --shape 3x4x5"
    assert f"Go on with: fusedmlp bench {rest}\n" in out
    assert len(json.loads((tmp_path / "half.json").read_text())["records"]) == 1


def test_a_tile_search_that_is_interrupted_keeps_its_records(tmp_path, monkeypatch, capsys):
    def half(options, emit):
        emit({"kind": "tune", "kernel": options.kernels[0]})
        raise KeyboardInterrupt

    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "run", half)
    monkeypatch.setattr(machine, "describe", dict)
    file = tmp_path / "tiles.json"
    assert bench.main(["tune", "--json", str(file)]) == 130
    done = next(iter(tune.LAUNCHES))
    assert f"Interrupted; done: {done}. --kernel tunes the others." in capsys.readouterr().out
    assert len(json.loads(file.read_text())["records"]) == 1


def test_a_gate_that_is_interrupted_keeps_its_rows(tmp_path, monkeypatch, capsys):
    def half(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(kernels, "gate", half)
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    file = tmp_path / "gate.json"
    assert bench.main(["gate", "--arch", "sm_90", "--json", str(file)]) == 130
    out = capsys.readouterr().out
    assert f"0 kernels compiled, 0 with faults\nwrote {file}\nInterrupted" in out


def test_a_language_model_that_is_interrupted_goes_on(tmp_path, monkeypatch, capsys):
    advance = Run._advance

    def advance_and_interrupt(run):
        advance(run)
        if run.step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(lm_train.Run, "_advance", advance_and_interrupt)
    argv = "lm --mlp relu_sq --seeds 1 --layers 1 --dim 16 --heads 2 --context 8 --batch 2"
    argv = [*argv.split(), "--steps", "5", "--device", "cpu", "--out", str(tmp_path)]
    assert bench.main(argv) == 130
    (kept,) = tmp_path.glob("checkpoints/*")
    out = capsys.readouterr().out
    assert f"interrupted: the same command goes on from the checkpoints\n  {kept}\n" in out
    assert bench.main(argv) == 0  # from step 3 on: it would be interrupted there again
    assert f"results: {tmp_path / 'results.json'}" in capsys.readouterr().out


def test_any_other_interrupt_is_said(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "plan", interrupt)
    assert bench.main(["predict"]) == 130
    monkeypatch.setattr(cli, "doctor", interrupt)
    assert cli.main(["doctor"]) == 130
    for line in capsys.readouterr().err.splitlines():
        assert line.endswith("interrupted, and nothing was kept: type it again")


def on_a_terminal(columns, *arguments):
    """What the command shows on a terminal of so many columns. A fork runs it, which need not
    import torch once more."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            for name in (*OURS, "COLUMNS"):
                os.environ.pop(name, None)
            os.chdir(ROOT)
            code = cli.main([*arguments])
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)  # the rest of pytest is its parent's
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    os.close(terminal)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    return shown.splitlines()


@pytest.mark.parametrize(
    "command",
    [
        "doctor",
        "bench campaign --dry-run",
        "bench table --compare --from bench/results/toy/table.json",
        "bench predict --op mlp",
    ],
)
def test_tables_fit_a_terminal_and_widen(command):
    narrow, wide = (on_a_terminal(columns, *command.split()) for columns in (80, 240))
    folder = len(str(ROOT)) + 80  # a path is not broken
    assert all(len(line) <= 80 or (str(ROOT) in line and len(line) < folder) for line in narrow)
    assert max(map(len, wide)) > 80


def test_the_table_of_language_models_fits():
    header, rows = next(
        lm_page.cells(models)
        for _, models in lm_page.comparisons(lm.read(ROOT / "bench/results/lm"))
    )
    shown = render.plain_table(*render.fit(header, rows, 80, lm.DROP)[:2])
    assert max(map(len, shown.splitlines())) <= 80 < len(render.plain_table(header, rows)) // 9


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
