"""Triton's interpreter, made to prepare its language once a launch.

The interpreter puts its own functions in the place of triton.language's before every call of a
device function, though nothing took them away since the launch began. That is two fifths of its
time on the kernels here, and no number depends on it (Triton 3.6 to 3.9).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl


class _Nothing:
    """The scope of a function whose languages are in place already."""

    @staticmethod
    def restore() -> None: ...


@functools.lru_cache(None)
def _languages(fn: Callable[..., Any]) -> frozenset[str]:
    """The modules that the interpreter looks for among the globals of `fn`."""
    return frozenset(m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core)


def prepare_once() -> None:
    """Let every launch prepare the language once, at its beginning. A second call does nothing."""
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang
    if hasattr(prepare, "__wrapped__"):
        return
    prepared: set[str] = set()

    @functools.wraps(prepare)
    def once(fn: Callable[..., Any]) -> Any:
        languages = _languages(fn)
        if languages <= prepared:
            return _Nothing
        scope = prepare(fn)
        if not prepared:  # a launch begins, which restores the language at its end
            restore = scope.restore

            def forget() -> None:
                prepared.clear()
                restore()

            scope.restore = forget
        prepared.update(languages)
        return scope

    interpreter._patch_lang = once
