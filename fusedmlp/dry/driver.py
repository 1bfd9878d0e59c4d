"""Launches on CPU tensors that compile and do no more, and operators that compute nothing.

A dry run changes its own thread alone: others launch and choose as ever. One takes place at a time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import DriverConfig
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from ..backends.choice import choose_here
from ..backends.library import BY_PLANS, serve_cpu
from ..backends.op import NAMESPACE
from ..kernels.arch import Arch
from ..kernels.device import HERE, INTERPRETED, pretend_here
from ..kernels.pick import LAST

MULTIPROCESSORS = 132
COMPUTED = 1 << 14  # elements that an operator may read
ONE = threading.RLock()  # a run's, since what it replaces in Triton is restored in order


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


def here(instead: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """`instead` in the thread of a dry run, `otherwise` in every other."""

    @functools.wraps(otherwise)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (instead if HERE.gpu else otherwise)(*args, **kwargs)

    return either


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute is `value`."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextmanager
def _running(run: Callable[..., Any], *kinds: Any) -> Iterator[None]:
    """Inside, what launches a kernel of these kinds in this thread is `run`."""
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(replaced(kind, "run", here(run, kind.run)))
        yield


@contextmanager
def _serving_cpu() -> Iterator[None]:
    """Inside, kernels take CPU tensors; after it they raise what PyTorch raises of them."""
    if INTERPRETED or HERE.gpu or serve_cpu.cache_info().currsize:  # they do already
        yield
        return
    with torch.library._scoped_library(NAMESPACE, "IMPL") as library:
        for name, launcher in BY_PLANS.items():
            library.impl(name, launcher, "CPU")
        yield


@contextmanager
def _last_kept() -> Iterator[None]:
    """After it the last launches are those of before."""
    last = dict(LAST)
    try:
        yield
    finally:
        LAST.clear()
        LAST.update(last)


@contextmanager
def compile_only(arch: Arch, multiprocessors: int = MULTIPROCESSORS) -> Iterator[list[Launched]]:
    """Inside, this thread's tensors lie on a GPU of `arch` and its launches compile and do nothing
    else; the list gets each of them."""
    compiled: list[Launched] = []
    with ONE:
        run, active = JITFunction.run, DriverConfig.active.fget
        compiler = _CompileOnly(arch.capability)

        def compile_it(
            self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
        ) -> Any:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            compiled.append(Launched(self.fn.__name__, kernel, tuple(grid)))
            return kernel

        drivers = property(here(lambda _: compiler, active))
        with (
            replaced(DriverConfig, "active", drivers),
            _running(compile_it, JITFunction),
            pretend_here(arch, multiprocessors),
        ):
            yield compiled


@contextmanager
def launch_nothing(arch: Arch, multiprocessors: int) -> Iterator[None]:
    """Inside, this thread's CPU tensors lie on such a GPU, and a launch is planned and does not
    take place."""
    nothing = _running(lambda *_, **__: None, JITFunction, InterpretedFunction)
    gpu = pretend_here(arch, multiprocessors)
    with ONE, _serving_cpu(), _last_kept(), nothing, choose_here("triton"), gpu:
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
            return kwargs.get("out", args[0])
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
    """The dict gets whether each kernel that Triton is asked for was in its cache, by its hash; in
    a dry run those of its thread alone."""
    hits: dict[str, bool] = {}
    with ONE:
        before = triton.knobs.compilation.listener
        dry = threading.get_ident() if HERE.gpu else None

        def listen(*, metadata: Mapping[str, Any], cache_hit: bool, **rest: Any) -> None:
            if dry in (None, threading.get_ident()):
                hits.setdefault(str(metadata["hash"]), cache_hit)
            if before is not None:
                before(metadata=metadata, cache_hit=cache_hit, **rest)

        with replaced(triton.knobs.compilation, "listener", listen):
            yield hits


@contextmanager
def compiling(arch: Arch, multiprocessors: int = MULTIPROCESSORS) -> Iterator[dict[str, bool]]:
    """Inside, this thread's ops on CPU tensors compile their kernels for `arch` and compute
    nothing; the dict gets whether each kernel was in the cache, by its hash."""
    with (
        ONE,
        _serving_cpu(),
        _last_kept(),
        choose_here("triton"),
        compile_only(arch, multiprocessors),
        listening() as hits,
        Untouched(),
    ):
        yield hits
