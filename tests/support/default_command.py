"""What `fusedmlp bench` says and writes where there is no GPU."""

import json

import torch

import fusedmlp
from fusedmlp.testing import CASES


def judge(shown, file, where, widths):
    """shown: what it printed; file: what --json wrote; where: of which copy; widths: (D, H) that it
    computed times for."""
    assert "GPU: none found by torch" in shown
    assert f"torch {torch.__version__}" in shown
    assert "backend triton (interpreter)" in " ".join(shown.split())
    assert f"fusedmlp {fusedmlp.__version__}, {where}" in shown
    ops = {case.op for case in CASES.values()}
    rows = [line for line in shown.splitlines() if line.split(" ")[0] in ops]
    assert len(rows) == len(ops) and max(map(len, rows)) <= 80
    assert "Nothing was timed" in shown

    written = json.loads(file.read_text())
    assert set(written) == {"schema", "machine", "records"}
    assert written["machine"]["gpu"] is None
    assert {r["kind"] for r in written["records"]} == {"check", "predict"}
    checks = [r for r in written["records"] if r["kind"] == "check"]
    assert {r["case"] for r in checks} == set(CASES)
    assert {r["backend"] for r in checks} == {"triton (interpreter)"}
    assert all(r["passed"] for r in checks)
    predicted = [r for r in written["records"] if r["kind"] == "predict"]
    assert {(r["D"], r["H"]) for r in predicted} == widths
