"""Runs of `gate execute` for the process that compiles."""

import contextlib
import dataclasses
import io
import json
import tempfile
from pathlib import Path

from fusedmlp.bench import cli
from fusedmlp.bench.gate.execute import coverage, executing, jobs
from fusedmlp.bench.gate.ptx import driver
from fusedmlp.kernels.arch import ARCHES


def main(*argv: str) -> tuple[int, str, dict]:
    """(exit code, what was printed, what was written)"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            given = ["gate", "execute", *argv, "--processes", "1", "--json", str(path)]
            code = cli.main(given)
        return code, out.getvalue(), json.loads(path.read_text()) if path.exists() else {}


def job_names(arch: str, brief: bool) -> list[str]:
    return [job.name for job in jobs.jobs_of(ARCHES[arch]) if job.brief or not brief]


def kernels_of(arch: str, brief: bool) -> set[str]:
    """Rows of the tile tables that jobs cover."""
    wanted = [job for job in jobs.jobs_of(ARCHES[arch]) if job.brief or not brief]
    return {kernel for job in wanted if job.what == "tile" for kernel, _ in job.covers}


def uncovered_without(arch: str, kernel: str) -> list[str]:
    """What coverage says where every job was executed but the tiles of one kernel."""
    own = ARCHES[arch]
    rows = [
        dataclasses.replace(_row, kernel=k, tile=tile, dtype=str(job.dtype)[6:], what=job.what)
        for job in jobs.jobs_of(own)
        for k, tile in job.covers
        if k != kernel
        for _row in [_empty(own.name)]
    ]
    return coverage.missing([own], rows)


def _empty(arch: str) -> executing.Executed:
    launched = tuple(coverage.functions())
    return executing.Executed("", arch, "", "", "", "", 0, 0, (), launched, 0, 0, 0)


def with_edited_ptx(match: str, old: str, new: str) -> dict:
    """The row of one job whose PTX is changed on its way to the machine."""
    load = driver.load

    def edited(text: str):
        assert old in text
        return load(text.replace(old, new, 1))

    driver.load = edited
    try:
        (job,) = [job for job in jobs.jobs_of(ARCHES["sm_80"]) if job.name == match]
        (row,) = executing.execute(job)
        return dataclasses.asdict(row)
    finally:
        driver.load = load
