"""The kernels that are launched, compiled or in Triton's interpreter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fusedmlp.kernels.plans import unplanned


@contextmanager
def noted(note: Callable[[str, dict[str, Any]], object]) -> Iterator[None]:
    """Calls `note` with the name of each kernel launched inside, and its arguments by name."""

    def noting(kind):
        run = kind.run

        def launch(self, *args, **kwargs):
            note(self.fn.__name__, kwargs)
            return run(self, *args, **kwargs)

        return mock.patch.object(kind, "run", launch)

    with noting(InterpretedFunction), noting(JITFunction), unplanned():
        yield


@contextmanager
def launches() -> Iterator[list[str]]:
    """Yields a list that gets the name of each kernel launched inside."""
    names: list[str] = []
    with noted(lambda name, arguments: names.append(name)):
        yield names
