"""A module's class replaced by a subclass whose forward is a plan's, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layers.parts.widths import off_fast_loads
from .kept import Kept, changed, keep
from .lora import wraps_parameter
from .lora_experts import detach
from .plan import Plan, passed_by


class Patched:
    """Mixed into the class of a patched module, before the module's own class."""

    _own_class: type
    _plan: Plan
    # Set by fusedmlp.distributed where the module's weights are sharded over ranks.
    _split: Any = None
    _kept: Kept | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A new module of the same type (a slice of a Sequential is one) was not patched.
        object.__setattr__(self, "__class__", self._own_class)
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def _path(self) -> str:
        """For explain(). No public name: the module's own submodules may have it."""
        op, why = self._plan.way(self)  # type: ignore[arg-type]
        words = f"patched, {op or 'nothing fused'} {self._plan.detail()}".rstrip()
        words += ", batch-invariant" if self._plan.invariant else ""
        added = why or self._plan.notes(self)  # type: ignore[arg-type]
        return f"{words}; {added}" if added else words

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join(filter(None, (own, self._path(), *off_fast_loads(self._reads()))))

    def _reads(self) -> Iterator[tuple[str, Tensor]]:
        """The matrices that the fused call reads, by their names."""
        return self._plan.matrices(self)  # type: ignore[arg-type]

    def _replicate_for_data_parallel(self) -> Any:
        # Its submodules are replicas too, others than those kept.
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica._kept = None
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, where pickle cannot find it by name.
        state = super().__reduce_ex__(2)[2:]
        return (_rebuild, (self._own_class, self._plan), *state)


class _AsItsOwn(type):
    """The class of patched classes. An instance of the model's own class is one of theirs: who
    looks for a class by its name, as FSDP's wrap policies do, may find the first block's and means
    all of that name."""

    def __instancecheck__(cls, instance: Any) -> bool:
        own = cls.__dict__.get("_own_class")
        return super().__instancecheck__(instance) if own is None else isinstance(instance, own)


@functools.cache
def _metaclass(kind: type[type]) -> type[type]:
    return _AsItsOwn if kind is type else type(kind.__name__, (_AsItsOwn, kind), {})


_classes: dict[tuple[type, Plan, Any], type] = {}


def patched_class(own: type, plan: Plan) -> type:
    """A subclass of `own` under its name: others tell modules by their class names."""
    key = own, plan, getattr(own, plan.method)
    if key not in _classes:
        _classes[key] = _make(own, plan)
    return _classes[key]


def _make(own: type, plan: Plan) -> type:
    original = plan.original(own)

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _foreign(args) or _foreign(kwargs.values()):
            return original(self, *args, **kwargs)
        kept = self._kept
        if kept is not None and (change := changed(self, kept)):
            raise passed_by(self, change)
        return self._plan.within(self, *args, **kwargs)

    methods = plan.methods(own, run)
    methods[plan.method] = _unless_replaced(own, plan.method, methods[plan.method])
    # torch.jit reads the annotations of a class; those here are none of the module's.
    notes = {"__annotations__": dict(getattr(own, "__annotations__", {}))}
    body = {"_own_class": own, "_plan": plan, **methods, **notes}
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    made: type = _metaclass(type(own))(own.__name__, (Patched, own), body | names)
    return made


def _unless_replaced(own: type, name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours`, for as long as `own` has the method that it had: one put there later is run."""
    found = getattr(own, name)

    @functools.wraps(found)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = getattr(own, name)
        return (ours if now is found else now)(self, *args, **kwargs)

    return method


def _foreign(values: Iterable[Any]) -> bool:
    """Whether an argument is none that kernels take, nor the reference: a proxy of torch.fx, a
    nested tensor of the strided layout."""
    for x in values:
        if isinstance(x, Tensor):
            if x.is_nested and x.layout is torch.strided:
                return True
        elif isinstance(x, fx.Proxy):
            return True
    return False


def _rebuild(own: type, plan: Plan) -> Any:
    cls: Any = patched_class(own, plan)
    return cls.__new__(cls)


def swap(module: nn.Module, plan: Plan) -> None:
    vars(module)["_kept"] = keep(module, plan)
    module.__class__ = patched_class(type(module), plan)


def restore(op: str, modules: Iterable[nn.Module]) -> None:
    """Give patched modules their own classes back. One that is not patched any more is skipped.

    Raises ValueError, when all others are restored, for one whose class another library replaced.
    """
    wrapped: list[str] = []
    for module in modules:
        if wraps_parameter(module):
            detach(module)
        elif "_own_class" in type(module).__dict__:
            type(module)._plan.restore(module)  # type: ignore[attr-defined]
            module.__class__ = type(module)._own_class  # type: ignore[attr-defined]
            vars(module).pop("_kept", None)
        elif isinstance(module, Patched):
            wrapped.append(type(module).__name__)
    if wrapped:
        raise ValueError(
            f"{op}: {', '.join(dict.fromkeys(wrapped))} was wrapped after patch(), by a class of "
            "another library; unwrap it first"
        )
