"""Files of kernels that are loaded when one of their functions is first called."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any


class Later:
    """A file of this package, as `moe.backward`, whose functions load it. To make a kernel of a
    function takes Triton a millisecond, and most programs never call most families."""

    def __init__(self, file: str) -> None:
        self._file = f"{__package__}.{file}"

    def __getattr__(self, name: str) -> _Function:
        return _Function(self._file, name)


class _Function:
    def __init__(self, file: str, name: str) -> None:
        self.__module__, self.__name__ = file, name

    @functools.cached_property
    def _found(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(self.__module__), self.__name__)
        return found

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._found, eval_str=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found(*args, **kwargs)
