"""Runs of `gate execute` for the process that compiles."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import tempfile
import time
from pathlib import Path

from fusedmlp.bench.gate.execute import coverage, executing, jobs, kept, processes
from fusedmlp.bench.gate.ptx import driver
from fusedmlp.bench.options import Refusal
from fusedmlp.kernels.arch import ARCHES


def main(*argv: str) -> tuple[int, str, dict]:
    """(exit code, what was printed, what was written)"""
    return resumed(None, *argv)


def resumed(before: dict | str | None, *argv: str) -> tuple[int, str, dict]:
    """As main, where the file holds something before."""
    from fusedmlp.bench import cli  # other processes that import this file need none of it

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        if before is not None:
            path.write_text(before if isinstance(before, str) else json.dumps(before))
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            given = ["gate", "execute", *argv, "--processes", "1", "--json", str(path)]
            code = cli.main(given)
        written = path.read_text() if path.exists() else "{}"
        assert [found.name for found in Path(folder).iterdir()] in ([], [path.name])
        return code, out.getvalue(), written if written == before else json.loads(written)


def interrupted(*argv: str) -> tuple[int, str, dict]:
    """As main, where SIGTERM comes in the second job."""
    from fusedmlp.bench.gate.execute import command

    execute, handler, done = command.execute, signal.getsignal(signal.SIGTERM), []

    def ended(*given):
        if done:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(given)
        return execute(*given)

    command.execute = ended
    try:
        return main(*argv)
    finally:
        command.execute = execute
        signal.signal(signal.SIGTERM, handler)


def whole(arch: str, but: str, **changed: object) -> dict:
    """A file in which every job of an architecture passed, but for one that is not there."""
    own = ARCHES[arch]
    orders = tuple(map(str, executing.ORDERS))
    rows = [
        dataclasses.replace(
            _empty(arch), job=job.name, orders=orders, kernel=kernel, tile=tile,
            dtype=str(job.dtype)[6:], what=job.what, **changed,
        )
        for job in jobs.jobs_of(own)
        for kernel, tile in job.covers
        if job.name != but
    ]  # fmt: skip
    return {"stamp": kept.stamp(), "records": [dataclasses.asdict(row) for row in rows]}


def sources() -> dict[str, str]:
    """What a stamp is of: path -> text."""
    return {str(path.relative_to(kept.ROOT)): path.read_text() for path in kept.sources()}


def _process(one: tuple[Path, int]) -> tuple[int, int]:
    folder, number = one
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)  # else the process that starts first would do it all
    return number, os.getpid()


def groups(*given: list[int]) -> dict[int, int]:
    """Which process had each of each group."""
    with tempfile.TemporaryDirectory() as folder:
        work = [[(Path(folder), number) for number in group] for group in given]
        return dict(processes.side_by_side(work, 2, _process))


def _die(code: int) -> None:
    os._exit(code)


def death() -> str:
    """What is said where a process dies."""
    try:
        list(processes.side_by_side([[7]], 1, _die))
    except Refusal as refusal:
        return str(refusal)
    return ""


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
    return executing.Executed("", (), "", arch, "", "", "", "", 0, 0, (), launched, 0, 0, 0)


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
