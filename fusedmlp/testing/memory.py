"""NaN-poisoned memory, and what autograd keeps."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..kernels.plans import unplanned


@contextmanager
def poison(each: Callable[[Tensor], object] = lambda t: None) -> Iterator[None]:
    """Fill memory from torch.empty, empty_like and new_empty with NaN: an unwritten element
    shows. each: called with every tensor so made. Launchers run as they are written, without plans.
    Where torch._dynamo is first imported inside, it is no longer filled from there on."""
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

    def restore() -> None:
        for owner, name, original in originals:
            setattr(owner, name, original)

    finder = _BeforeDynamo(restore)
    try:
        for owner, name, original in originals:
            setattr(owner, name, poisoned(original))
        sys.meta_path.insert(0, finder)
        with unplanned():
            yield
    finally:
        sys.meta_path.remove(finder)
        restore()


class _BeforeDynamo(importlib.abc.MetaPathFinder):
    """Calls `restore` before torch._dynamo is imported, which would take ours for PyTorch's own for
    good. To import it beforehand would take a second of each process."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self.restore = restore

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "torch._dynamo":
            self.restore()


def kept_bytes(call: Callable[[], Tensor], arguments: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of `call` for its backward, beyond the memory of its arguments.
    Fake tensors count too."""
    own = {t.untyped_storage()._cdata for t in arguments}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    if not out.requires_grad:
        raise AssertionError("kept_bytes: the call must be differentiable, got no graph")
    return sum(kept.values())
