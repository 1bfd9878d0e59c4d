"""The plan of a router that topk_route computes (route.py), beside experts that it serves.

The router stays a module that is called, with its hooks, and gives what it gave: its logits, each
token's weights and experts. They are fields of one Routing, which the experts take instead of
grouping the choices again, if what they are given are those very tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.parts.around import hooked
from .dense import local
from .experts import Experts
from .form import settings_of
from .lora import beneath
from .plan import Plan, child, passed_by
from .route import ARGUMENT, Route, is_matrix, route_of
from .swap import Patched


@dataclass(frozen=True)
class Router(Plan):
    route: Route | None = None
    names: tuple[str, ...] = ()
    around: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        return "topk_route"

    def detail(self) -> str:
        assert self.route is not None
        options = [f"{name}={value!r}" for name, value in self.route.options]
        return ", ".join([f"{self.route.k} experts a token", *options])

    def bypassed(self) -> tuple[str, ...]:
        return self.around

    def passes_by(self) -> tuple[str, ...]:
        return self.around

    def own_parameters(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, p in module._parameters.items() if p is not None)

    def prepare(self, module: nn.Module) -> None:
        vars(module).update(_routed=None, _settings=settings_of(module)[1:])

    def restore(self, module: nn.Module) -> None:
        vars(module).pop("_routed", None)
        vars(module).pop("_settings", None)

    def example(self, module: Any, rows: int, like: Tensor) -> tuple[Tensor, ...]:
        assert self.route is not None
        return (like.new_zeros(rows, _get(module, self.route.logits.weight).shape[1]),)

    def run(self, module: Any, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, ...]:
        assert self.route is not None
        compiling = torch.compiler.is_compiling()  # which takes them for constants
        if not compiling and settings_of(module)[1:] != module._settings:
            raise passed_by(module, "a number or function in it is another than at patch()")
        if torch.is_autocast_enabled(x.device.type):  # which some routers switch off
            more = () if added is None else (added,)
            return module._own_class.forward(module, x, *more)
        tensors = {name: local(_get(module, name)) for name in self.names}
        if added is not None:
            tensors[ARGUMENT] = added
        logits = self.route.logits(tensors, x)
        routing = self.route.routing(logits, x, tensors)
        module._routed = routing
        return logits, routing.prob, routing.expert


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    return getattr(child(module, path) if path else module, key)


def plan_of_router(router: nn.Module) -> Router | str:
    """For patch(): the plan, or why there is none."""
    around = hooked(router)
    route = f"it {around}" if around else route_of(router)
    if isinstance(route, str):
        return f"its router runs as it is: {route}"
    names = (route.logits.weight, route.logits.bias, route.added)
    return Router(
        route=route,
        names=tuple(name for name in names if name not in (None, ARGUMENT)),
        around=tuple(name for name, _ in router.named_modules() if name),
    )


def experts_among(modules: Iterable[nn.Module]) -> Any:
    """The one module of patched experts among `modules`, or None."""
    inside = (beneath(m) for m in modules)
    found = [m for m in inside if isinstance(m, Patched) and isinstance(m._plan, Experts)]
    return found[0] if len(found) == 1 else None


def routes(module: nn.Module, E: int) -> bool:
    """Whether it may be the router of E experts: it has one matrix, of E rows, and is no Linear."""
    tensors = [t for t in module.parameters() if is_matrix(t)]
    return not isinstance(module, nn.Linear) and [t.shape[0] for t in tensors] == [E]
