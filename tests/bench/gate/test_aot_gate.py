"""The ahead-of-time gate under the installed Triton: every kernel compiles for every GPU, without
spills."""

import json
import os
import subprocess
import sys

import pytest

from fusedmlp.bench.gate.kernels import ARCHES_COMPILED
from fusedmlp.kernels.arch import ARCHES


def gate(*flags):
    # The kernels of this process are interpreted; a fresh one compiles them.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusedmlp.bench.gate.kernels", *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def compile_for(arch, tmp_path, *flags):
    result = gate("--arch", arch, "--json", str(tmp_path / "gate.json"), *flags)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "gate.json").read_text())
    assert not any(row["faults"] for row in rows)
    return rows


@pytest.mark.parametrize("arch", ARCHES_COMPILED)
def test_a_job_of_each_kind_compiles(arch, tmp_path):
    rows = compile_for(arch, tmp_path, "--brief")
    kernels = {row["kernel"].rpartition(":")[0] for row in rows}
    assert kernels >= {"gated_act", "gated_linear_fwd", "gated_linear_bwd", "linear_act_fwd",
                       "linear_act_bwd", "masked_gated_linear_fwd", "moe_up",
                       "hyper_attention"}  # fmt: skip
    best = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(arch, "HMMA")
    for kernel in ("gated_linear_fwd:_fwd_kernel", "gated_linear_bwd:_bwd_kernel"):
        assert any(row["kernel"] == kernel and best in row["opcodes"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES_COMPILED)
def test_every_kernel_compiles(arch, tmp_path):
    rows = compile_for(arch, tmp_path)
    assert {row["dtype"] for row in rows} >= {"bfloat16", "float32"}


@pytest.mark.slow
def test_every_activation_compiles_for_hopper(tmp_path):
    compile_for("sm_90", tmp_path, "--every-activation")


def test_what_is_compiled_for_others_covers_sm_86():
    old, left_out, new = (ARCHES[name] for name in ("sm_80", "sm_86", "sm_120"))
    assert left_out.tiles == old.tiles == new.tiles
    assert left_out.shared_memory == new.shared_memory


SPILLING = """
import dataclasses, fusedmlp.kernels.arch as arch
from fusedmlp.kernels.arch.tile import Tile
import fusedmlp.bench.gate.kernels as aot
row = arch.ARCHES["sm_80"]
tile = Tile(128, 128, 32, 4, 4)
tiles = {("gated_linear_fwd", 2): (tile,)}
arch.ARCHES["sm_80"] = dataclasses.replace(row, tiles=tiles, shared_memory=60_000)
raise SystemExit(aot.main(["--arch", "sm_80", "--kernel", "gated_linear_fwd"]))
"""


def test_the_gate_fails_on_spills_and_on_shared_memory():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SPILLING], env=env, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    assert "spills (" in result.stdout and "shared memory 73728 > 60000" in result.stdout


def test_the_gate_refuses_interpreted_kernels():
    result = subprocess.run(
        [sys.executable, "-m", "fusedmlp.bench.gate.kernels"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 2 and "TRITON_INTERPRET is set" in result.stderr
