"""SentryWard on the PTX of every launch: its input, its verdict, and a table of them."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from prove_launches import Job, jobs, without_barrier

from fusedmlp.backends.library import serve_cpu
from fusedmlp.bench.gate.ptx import emulate
from fusedmlp.bench.gate.ptx.driver import Call
from fusedmlp.kernels.launch import draw

FAULTS = ("potential_race", "not_wellsynced", "invalid_lifecycle")
UNABLE = ("unsupported", "timeout", "memory_budget_exceeded", "analysis_budget_exceeded")


class Row(NamedTuple):
    """verdict: proved, copies, unsupported, timeout, or what SentryWard says, which is a fault."""

    kernel: str
    size: str
    tile: str
    verdict: str
    seconds: float
    why: str


def caught(job: Job, training: bool) -> list[Call]:
    """The launches that the job's call makes; none of them runs."""
    serve_cpu()
    calls: list[Call] = []
    operands = draw(job.launch, job.size, torch.bfloat16, torch.device("cpu"))
    assert job.launch.call is not None
    # Activations without a branch: gelu's erf jumps by its argument, which SentryWard refuses.
    activation = {"activation": "silu"} if job.launch.activated else {}
    with emulate(job.arch, calls=calls):
        job.launch.call(operands, training, **activation)
    return calls


def described(call: Call) -> dict[str, Any]:
    """SentryWard's input: numbers get their values, and each pointer an object of its own."""
    declared = re.findall(r"\.param \.(\w+)( \.ptr)?[^,\n)]*?(\w+_param_\d+)", call.ptx)
    numbers = [
        {"parameter": name, "type": kind, "value": int.from_bytes(value, "little")}
        for (kind, pointer, name), value in zip(declared, call.params, strict=True)
        if not pointer
    ]
    (threads,) = re.findall(r"\.reqntid (\d+)", call.ptx)
    (entry,) = re.findall(r"\.entry (\w+)", call.ptx)
    launch = {
        "grid_dim": list(call.grid),
        "block_dim": [int(threads), 1, 1],
        "cluster_dim": [1, 1, 1],
        "dynamic_shared_bytes": call.shared,
    }
    return {
        "schema": "spverify.kernel-input/v1", "entry": entry, "launch": launch,
        "arguments": numbers,
    }  # fmt: skip


def verdict(report: dict[str, Any]) -> tuple[str, str]:
    """(verdict, why) of a report.

    Where lanes and warps hold copies of one value, Triton lets all of them store it; SentryWard
    compares no values. So a pair of writes to shared memory by one line is "copies": neither
    proved nor a fault. The PTX machine, which has the values, judges those.
    """
    result = report["result"]
    if result == "race_free":
        return "proved", ""
    if result == "potential_race":
        first, second = (report["races"][0][side] for side in ("first", "second"))
        space = report["races"][0]["region"]["address_space"]
        at = " and ".join(
            f"{side['mode']} at {Path(side['location']['file']).name}:{side['location']['line']}"
            for side in (first, second)
        )
        same = first["location"] == second["location"]
        if space == "shared" and same and first["mode"] == second["mode"] == "write":
            return "copies", at
        return result, f"{space}: {at}"
    said = report["diagnostics"][0] if report["diagnostics"] else {}
    place = (said.get("details") or {}).get("location") or {}
    where = f", line {place['line']} of the PTX" if "line" in place else ""
    return result, f"{said.get('code', '')}: {said.get('message', '')}{where}".strip(": ")


def proved(tool: Path, call: Call, limit: float) -> tuple[str, str, float]:
    """(verdict, why, seconds)"""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ptx, given = Path(folder, "kernel.ptx"), Path(folder, "input.json")
        ptx.write_text(call.ptx)
        given.write_text(json.dumps(described(call)))
        done = subprocess.run(
            [tool, ptx, "--input", given, "--timeout", str(limit)], capture_output=True, text=True
        )
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = {"result": "tool_failure", "diagnostics": [{"message": done.stderr[-200:]}]}
    return *verdict(report), time.perf_counter() - start


def rows(tool: Path, job: Job, limit: float, mutant: int | None) -> list[Row]:
    """A row a launch; of a call that does more when training, both."""
    found: list[Row] = []
    seen: set[str] = set()
    for training in (False, True):
        for call in caught(job, training):
            if call.ptx in seen:
                continue
            seen.add(call.ptx)
            if mutant is not None:
                less = without_barrier(call.ptx, mutant)
                if less is None:
                    continue
                call = dataclasses.replace(call, ptx=less)
            what, why, seconds = proved(tool, call, limit)
            size = "x".join(map(str, job.size)) + (" training" if training else "")
            found.append(
                Row(f"{job.launch.name} {call.kernel}", size, job.tile, what, seconds, why)
            )
            print(line(found[-1]), flush=True)
    return found


def line(row: Row) -> str:
    return (
        f"{row.verdict:14} {row.seconds:6.1f} s  {row.kernel:50} {row.size:22} {row.tile:44} "
        f"{row.why}"
    ).rstrip()


def failed(row: Row, mutant: int | None) -> bool:
    """A fault, or an input that the tool refuses; of a mutant, a proof."""
    if mutant is not None:
        return row.verdict == "proved"
    return row.verdict not in ("proved", "copies", *UNABLE)


def run(tool: Path, wanted: list[str], every: bool, limit: float, mutant: int | None) -> int:
    found = [row for job in jobs(wanted, every) for row in rows(tool, job, limit, mutant)]
    bad = [row for row in found if failed(row, mutant)]
    count = Counter(row.verdict for row in found)
    print(f"{len(found)} launches, {len(bad)} failed:", *(f"{n} {v}" for v, n in count.items()))
    shown = mutant is None or any(row.verdict in FAULTS for row in found)
    return int(bool(bad) or not found or not shown)
