"""NaN-poisoned memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def poison(each: Callable[[Tensor], object] = lambda t: None) -> Iterator[None]:
    """Fill memory from torch.empty, empty_like and new_empty with NaN: an unwritten element
    shows. each: called with every tensor so made."""
    # First imported inside, it would take ours for PyTorch's own for good.
    importlib.import_module("torch._dynamo")

    empties = (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")
    originals = [(owner, name, getattr(owner, name)) for owner, name in empties]

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            t = original(*args, **kwargs)
            if torch.compiler.is_compiling() or type(t) is not Tensor or t.is_meta:
                return t
            with torch.no_grad():
                t = t.fill_(float("nan")) if t.is_floating_point() else t
            each(t)
            return t

        return make

    try:
        for owner, name, original in originals:
            setattr(owner, name, poisoned(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
