"""Launch plans: what a launcher did, as a function that does it again for operands that lie alike.

A launcher decides everything by how its operands lie: tile, grid, descriptors, memory to allocate.
One call of a layout is recorded: launches, by `noted`, and PyTorch's functions on tensors.
From the record a Python function is written, with all that was decided as constants; later calls
run it. No plan serves operands that it was not made for, because its key holds what a launcher
can see of them:

| operand | in the key |
|---|---|
| tensor | dtype, device, shape, strides, address modulo 16, all that Triton specialises on |
| weight: a tensor whose name begins with "w" | the address itself, so that its descriptors are constants |
| tensor beside the tensor before it | their distance, if under 16 bytes: do elements take turns? |
| anything else | its value |
| the process | device, Triton's driver, how float32 is multiplied, batch invariance |

A plan keeps no tensor alive. There is none in the interpreter, on a pretended GPU, inside `unplanned`,
where a hook watches launches or Triton debugs or instruments kernels, with a Triton that this file
does not know, or under FUSEDMLP_PLANS=0: launchers then run as they are written.
"""  # noqa: E501

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ..invariance import STATE
from .device import INTERPRETED, pretended

# Versions whose CompiledKernel.run takes what is written below.
KNOWN = ("3.6", "3.7", "3.8", "3.9")
# Layouts of one launcher that are remembered; the oldest is then forgotten.
MOST = 4096
# Bytes of an allocation that may share one with others.
LITTLE = 1 << 20
# The call of one layout that is recorded: a record costs as much as many launches.
RECORDED = 16

# What launchers may ask of a tensor: a key answers it. No element and no place in a storage.
_ASKED = {
    "data_ptr", "dim", "element_size", "get_device", "is_contiguous", "is_floating_point", "numel",
    "size", "stride", "__hash__", "__len__",
    "device", "dtype", "is_cuda", "itemsize", "ndim", "shape",
}  # fmt: skip
_UNPLANNED = object()

_local = threading.local()
_unplanned = 0
_counting = threading.Lock()


class Unplannable(Exception):
    """A launcher did what no plan can do again; the message says what."""


@contextmanager
def unplanned() -> Iterator[None]:
    """Inside, launchers run as they are written."""
    global _unplanned
    with _counting:
        _unplanned += 1
    try:
        yield
    finally:
        with _counting:
            _unplanned -= 1


def recording() -> Recorder | None:
    """The record that this thread makes, if it makes one."""
    return getattr(_local, "recorder", None)


def noted(kernel: Any) -> Any:
    """The kernel, to be launched as `noted(kernel)[grid](...)`: how every launcher launches."""
    recorder = recording()
    return kernel if recorder is None else _Noted(recorder, kernel)


@dataclass(frozen=True)
class _Noted:
    recorder: Recorder
    kernel: Any

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            compiled = self.kernel[grid](*args, **kwargs)
            self.recorder.launched(self.kernel, compiled, grid, args, kwargs)
            return compiled

        return launch


class _At:
    """An address in a descriptor's place for a tensor."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _describe(fields: dict[str, Any], base: Any) -> TensorDescriptor:
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.__dict__.update(fields)
    descriptor.base = base
    return descriptor


@dataclass
class _Call:
    """A function of PyTorch's that made tensors, or changed them. view: it made no memory."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Any
    view: bool


@dataclass
class _Launch:
    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    values: list[Any]


