"""A plan: how a patched module runs, and which of its submodules that passes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..invariance import batch_invariant
from .lora import beneath
from .projection import called


@dataclass(frozen=True)
class Plan:
    """How a module runs once patched. Frozen, hashable and picklable: it is part of a class.

    method: the method of the module that `run` replaces. invariant: whether it runs inside
    batch_invariant(), whoever calls it.

    Subclasses define `run`, and `op`: the name of the function that it calls.
    """

    method: str = "forward"
    invariant: bool = field(default=False, kw_only=True)

    @property
    def op(self) -> str:
        raise NotImplementedError

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module's method now does."""
        raise NotImplementedError

    def example(self, module: nn.Module, rows: int, like: Tensor) -> tuple[Tensor, ...]:
        """Inputs of `trial` of so many rows, made by `like`: zeros. NotImplementedError where
        nothing says what they are."""
        raise NotImplementedError("nothing says what its plan is called with")

    def trial(self, module: nn.Module, *inputs: Tensor) -> Any:
        """What is fused of a call."""
        return self.within(module, *inputs)

    def bypassed(self) -> tuple[str, ...]:
        """Paths of the submodules whose parameters are read without calling them. Their hooks would
        not run, so they must have none; nothing inside them is patched on its own."""
        return ()

    def may_call(self) -> tuple[str, ...]:
        """Those in `bypassed()` that `run` calls where something stands around them."""
        return ()

    def way(self, module: nn.Module) -> tuple[str | None, str]:
        """The function that `run` calls as `module` is now, or None where nothing is left to fuse;
        and why it is not `op`."""
        return self.op, ""

    def passes_by(self) -> tuple[str, ...]:
        """Submodules in `bypassed()` whose parameters `run` never reads, or that hold others;
        parents first. Replacing one after patch() makes the next call raise."""
        return ()

    def wrapped(self) -> tuple[str, ...]:
        """Those in `passes_by()` around which PEFT may put wrappers of their parameters."""
        return ()

    def own_parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of the module's own, in none of its submodules, that `run`
        reads."""
        return ()

    def matrices(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The matrices, or stacks of them, that `run` reads, by their names."""
        read = [(name, getattr(module, name)) for name in self.own_parameters(module)]
        for path, inner in self.read_modules(module):
            read += ((f"{path}.{name}", p) for name, p in inner.named_parameters(recurse=False))
        return ((name, p) for name, p in read if p.dim() in (2, 3))

    def read_modules(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The submodules whose parameters `run` reads as `module` is now, by their paths."""
        for path in self.bypassed():
            inner = beneath(child(module, path))
            if not (path in self.may_call() and called(inner)):
                yield path, inner

    def waits(self, module: nn.Module) -> bool:
        """Whether `run` may fuse something later, where `way` has nothing left to fuse now."""
        return False

    def values(self) -> tuple[tuple[str, str], ...] | None:
        """(path of the holder, name) of numbers and functions of the module that `run` takes as
        patch() found them; None: of all functions."""
        return None

    def is_part(self) -> bool:
        """Whether `run` stands for a part of the method, and the rest of it runs as it is."""
        return False

    def methods(self, own: type, run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """What the patched class has under its own names; `run` is checked."""
        return {self.method: run}

    def original(self, own: type) -> Callable[..., Any]:
        """What `run` stands for."""
        return getattr(own, self.method)

    def recomputing(self) -> Plan:
        """The plan that saves less for backward and computes it again there, or this one."""
        return self

    def spared(self, module: nn.Module) -> int:
        """Bytes a token that this plan does not save for backward, and `recomputing` is why."""
        return 0

    def obstacle(self, module: nn.Module) -> str | None:
        """Why `run` would not compute what the module's own method computes now."""
        return None

    def prepare(self, module: nn.Module) -> None:
        """What patch() does to the module before it swaps its class."""

    def restore(self, module: nn.Module) -> None:
        """What unpatch() undoes of it."""

    def within(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """`run`, in the plan's mode. Raises TypeError where another library's part of it promises
        nothing."""
        if not self.invariant:
            return self.run(module, *args, **kwargs)
        now, why = self.way(module)
        if now != self.op:
            raise TypeError(
                f"patched {type(module).__name__}: with batch_invariant=True all of {self.op} must "
                f"be fused, got {now or 'nothing'}, {why}; unpatch(model), or patch it without"
            )
        with batch_invariant():
            return self.run(module, *args, **kwargs)

    def notes(self, module: nn.Module) -> str:
        """What a call takes of `module` as it is now, beside what `detail` says."""
        return ""

    def detail(self) -> str:
        """For the report and for the module's repr."""
        return ""


def child(module: nn.Module, path: str) -> nn.Module:
    """What stands at `path`; on the way there PEFT's wrappers of parameters are looked through."""
    first, *rest = path.split(".")
    module = getattr(module, first)
    for name in rest:
        module = getattr(beneath(module), name)
    return module


def passed_by(owner: nn.Module, what: str) -> TypeError:
    return TypeError(
        f"patched {type(owner).__name__}: {what}, which the fused call would pass by; hook or wrap "
        "the MLP as a whole, or unpatch(model) first"
    )


def with_parents(paths: tuple[str | None, ...]) -> tuple[str, ...]:
    """`paths` and every module between the owner and them, once each."""

    def parents() -> Iterator[str]:
        for path in paths:
            parts = path.split(".") if path else []
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))

    return tuple(dict.fromkeys(parents()))
