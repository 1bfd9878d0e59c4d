"""The ahead-of-time gate under the installed Triton: every kernel compiles for every GPU, without
spills."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import triton
from compiled import in_compiler
from ranked import faults_at

from fusedmlp.bench.gate import compiling, kernels as aot
from fusedmlp.bench.gate.inspecting import OPCODE
from fusedmlp.bench.options import Refusal
from fusedmlp.kernels.arch import ARCHES, arch_for


def gate(*flags):
    # The kernels of this process are interpreted; a fresh one compiles them.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusedmlp.bench.gate.kernels", *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def compile_for(arch, tmp_path, *flags):
    result = gate("--arch", arch.name, "--json", str(tmp_path / "gate.json"), *flags)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "gate.json").read_text())
    assert not any(row["faults"] for row in rows)
    return rows


# An old Triton does not know the newest GPUs.
KNOWN = [arch for arch in ARCHES.values() if not compiling.unknown(arch)]
ROWS = pytest.mark.parametrize("arch", KNOWN, ids=lambda arch: arch.name)
BRIEF = pytest.mark.parametrize("arch", list(aot.distinct(KNOWN)), ids=lambda arch: arch.name)


def test_a_sound_kernel_passes(tmp_path):
    arch = arch_for(90)
    rows = compile_for(arch, tmp_path, "--kernel", "gated_linear_fwd", "--dtype", "bfloat16")
    assert any(OPCODE[arch.mma] in row["opcodes"] for row in rows)


# Minutes each: .ci/run asks for them, and `make gate` runs the same.
@pytest.mark.slow
@BRIEF
def test_a_job_of_each_kind_compiles(arch, tmp_path):
    rows = compile_for(arch, tmp_path, "--brief")
    kernels = {row["kernel"].rpartition(":")[0] for row in rows}
    assert kernels >= {"gated_act", "gated_linear_fwd", "gated_linear_bwd", "linear_act_fwd",
                       "linear_act_bwd", "masked_gated_linear_fwd", "moe_up",
                       "hyper_attention"}  # fmt: skip
    for kernel in ("gated_linear_fwd:_fwd_kernel", "gated_linear_bwd:_bwd_kernel"):
        assert any(row["kernel"] == kernel and OPCODE[arch.mma] in row["opcodes"] for row in rows)
    assert all(row["shared"] <= arch.shared_memory for row in rows)  # of all that it stands for


@pytest.mark.slow
@ROWS
def test_every_kernel_compiles(arch, tmp_path):
    rows = compile_for(arch, tmp_path)
    assert {row["dtype"] for row in rows} >= {"bfloat16", "float32"}


@pytest.mark.slow
def test_every_activation_compiles_for_hopper(tmp_path):
    compile_for(arch_for(90), tmp_path, "--activation", "all")


def test_brief_leaves_out_what_resembles_an_older_row():
    rows = list(ARCHES.values())
    firsts = list(aot.distinct(rows))
    assert not any(a.resembles(b) for a in firsts for b in firsts if a is not b)
    for row in rows:
        (first,) = (first for first in firsts if row.resembles(first))
        # What is compiled must fit the smallest of those that it stands for.
        assert (first.tiles, first.hyper) == (row.tiles, row.hyper)
        assert first.shared_memory <= row.shared_memory
    assert not arch_for(120).resembles(arch_for(80))
    other = dataclasses.replace(arch_for(80), tiles={})
    assert len(list(aot.distinct((*rows, other)))) == len(firsts) + 1


def test_every_row_is_compiled_for_unless_the_tools_do_not_know_it(monkeypatch, capsys):
    assert aot.chosen(None, brief=False) == KNOWN
    assert [a.name for a in aot.chosen(None, brief=True)] == [a.name for a in aot.distinct(KNOWN)]
    old, newest = min(ARCHES.values(), key=by_age), max(ARCHES.values(), key=by_age)
    knows = [f"'sm_{a.capability}{s}', 'sm{a.capability}{s}'" for a in ARCHES.values()
             for s in ("", "a") if a is not newest]  # fmt: skip
    monkeypatch.setattr(compiling, "_known", lambda tool: " ".join(knows))
    capsys.readouterr()
    assert aot.chosen(None, brief=False) == [a for a in ARCHES.values() if a is not newest]
    why = f"Triton {triton.__version__}'s ptxas does not know sm_{newest.capability}a"
    assert capsys.readouterr().out == f"{newest.name} is not compiled: {why}\n"
    assert aot.chosen([old.name], brief=True) == [old]
    with pytest.raises(Refusal, match=f"^{why}: use a newer Triton, or another --arch$"):
        aot.chosen([old.name, newest.name], brief=True)


def by_age(arch):
    return arch.capability


SPILLING = """
import dataclasses, fusedmlp.kernels.arch as arch
from fusedmlp.kernels.arch.tile import Tile
import fusedmlp.bench.gate.kernels as aot
row = arch.arch_for(80)
tile = Tile(128, 128, 32, 4, 4)
tiles = {("gated_linear_fwd", 2): (tile,)}
arch.ARCHES[row.name] = dataclasses.replace(row, tiles=tiles, shared_memory=60_000)
raise SystemExit(aot.main(["--arch", row.name, "--kernel", "gated_linear_fwd"]))
"""


def test_the_gate_fails_on_spills_and_on_shared_memory():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SPILLING], env=env, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    assert "spills (" in result.stdout and "shared memory 73728 > 60000" in result.stdout


def test_a_kernel_without_tiles_is_compiled_by_its_name_and_no_other_name_is_taken(monkeypatch):
    called = []
    monkeypatch.setattr(aot, "captured", lambda job: called.append(job.name) or ())
    arch, jobs = ARCHES["sm_90"], tuple(aot.jobs_of(ARCHES["sm_90"], []))
    monkeypatch.setattr(aot, "jobs_of", lambda *_: jobs)
    for name in dict.fromkeys(job.name for job in jobs):
        called.clear()
        assert not list(aot.gate([arch], kernels=[name]))
        assert set(called) == {name}
    with pytest.raises(Refusal, match="--kernel must be of .*gated_act_fwd.*; got nope"):
        list(aot.gate([arch], kernels=["gated_act_fwd", "nope"]))


def test_the_gate_refuses_interpreted_kernels():
    result = subprocess.run(
        [sys.executable, "-m", "fusedmlp.bench.gate.kernels"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 2 and "TRITON_INTERPRET is set" in result.stderr


def test_adapters_of_rank_1_leave_wgmma_in_flight():
    """Triton compiles an argument of 1 in, and ptxas waits after every product of the main loop
    where the adapter's is in no loop of its own."""
    found = in_compiler(faults_at, 1)
    assert len(found) == 4 and not any(found.values()), found


def test_a_kernel_launched_often_is_one_row_with_its_largest_grid(monkeypatch):
    one, other = object(), object()
    launches = [("a", one, (5,)), ("b", other, (1, 2)), ("a", one, (3, 70_000)), ("a", one, (9, 1))]
    made = [compiling.Launched(*launch) for launch in launches]
    monkeypatch.setattr(compiling, "compile_only", lambda arch: contextlib.nullcontext(made))
    job = SimpleNamespace(arch=arch_for(90), key=None, tile=None, call=lambda: None)
    found = compiling.captured(job)
    assert [tuple(launch) for launch in found] == [("a", one, (9, 70_000)), ("b", other, (1, 2))]
