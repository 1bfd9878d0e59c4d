"""A process that has imported what most tests import, and forks for each run of pytest: to import
torch and transformers takes longer than most tests that find a fault.

Reads lines of JSON: pytest's arguments, a file for its output, how many seconds of the processor a
test may take, and words: tests that have one in their names, or their files do, come first. Answers
each with the id of the new process and, once that has ended, with its exit code, -signal where one
ended it. The code under test is never imported here.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any

CLOCK = 15  # times as many seconds of the clock
TIMED_OUT = {-signal.SIGVTALRM, -signal.SIGALRM}

IMPORTED = (
    "torch", "torch._dynamo", "torch.distributed.tensor", "transformers.modeling_layers",
    "transformers.masking_utils",
)  # fmt: skip


def serve(modules: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, os.getcwd())  # as python -m pytest does
    choose()
    for name in ("pytest", *modules):
        importlib.import_module(name)
    for line in sys.stdin:
        arguments, output, *options = json.loads(line)
        process = os.fork()
        if process == 0:
            run(arguments, output, Plugin(*options))
        print(process, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)


def choose() -> None:
    """What tests/conftest.py and tests/support/patch_models.py choose before they import."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def run(arguments: list[str], output: str, plugin: Plugin) -> None:
    """Does not return."""
    status = 1
    try:
        os.setsid()  # with the tests' own processes, which a time-out ends too
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        importlib.invalidate_caches()
        plugin.limit()  # of what is collected
        status = int(sys.modules["pytest"].main(arguments, plugins=[plugin]))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


class Plugin:
    """Each test has its own time; some come first."""

    def __init__(self, seconds: float, words: list[str]) -> None:
        self.seconds, self.words = seconds, words

    def limit(self) -> None:
        """From here on; both signals end the process."""
        signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds)
        signal.setitimer(signal.ITIMER_REAL, CLOCK * self.seconds)

    def pytest_runtest_logstart(self) -> None:
        self.limit()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        named = lambda item: any(word in item.nodeid for word in self.words)  # noqa: E731
        items.sort(key=lambda item: not named(item))


if __name__ == "__main__":
    serve(sys.argv[1:])
