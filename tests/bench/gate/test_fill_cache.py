"""`gate fill-cache`: what is compiled here is found there, and what is stale is refused."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedmlp.bench import cli
from fusedmlp.bench.campaign import plans, worker, works
from fusedmlp.bench.gate import cache, fill
from fusedmlp.bench.machine import ROOT
from fusedmlp.bench.options import Refusal
from fusedmlp.bench.timing.candidates import neighbours
from fusedmlp.bench.work import Work
from fusedmlp.dry.driver import Untouched
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.testing import CASES


def filled(folder, *arguments):
    """(kernels, those that were in the cache) of one run of the command, in a fresh process: the
    kernels of this one are interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    argv = [sys.executable, "-m", "fusedmlp.bench", "gate", "fill-cache", str(folder), *arguments]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^(\d+) kernels for sm_90, (\d+) were there:", done.stdout, re.MULTILINE)
    return int(found[1]), int(found[2])


def test_what_is_compiled_here_is_found_in_a_folder_that_was_moved(tmp_path):
    there = tmp_path / "there"
    kernels, hits = filled(there, "--only", "time:(act|few)$", "--jobs", "2")
    assert (hits, kernels > 4) == (0, True)
    files = [path for path in there.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".cubin", ".json"}
    here = tmp_path / "elsewhere" / "there"
    here.parent.mkdir()
    shutil.move(tmp_path / "there.tar.xz", here.parent)
    shutil.rmtree(there)
    assert cache.take(here.with_name("there.tar.xz")) == here
    assert (here.parent / "there.tar.xz").exists()
    # A part of the plan hits whatever order it comes in.
    found, hits = filled(here, "--only", "time:few$", "--jobs", "1")
    assert 4 < found == hits < kernels


