"""Groups of work in several processes: a group in one of them, its results as they come."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ...options import Refusal

__all__ = ["side_by_side"]


def _serve(parent: Connection, work: Callable[[Any], Any]) -> None:
    """Ask for groups until there is none left, or nobody to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends this one
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            # Else the collector walks all that PyTorch holds, many times in each compilation.
            gc.collect()
            gc.freeze()
            parent.send(None)
            for one in parent.recv():
                parent.send((work(one),))


def side_by_side(
    groups: Sequence[list[Any]], processes: int, work: Callable[[Any], Any]
) -> Iterator[Any]:
    """work(one) for each of each group, as they are done. What is left when the caller stops is
    ended. Refusal where a process dies."""
    context = multiprocessing.get_context("spawn")
    left = iter(groups)
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(processes, len(groups))):
            ours, theirs = context.Pipe()
            workers[ours] = context.Process(target=_serve, args=(theirs, work), daemon=True)
            workers[ours].start()
            theirs.close()  # so that an end over there is seen here
        while workers:
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                try:
                    told = ready.recv()
                except (EOFError, ConnectionError):
                    workers[ready].join()
                    code = workers[ready].exitcode
                    raise Refusal(f"a process that executes jobs ended with code {code}") from None
                if told is not None:
                    yield told[0]
                elif (group := next(left, None)) is not None:
                    ready.send(group)
                else:
                    workers.pop(ready).terminate()
    finally:
        for process in workers.values():
            process.terminate()
