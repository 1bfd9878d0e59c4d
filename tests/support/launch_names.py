"""The names of the kernels that are launched, compiled or in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


@contextmanager
def launches() -> Iterator[list[str]]:
    """Yields a list that gets the name of each kernel launched inside."""
    names: list[str] = []

    def noted(kind):
        run = kind.run

        def noting(self, *args, **kwargs):
            names.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        return mock.patch.object(kind, "run", noting)

    with noted(InterpretedFunction), noted(JITFunction):
        yield names