@pytest.mark.slow
def test_what_tests_of_a_gpu_launch_is_compiled(tmp_path, monkeypatch):
    """Those that a plan runs get as far as their last launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hits, faults = fill.compile_tests(ARCHES["sm_90"], worker.gpu_tests("brief"))
    assert faults == []
    assert len(hits) > 50
    assert not any(hits.values())


def test_a_test_of_a_gpu_that_stops_before_its_launches_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    broken = tmp_path / "test_broken.py"
    broken.write_text(
        "import torch\nfrom fusedmlp import gated_act\n"
        "def test_whole():\n    g = torch.ones(8, 32, device='cuda')\n"
        "    assert gated_act(g, g).sum() == 7, 'nobody computed it'\n"
        "def test_stops(): raise ValueError('no')\n"
    )
    selection = ("-c", str(ROOT / "pyproject.toml"), str(broken))
    hits, faults = fill.compile_tests(ARCHES["sm_90"], selection)
    assert len(hits) == 1
    assert len(faults) == 1
    assert faults[0].endswith("test_broken.py::test_stops: ValueError: no")


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fill.triton.knobs.runtime, "interpret", False)
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        assert cli.main(["gate", "fill-cache", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("(nothing was changed)")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert cli.main(["gate", "fill-cache", str(tmp_path / "new"), "--plan", "short"]) == 2
    assert "--plan must be one of brief, rerun, full, got 'short'" in capsys.readouterr().err
    assert cli.main(["gate", "fill-cache", str(tmp_path / "new"), "--only", "no such"]) == 2
    assert not (tmp_path / "new").exists()


def stamped(folder, **changes):
    folder.mkdir(exist_ok=True)
    cache.write_stamp(folder)
    stamp = json.loads((folder / cache.STAMP).read_text())
    (folder / cache.STAMP).write_text(json.dumps({**stamp, **changes}))
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": "0123"}, "is stale (sources 0123 there, "),
        ({"triton": "3.5.0"}, "is stale (triton 3.5.0 there, "),
        ({"ptxas": "12.8"}, "is stale (ptxas 12.8 there, "),
        ({"python": "cpython-27"}, "is stale (python cpython-27 there, "),
    ],
)
def test_a_stale_cache_is_refused_in_one_line(tmp_path, capsys, change, says):
    folder = stamped(tmp_path / "cache", **change)
    before = (folder / cache.STAMP).read_bytes()
    out = tmp_path / "out"
    assert cli.main(["campaign", "--cache", str(folder), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert line.endswith(f"fill it again: python -m fusedmlp.bench gate fill-cache {folder}")
    assert (folder / cache.STAMP).read_bytes() == before
    assert not out.exists()


def test_a_broken_archive_is_refused(tmp_path):
    archive = tmp_path / "carry.tar.xz"
    archive.write_bytes(b"no archive")
    for path in (archive, tmp_path / "none.tar.xz"):
        with pytest.raises(Refusal, match="cannot be unpacked"):
            cache.take(path)
    assert [path.name for path in tmp_path.iterdir()] == ["carry.tar.xz"]


def test_a_folder_that_is_there_is_taken_instead_of_its_archive(tmp_path):
    folder = stamped(tmp_path / "carry")
    cache.pack(folder)
    (folder / "mine.json").write_text("1")
    assert cache.take(tmp_path / "carry.tar.xz") == folder
    assert (folder / "mine.json").exists()


def test_a_folder_without_a_stamp_is_refused(tmp_path):
    with pytest.raises(Refusal, match="holds no stamp.json"):
        cache.take(tmp_path)
    (tmp_path / cache.STAMP).write_text("[")
    with pytest.raises(Refusal, match="holds no stamp.json"):
        cache.take(tmp_path)


def test_a_change_of_a_kernel_changes_the_stamp(tmp_path, monkeypatch):
    for folder in ("kernels", "fusedmlp", "csrc"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    (tmp_path / "csrc" / "a.cu").write_text("1")
    (tmp_path / "CMakeLists.txt").write_text("1")
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    kernels, extension = cache.kernel_sources(), cache.extension_sources()
    (tmp_path / "csrc" / "a.cu").write_text("2")
    assert cache.kernel_sources() == kernels
    assert cache.extension_sources() != extension
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert cache.kernel_sources() != kernels


def test_an_extension_is_taken_only_with_a_stamp_of_its_sources(tmp_path, monkeypatch):
    stamp = tmp_path / "_C.stamp"
    monkeypatch.setattr(cache, "EXTENSION_STAMP", stamp)
    assert not cache.extension_is_carried()  # none
    built = tmp_path / f"_C{cache.extension_stamp()['python']}"
    built.touch()
    assert not cache.extension_is_carried()  # of unknown age
    cache.stamp_extension()
    assert cache.extension_is_carried()
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "sources": "0123"}))
    with pytest.raises(Refusal, match=f"the extension {built} is stale .sources 0123 there, "):
        cache.extension_is_carried()
    built.unlink()
    assert not cache.extension_is_carried()


# ---- what is compiled


@pytest.mark.parametrize("shape", [(64, 128), (37, 45), (3, 64, 128)], ids=str)
def test_two_weights_lie_in_every_way_that_makes_a_kernel_of_its_own(shape):
    """Boxes are chosen by the distance of two weights: a cache that was filled with one placement
    missed half of its kernels."""
    row = 2 * shape[-1]
    pairs = {how: fill._pair(shape, torch.bfloat16, how) for how in fill.PLACEMENTS}
    for first, second in pairs.values():
        assert first.shape == second.shape == shape
        assert first.data_ptr() % 16 == second.data_ptr() % 16 == 0
    steps = {how: b.data_ptr() - a.data_ptr() for how, (a, b) in pairs.items()}
    assert steps["in order"] == -steps["reversed"] >= 2 * math.prod(shape)
    assert steps["apart"] == steps["in order"] + 16
    if row % 16 == 0:
        assert steps["in order"] % row == 0
        assert steps["apart"] % row == 16
    same = {how: a.stride() == b.stride() for how, (a, b) in pairs.items()}
    assert same == {"in order": True, "reversed": True, "apart": True, "padded": False}
    # Divisible by 16 or not, as the rows that are not padded.
    assert (pairs["padded"][1].stride(-2) - shape[-1]) % 16 == 0


def test_arguments_are_those_of_the_case():
    work = Work(CASES["moe_mlp"], "silu", "bfloat16", 16, 64, 32)
    for placement in fill.PLACEMENTS:
        made = fill.arguments(work, "forward", placement)
        assert {n: tuple(t.shape) for n, t in made.items()} == work.shapes("forward")
        assert list(made) == list(work.shapes("forward"))
        assert made["expert"].dtype == torch.int64


def test_operators_on_floats_compute_nothing_and_those_on_integers_do():
    with Untouched():
        a = torch.empty(1 << 14, 1 << 14, dtype=torch.bfloat16)
        product = (a @ a.t()).sum(0)  # 9 TFLOP
        order = torch.tensor([3, 1, 2]).sort()[0]
        view = a[:3].t()
    assert product.shape == (1 << 14,)
    assert product.dtype == torch.bfloat16
    assert order.tolist() == [1, 2, 3]
    assert view.shape == (1 << 14, 3)
    assert view.data_ptr() == a.data_ptr()


def test_every_step_that_launches_triton_is_in_what_is_compiled():
    steps = plans.PLANS["brief"].steps()
    arch = ARCHES["sm_90"]
    empty = {step.name for step in steps if not list(works.launched(step, arch))}
    cuda = {s.name for s in steps if ":cuda:" in s.name and not s.name.startswith("time:")}
    assert empty == cuda | {"build", "ask:stacked-box"}  # the last is a question of the driver
    both = works.all_launched(steps, arch)
    assert len(both) == len(set(both))
    found = [one for one in both if isinstance(one, works.Launched)]
    (tests,) = (one for one in both if isinstance(one, works.Tested))
    assert tests.selection == worker.gpu_tests("brief")
    assert {one.work.case.op for one in found} == {case.op for case in CASES.values()}
    assert any(one.work.M == 8192 and one.phases == ("dglu",) for one in found)
    # The tiles that the search times before its results lead it on.
    first, *around = [one.tile for one in both if isinstance(one, works.Searched)]
    assert first == arch.tiles["gated_linear_fwd", 2][0]
    assert around == neighbours(first, arch, "gated_linear_fwd", 2)
    # A GPU's sizes of a check, on a machine that has none.
    assert any(one.work.size == "509x1021x1531" for one in found)


@pytest.mark.parametrize("code", (0, 1, 2, 4))
def test_tests_that_do_not_run_are_an_error(monkeypatch, code):
    """Failing tests have launched what they launch; where pytest collects none, none are there."""

    def ran(argv, env, **options):
        _, _, found = env[fill.TESTS].partition(":")
        Path(found).write_text("[{}, []]")
        return subprocess.CompletedProcess(argv, code, "ERROR tests/a.py", "no module b")

    monkeypatch.setattr(fill.subprocess, "run", ran)
    if code < 2:
        assert fill.compile_tests(ARCHES["sm_90"], ()) == ({}, [])
        return
    with pytest.raises(Refusal, match="could not be run:\nERROR tests/a.py\nno module b"):
        fill.compile_tests(ARCHES["sm_90"], ())
