"""What of the bench ships: the wheel's content, imports between rooms, and what a command says
whose room is left out."""

import ast
import email
import os
import posixpath
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from default_command import judge

from fusedmlp.bench import cli, rooms
from fusedmlp.bench.options import Refusal
from fusedmlp.bench.overview import STANDARD

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
BUILT = (".git", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache", ".venv*")
OURS = ("PYTHONPATH", "TRITON_INTERPRET", "FUSEDMLP_BACKEND", "COLUMNS")


def left_out():
    """Folders of bench/ that the wheel leaves out, by pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    return [name.replace(".", "/") for name in re.findall(r'"fusedmlp\.bench\.([\w.]*\w)\*"', text)]


def run(*command, **options):
    env = {k: v for k, v in os.environ.items() if k not in OURS} | options.pop("env", {})
    return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT, folder / "tree", symlinks=True,
        ignore=shutil.ignore_patterns(*BUILT, "results", "tests"),
    )  # fmt: skip
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    made = run(*pip, "-w", folder, folder / "tree", env={"FUSEDMLP_CUDA": "0"})
    assert made.returncode == 0, made.stdout + made.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_what_an_installed_user_can_run(wheel):
    files = zipfile.ZipFile(wheel).infolist()
    names = {f.filename.removeprefix("fusedmlp/bench/") for f in files if "/bench/" in f.filename}
    folders = left_out()
    assert {"campaign", "experiments", "gate/csrc", "results"} <= set(folders)
    assert {"check.py", "timing/command.py", "predict.py", "report/plots.py"} <= names
    assert not [name for name in names if name.startswith(tuple(f"{f}/" for f in folders))]
    assert not [f.filename for f in files if f.filename.startswith("tests")]
    data = ("fusedmlp/docs/", "fusedmlp/examples/")
    pages = {f.filename for f in files if f.filename.startswith(data)}
    shipped = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.*")]
    assert pages == {f"fusedmlp/{page.relative_to(ROOT)}" for page in shipped}
    sizes = Counter()
    for file in files:
        sizes[file.filename.split("/")[1]] += file.file_size
    assert sizes.most_common(1)[0][0] != "bench"


def test_every_link_of_a_page_in_the_wheel_leads_somewhere(wheel):
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    pages = {name: archive.read(name).decode() for name in names if name.endswith(".md")}
    found = [
        (name, target)
        for name, text in pages.items()
        if name.startswith("fusedmlp/")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
        if not target.startswith("https:")
    ]
    assert ("fusedmlp/docs/guides/gguf.md", "../../examples/one_bit_gguf.py") in found
    dead = [
        (name, target)
        for name, target in found
        if posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) not in names
    ]
    assert not dead
    # What stays in the repository is named.
    assert "(`README.md` in the repository)" in pages["fusedmlp/docs/README.md"]


def test_the_metadata_says_where_the_pages_are(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Summary"].endswith("pages: fusedmlp docs")
    assert "`fusedmlp docs`" in metadata.get_payload()


def imported(path):
    """The modules of bench/ that a file imports, by their path in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            if BENCH in (base, *base.parents):
                place = base.relative_to(BENCH).joinpath(*(node.module or "").split("."))
                yield from (place / alias.name for alias in node.names)


def test_no_room_that_ships_imports_one_that_does_not():
    folders = left_out()
    inside = [BENCH / folder for folder in folders]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in BENCH.rglob("*.py")
        if not any(folder in path.parents for folder in inside)
        for name in imported(path)
        if any(name.as_posix().startswith(folder) for folder in folders)
    ]
    assert not wrong
    # The walk sees imports: inside the campaign it finds those of the report.
    assert Path("report/ledger/create") in set(imported(BENCH / "campaign/resume.py"))


def test_a_command_whose_room_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "campaign", "nowhere.command")
    for argv in (["campaign"], ["campaign", "--minutes", "5"], ["campaign", "--help"]):
        assert cli.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fusedmlp bench: campaign needs a checkout of fusedmlp's repository")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert re.search(r"campaign +needs a checkout", capsys.readouterr().out)
    with pytest.raises(Refusal, match="time --base needs a checkout"):
        rooms.load("nowhere.base", "time --base")


def test_every_command_is_here_in_a_checkout():
    assert all(map(rooms.has, cli.COMMANDS.values()))
    assert not rooms.has("no.such.room") and not rooms.has("nothing")


@pytest.mark.slow
def test_the_console_script_of_a_wheel(wheel, tmp_path):
    """Typed in a folder that has a fusedmlp of its own, as a checkout has, it runs what was
    installed, its child processes included."""
    assert run(sys.executable, "-m", "venv", tmp_path / "venv").returncode == 0
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    python = tmp_path / "venv/bin/python"
    made = run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    assert made.returncode == 0, made.stderr
    (tmp_path / "fusedmlp").mkdir()
    (tmp_path / "fusedmlp/__init__.py").write_text("raise SystemExit('the wrong copy')")

    def command(*arguments, code=0):
        done = run(tmp_path / "venv/bin/fusedmlp", *arguments, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    where = f"installed: {packages / 'fusedmlp'}"
    assert where in command("doctor")
    everything, file = tmp_path / "all.json", tmp_path / "out.json"
    text = command("bench", "--json", everything)
    assert where in text and "0 failed" in text and "Next:" in text
    if not torch.cuda.is_available():
        judge(text, everything, where, {(model.D, model.H) for model in STANDARD})
    case = ("--case", "gated_act", "--shape", "8x16x24")
    assert f"wrote {file}" in command("bench", "check", *case, "--json", file)
    assert "--activation" in command("bench", "gate", "--help")
    assert "nothing was measured" in command("bench", "predict", "--op", "gated_mlp")
    if not torch.cuda.is_available():
        assert "torch finds no GPU" in command("bench", "time", code=2)
    for name in ("campaign", "report", "table", "lm"):
        assert f"{name} needs a checkout" in command("bench", name, code=2)
    assert "no times to draw" in command("bench", "plots", file, code=2)
    filling = ("bench", "gate", "fill-cache", tmp_path / "cache")
    assert "gate fill-cache needs a checkout" in command(*filling, code=2)
    assert "time --base needs a checkout" in command("bench", "time", "--base", "HEAD", code=2)
    assert not list((packages / "fusedmlp").rglob("*.json"))
