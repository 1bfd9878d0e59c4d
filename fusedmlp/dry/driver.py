"""Launches on CPU tensors that compile and do no more, and operators that compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from ..backends.choice import backend
from ..backends.library import serve_cpu
from ..kernels.arch import Arch
from ..kernels.device import pretend

MULTIPROCESSORS = 132
COMPUTED = 1 << 14  # elements that an operator may read


class _CompileOnly:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class Launched(NamedTuple):
    """One launch: its kernel's name, the compiled kernel, its grid."""

    name: str
    kernel: Any
    grid: tuple[int, ...]


@contextmanager
def _running(run: Callable[..., Any], *kinds: Any) -> Iterator[None]:
    """Inside, what launches a kernel of these kinds is `run`."""
    before = [kind.run for kind in kinds]
    for kind in kinds:
        kind.run = run
    try:
        yield
    finally:
        for kind, own in zip(kinds, before, strict=True):
            kind.run = own


@contextmanager
def compile_only(arch: Arch, multiprocessors: int = MULTIPROCESSORS) -> Iterator[list[Launched]]:
    """Inside, tensors lie on a GPU of `arch` and launches compile and do nothing else; the list
    gets each of them."""
    compiled: list[Launched] = []
    run = JITFunction.run

    def compile_it(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Launched(self.fn.__name__, kernel, tuple(grid)))
        return kernel

    active = driver._active  # not `active`, which looks for a GPU
    driver.set_active(_CompileOnly(arch.capability))
    try:
        with _running(compile_it, JITFunction), pretend(arch, multiprocessors):
            yield compiled
    finally:
        driver.set_active(active)


@contextmanager
def launch_nothing(arch: Arch, multiprocessors: int) -> Iterator[None]:
    """Inside, CPU tensors lie on such a GPU, and a launch is planned and does not take place."""
    serve_cpu()
    nothing = _running(lambda *_, **__: None, JITFunction, InterpretedFunction)
    with backend("triton"), pretend(arch, multiprocessors), nothing:
        yield


class Untouched(TorchDispatchMode):
    """Operators on floating tensors make empty results of the right shape. Those on integers, which
    route tokens, compute, and so do small ones: patch() knows an activation by its values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        floating = [t.numel() for t in given if t.is_floating_point()]
        if func.namespace != "aten" or sum(floating) <= COMPUTED:
            return func(*args, **kwargs)
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        if any(alias.is_write for alias in aliases):
            return args[0]
        if aliases:
            return func(*args, **kwargs)  # a view
        device = {"device": "meta"} if "device" in kwargs else {}
        moved = tree_map_only(Tensor, _meta, (args, {**kwargs, **device}))
        made = func(*moved[0], **moved[1])
        return tree_map_only(Tensor, unwritten, made)


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def unwritten(t: Tensor) -> Tensor:
    """A CPU tensor laid out like `t`, whose memory nobody has touched."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)


@contextmanager
def listening() -> Iterator[dict[str, bool]]:
    """The dict gets whether each kernel that Triton is asked for was in its cache, by its hash."""
    hits: dict[str, bool] = {}

    def listen(*, src: Any, metadata: Mapping[str, Any], cache_hit: bool, **rest: Any) -> None:
        hits.setdefault(str(metadata["hash"]), cache_hit)

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listen
    try:
        yield hits
    finally:
        triton.knobs.compilation.listener = before


@contextmanager
def compiling(arch: Arch, multiprocessors: int = MULTIPROCESSORS) -> Iterator[dict[str, bool]]:
    """Inside, ops on CPU tensors compile their kernels for `arch` and compute nothing; the dict
    gets whether each kernel was in the cache, by its hash."""
    serve_cpu()
    with listening() as hits, backend("triton"), compile_only(arch, multiprocessors), Untouched():
        yield hits
