"""A new generation is one row of kernels/arch: everything that goes by the table sees it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CONSUMERS = """
import torch
from made_up_arch import LIKE, ROOF, ROW
from fusedmlp.bench import predict
from fusedmlp.bench.gate import kernels as gate
from fusedmlp.bench.timing import candidates, tune
from fusedmlp.bench.work import Work
from fusedmlp.hub.__main__ import metadata
from fusedmlp.kernels.arch import arch_for
from fusedmlp.kernels.device import pretend
from fusedmlp.testing import CASES

assert arch_for(89) is ROW and arch_for(88) is LIKE

key = "linear_act_fwd", 2
first = ROW.tiles[key][0]
assert candidates.fits(first, ROW, *key) and candidates.neighbours(first, ROW, *key)
cpu = torch.device("cpu")
with pretend(ROW, ROOF.multiprocessors):
    (rows,) = tune.rows_of(key[0], torch.bfloat16, ((8192, 4096, 14336),), cpu)
    with tune.forced(key[0], torch.bfloat16, first, cpu):
        pass
assert rows.tile == first

work = Work(CASES["linear_act-bias"], "gelu", "bfloat16", 4096, 4096, 14336)
(record,) = [r for r in predict.predict(work, "forward") if r["gpu"] == ROOF.name]
assert record["launches"][0]["tile"] == str(first)

from pathlib import Path
assert "8.9" in metadata(Path("fusedmlp/hub"))["backend"]["archs"]

assert ROW in gate.chosen(None, brief=False)
argv = ["--arch", ROW.name, "--kernel", "linear_act_bwd", "--dtype", "bfloat16"]
raise SystemExit(gate.main(argv))
"""


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
        env={**kept, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def test_a_new_row_reaches_the_bench_the_hub_and_the_gate():
    result = run("-c", CONSUMERS)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("made_up ")]
    assert ["linear_act_bwd:_bwd_kernel", "bfloat16"] in [row[1:3] for row in rows]


def test_a_new_row_reaches_the_tests():
    files = (
        "tests/house/test_anatomy.py", "tests/kernels/test_arch.py",
        "tests/bench/timing/test_tune.py", "tests/bench/test_bench_predict.py",
    )  # fmt: skip
    asks_the_table = "made_up or every_arch or between_rows or row_says or blocks"
    result = run(
        "-m", "pytest", "-v", "-p", "made_up_arch", "-p", "no:cacheprovider", "-n", "0",
        "-k", asks_the_table, *files,
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[made_up] PASSED" in result.stdout
