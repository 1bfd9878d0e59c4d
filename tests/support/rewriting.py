"""Kernels with other source."""

from collections.abc import Iterator
from contextlib import contextmanager

from triton.runtime.jit import JITFunction


@contextmanager
def rewritten(fn: JITFunction, old: str, new: str) -> Iterator[None]:
    """The kernel with other source, where `old` stands once."""
    source = fn.src
    assert source.count(old) == 1, (fn.__name__, old, source.count(old))

    def put(text: str) -> None:
        fn._unsafe_update_src(text)
        fn.hash = None
        fn.device_caches.clear()

    put(source.replace(old, new))
    try:
        yield
    finally:
        put(source)