class Recorder(TorchFunctionMode):
    """What one call of a launcher does. arguments: the launcher's; fixed: places of its weights."""

    def __init__(self, arguments: tuple[Any, ...], fixed: frozenset[int]) -> None:
        super().__init__()
        self.arguments, self.fixed = arguments, fixed
        self.steps: list[_Call | _Launch] = []
        self.chosen: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.why = ""
        self.names: dict[int, str] = {}
        self.parents: dict[str, Tensor] = {}
        self.kept: list[Tensor] = []  # an id is a tensor's as long as it lives
        for i, t in enumerate(arguments):
            if isinstance(t, Tensor):
                self._name(t, f"a{i}")

    def _name(self, t: Tensor, name: str) -> None:
        self.names.setdefault(id(t), name)
        self.kept.append(t)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        tensors, name = _tensors(made), func.__name__
        if name == "__get__":
            name = func.__self__.__name__
        if not tensors and name != "__setitem__":
            if name not in _ASKED:
                self.why = self.why or f"it asks for {name}"
            return made
        # What a view is taken of is the first of two in one memory.
        memory = {t.untyped_storage().data_ptr(): t for t in _tensors((args, kwargs))[::-1]}
        new = [t for t in tensors if id(t) not in self.names]
        writes = "out" in kwargs or (name.endswith("_") and name != "__getitem__")
        if not new and not writes:
            return made
        if writes and any(id(t) not in self.names for t in memory.values()):
            self.why = self.why or f"{name} changes a tensor that is neither given nor made"
            return made
        view = not writes
        for t in new:
            self._name(t, f"t{len(self.kept)}")
            parent = memory.get(t.untyped_storage().data_ptr()) if t.numel() else None
            view = view and parent is not None
            if parent is not None:
                self.parents[self.names[id(t)]] = parent
        self.steps.append(_Call(func, args, kwargs, made, view))
        return made

    def launched(
        self, kernel: Any, compiled: Any, grid: Sequence[int], args: Any, kwargs: Any
    ) -> None:
        if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
            self.why = self.why or f"a launch returns {type(compiled).__name__}"
            return
        options = {name: kwargs[name] for name in kernel.arg_names if name in kwargs}
        bound = inspect.signature(kernel.fn).bind(*args, **options)
        bound.apply_defaults()
        self.steps.append(_Launch(kernel, compiled, tuple(grid), list(bound.arguments.values())))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


class _Writer:
    """A record as source: `a0`, ... are the arguments, `t1`, ... tensors that were made, `p_x` the
    address of x, `c0`, ... constants."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.constants: dict[str, Any] = {"describe": _describe, "At": _At, "uint8": torch.uint8}
        self.names = {id(value): name for name, value in self.constants.items()}
        self.addressed: set[str] = set()
        self.needed: set[str] = set()
        self.scratch_bytes = 0

    def constant(self, value: Any) -> str:
        if value is None or type(value) in (int, bool, str):
            return repr(value)
        if id(value) not in self.names:
            self.names[id(value)] = f"c{len(self.constants)}"
            self.constants[self.names[id(value)]] = value
        return self.names[id(value)]

    def name(self, t: Tensor) -> str:
        if id(t) not in self.recorder.names:
            raise Unplannable("it uses a tensor that is neither given nor made")
        return self.recorder.names[id(t)]

    def value(self, value: Any) -> str:
        """An argument of a function of PyTorch's, or the result."""
        if isinstance(value, Tensor):
            self.needed.add(self.name(value))
            return self.name(value)
        if not _tensors(value):
            return self.constant(value)
        if isinstance(value, dict) or hasattr(value, "_fields"):
            raise Unplannable(f"it hands tensors over in a {type(value).__name__}")
        inner = ", ".join(map(self.value, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"

    def base(self, t: Tensor) -> tuple[str, int]:
        """(the tensor that holds the memory of `t`, how many bytes into it `t` begins)."""
        names, parents = self.recorder.names, self.recorder.parents
        address = t.data_ptr()
        while names.get(id(t)) in parents:
            t = parents[names[id(t)]]
        return self.name(t), address - t.data_ptr()

    def address(self, t: Tensor) -> str:
        name, offset = self.base(t)
        if self._fixed(name):
            return repr(t.data_ptr())
        self.addressed.add(name)
        return f"p_{name} + {offset}" if offset else f"p_{name}"

    def _fixed(self, name: str) -> bool:
        return name[0] == "a" and int(name[1:]) in self.recorder.fixed

    def passed(self, value: Any) -> str:
        """An argument of a kernel."""
        if isinstance(value, Tensor):
            return self.address(value)
        if isinstance(value, TensorDescriptor):
            fields = {k: v for k, v in vars(value).items() if k != "base"}
            name, offset = self.base(value.base)
            if self._fixed(name):
                return self.constant(_describe(fields, _At(value.base.data_ptr())))
            address = self.address(value.base)  # which must be as much of a multiple
            if not offset:
                self.needed.add(name)
            base = f"At({address})" if offset else name
            return f"describe({self.constant(fields)}, {base})"
        if isinstance(value, tuple) and _held(value):
            return f"({', '.join(map(self.passed, value))},)"
        return self.constant(value)

    def launch(self, step: _Launch) -> str:
        grid = ", ".join(map(str, (*step.grid, 1, 1)[:3]))
        compiled = step.compiled
        self.constant(compiled)  # unloads its function when nobody holds it
        run, function, packed = map(
            self.constant, (compiled.run, compiled.function, compiled.packed_metadata)
        )
        values = ", ".join(map(self.passed, step.values))
        return f"{run}({grid}, stream, {function}, {packed}, None, None, None, {values})"

    def call(self, step: _Call) -> str:
        function = self.constant(step.function)
        given = [self.value(v) for v in step.args]
        given += [f"{name}={self.value(v)}" for name, v in step.kwargs.items()]
        names = self.recorder.names
        made = ", ".join(names[id(t)] for t in _tensors(step.made))
        comma = "," if isinstance(step.made, (tuple, list)) else ""
        return (
            f"{made}{comma} = {function}({', '.join(given)})"
            if made
            else f"{function}({', '.join(given)})"
        )

    def source(self, result: Any) -> str:
        """Written from its end, where it is known what is needed."""
        recorder, names = self.recorder, self.recorder.names
        lines = [f"return {self.value(result)}"]
        for last, tiles in recorder.chosen:
            lines += [f"{self.constant(last)}.update({self.constant(tiles)})"]
        for step in reversed(recorder.steps):
            if isinstance(step, _Launch):
                before = self.addressed | self.needed
                line = self.launch(step)
                last = sorted(n for n in self.addressed - before if n[0] == "t")
                lines += [f"{' = '.join(last)} = None", line] if last else [line]
                continue
            made = [t for t in _tensors(step.made) if id(t) in names]
            if step.view and not any(names[id(t)] in self.needed for t in made):
                continue
            if self.is_scratch(step):
                lines += [self.scratch(step.made)]
                continue
            before = self.addressed | self.needed
            for t in made:
                lines += self.pointer(names[id(t)], t.data_ptr() % 16)
            line = self.call(step)
            met = self.needed | {names[id(t)] for t in made}
            last = sorted(n for n in met - before if n[0] == "t")
            lines += [f"{' = '.join(last)} = None", line] if last else [line]
        if self.scratch_bytes:
            new = self.constant(Tensor.new_empty)
            lines += self.pointer("scratch", 0)
            lines += [f"scratch = {new}(a0, {self.scratch_bytes}, dtype=uint8)"]
        for i, t in enumerate(recorder.arguments):
            if isinstance(t, Tensor) and f"a{i}" in self.addressed:
                lines += [f"p_a{i} = a{i}.data_ptr()"]
        kernels = dict.fromkeys(s.kernel for s in recorder.steps if isinstance(s, _Launch))
        if kernels:
            hooked = " or ".join(f"{self.constant(kernel)}.pre_run_hooks" for kernel in kernels)
            lines += [f"if {hooked}: return {self.constant(_UNPLANNED)}"]
        parameters = ", ".join(f"a{i}" for i in range(len(recorder.arguments)))
        body = "".join(f"    {line}\n" for line in reversed(lines))
        return f"def plan(stream, {parameters}):\n{body}"

    def is_scratch(self, step: _Call) -> bool:
        """Is it little memory of which kernels alone know?"""
        t = step.made
        return (
            step.function in (Tensor.new_empty, torch.empty, torch.empty_like)
            and self.name(t) not in self.needed
            and 0 < t.nbytes <= LITTLE
            and t.data_ptr() % 16 == 0
        )

    def scratch(self, t: Tensor) -> str:
        """A place in one allocation for all that `is_scratch`."""
        name, place = self.name(t), self.scratch_bytes
        self.scratch_bytes += -(-t.nbytes // 256) * 256
        self.addressed.discard(name)
        self.addressed.add("scratch")
        return f"p_{name} = p_scratch + {place}"

    def pointer(self, name: str, low: int) -> list[str]:
        """The address of new memory, which must lie on 16 bytes where it did when kernels were
        compiled for it."""
        if name not in self.addressed or name in self.recorder.parents:
            return []
        self.addressed.discard(name)
        return [
            f"if p_{name} % 16 != {low}: return {self.constant(_UNPLANNED)}",
            f"p_{name} = {name}.data_ptr()",
        ]


def _held(value: tuple[Any, ...]) -> bool:
    """Does it hold what has an address?"""
    return any(
        _held(v) if isinstance(v, tuple) else isinstance(v, (Tensor, TensorDescriptor))
        for v in value
    )


def _write(recorder: Recorder, result: Any) -> Callable[..., Any]:
    if recorder.why:
        raise Unplannable(recorder.why)
    writer = _Writer(recorder)
    source = writer.source(result)
    made: dict[str, Any] = {}
    exec(compile(source, "<launch plan>", "exec"), writer.constants, made)
    plan: Callable[..., Any] = made["plan"]
    plan.__doc__ = source
    return plan


def _record(launcher: Callable[..., Any], arguments: tuple[Any, ...], fixed: frozenset[int]) -> Any:
    """(the launcher's result, its plan)"""
    # One tensor given twice is two arguments, which will not always be one tensor.
    first = {id(a): i for i, a in reversed(list(enumerate(arguments)))}
    arguments = tuple(
        a.detach() if isinstance(a, Tensor) and first[id(a)] != i else a
        for i, a in enumerate(arguments)
    )
    recorder: Recorder | None = Recorder(arguments, fixed)
    _local.recorder = recorder
    try:
        with recorder:  # type: ignore[union-attr]
            result = launcher(*arguments)
    except torch.OutOfMemoryError:  # a record holds every tensor until its end
        recorder = None
    finally:
        _local.recorder = None
    if recorder is None:
        return launcher(*arguments), _UNPLANNED
    try:
        return result, _write(recorder, result)
    except Unplannable:
        return result, _UNPLANNED
    except Exception as error:
        warnings.warn(f"{launcher.__name__}: no launch plan: {error!r}", stacklevel=2)
        return result, _UNPLANNED


def _driver() -> Any:
    """Triton's driver, or None where launches are watched or changed, and none is by a plan."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if (
        _unplanned
        or pretended()
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook is not None
        # A chain of hooks that is empty is none.
        or (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    ):
        return None
    return triton.runtime.driver.active


def _value(a: Any) -> Any:
    """What of an argument that is no tensor goes into a key. A float by its bits: 0 is not -0."""
    if isinstance(a, float):
        return a.hex()
    return tuple(map(_value, a)) if isinstance(a, (list, tuple)) else a


# What goes into a key of a weight and of another tensor. last: the address of the tensor before.
_WEIGHT = "k{i} = a{i}.dtype, a{i}.get_device(), a{i}.shape, a{i}.stride(), a{i}.data_ptr()"
_OTHER = """p = a{i}.data_ptr()
    {indent}near, last = p - last, p
    {indent}near = near if -16 < near < 16 else 16
    {indent}k{i} = a{i}.dtype, a{i}.get_device(), a{i}.shape, a{i}.stride(), p % 16, near"""


@functools.cache
def _key_of(launcher: Callable[..., Any]) -> tuple[Callable[..., Any], frozenset[int]]:
    """(from driver, device and the launcher's arguments to a key, places of the weights)"""
    parameters = inspect.signature(launcher, eval_str=True).parameters
    weights = frozenset(
        i for i, (name, p) in enumerate(parameters.items())
        if name.startswith("w") and p.annotation in (Tensor, Tensor | None)
    )  # fmt: skip
    lines, parts, tensors = ["last = 0"], ["driver", "device", "mode.on"], []
    for i, parameter in enumerate(parameters.values()):
        kind = parameter.annotation
        parts.append(f"k{i}")
        if kind in (Tensor, Tensor | None):
            optional = kind is not Tensor
            text = (_WEIGHT if i in weights else _OTHER).format(i=i, indent="    " * optional)
            if optional:
                lines += [f"k{i} = None", f"if a{i} is not None:", f"    {text}"]
                tensors.append(f"a{i} is not None and k{i}[0] is float32")
            else:
                lines += [text]
                tensors.append(f"k{i}[0] is float32")
        elif kind in (str, bool, int, str | None, int | None):
            parts[-1] = f"a{i}"
        else:
            lines.append(f"k{i} = value(a{i})")
    lines.append(f"float32_by = precision() if {' or '.join(tensors)} else None")
    lines.append(f"return {', '.join([*parts, 'float32_by'])}")
    star = inspect.Parameter.VAR_POSITIONAL
    given = ", ".join(
        f"{'*' * (p.kind is star)}a{i}{'=None' * (p.default is None)}"  # torch drops defaults
        for i, p in enumerate(parameters.values())
    )
    source = f"def key(driver, device, {given}):\n" + "".join(f"    {line}\n" for line in lines)
    made: dict[str, Any] = {}
    names = {
        "float32": torch.float32, "value": _value, "precision": _precision, "mode": STATE,
    }  # fmt: skip
    exec(compile(source, "<key of a launch plan>", "exec"), names, made)
    made["key"].__doc__ = source
    return made["key"], weights


def _precision() -> str:
    return torch.backends.cuda.matmul.fp32_precision


def plans_are_off() -> str | None:
    """Why this process makes no plans, or None where it does."""
    if INTERPRETED:
        return "Triton interprets kernels"
    if os.environ.get("FUSEDMLP_PLANS", "1") == "0":
        return "FUSEDMLP_PLANS is 0"
    if triton.__version__[:3] not in KNOWN:
        return f"Triton {triton.__version__} is none of {', '.join(KNOWN)}"
    return None


def planned(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher, by plans. Its first argument is a tensor on the current device."""
    if plans_are_off():
        return launcher
    plans: dict[Any, Any] = {}
    lock = threading.Lock()

    @functools.wraps(launcher)
    def launch(*arguments: Any) -> Any:
        driver = _driver()
        if driver is None:
            return launcher(*arguments)
        key_of, weights = _key_of(launcher)
        device = arguments[0].get_device()
        key = key_of(driver, device, *arguments)
        plan = plans.get(key)
        if plan.__class__ is FunctionType:
            result = plan(driver.get_current_stream(device), *arguments)
            return launcher(*arguments) if result is _UNPLANNED else result
        if plan is _UNPLANNED:
            return launcher(*arguments)
        seen = plan or 0
        if seen + 1 < RECORDED:
            result, plan = launcher(*arguments), seen + 1
        else:
            result, plan = _record(launcher, arguments, weights)
        with lock:
            if key not in plans and len(plans) >= MOST:
                del plans[next(iter(plans))]
            plans[key] = plan
        return result

    launch.plans = plans  # type: ignore[attr-defined]
    return launch
