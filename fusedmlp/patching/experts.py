"""Experts of transformers as moe_mlp: the entry "fusedmlp" of its table of experts implementations,
and the plan by which patch() runs them.

    model.set_experts_implementation("fusedmlp")
    fusedmlp.patch(model)

Both leave the block around them as it is; patch() looks at the router too (router.py). `form.py`
says which experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..ops.moe_mlp import moe_mlp
from ..ops.top1_route import route_to
from ..reference import Routing
from .form import Form, form_of
from .plan import Plan

NAME = "fusedmlp"


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """sum_k weight[t, k] MLP_{index[t, k]}(x[t]), in transformers' experts interface.

    Args:
        experts: a module that transformers' `use_experts_implementation` decorates, or one that is
            alike (`form.py`).
        hidden_states: (T, D). top_k_index, top_k_weights: (T, k); an index of E or more (an expert
            of another rank) adds nothing.

    Raises ValueError for experts that have a norm after each expert, or whose gate, activation or
    forward is none that has a kernel.
    """
    return _run(experts, hidden_states, top_k_index, top_k_weights)


def _run(
    experts: Any,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    routed: Routing | None = None,
    call: Callable[..., Tensor] = moe_mlp,
) -> Tensor:
    """routed: perhaps of a router that gave `index` and `weights`; else they are grouped here."""
    form = form_of(experts)
    if isinstance(form, str):
        raise ValueError(f"experts implementation {NAME!r}: {form}")
    w, w_down, b, b_down = form.tensors(experts)
    E = getattr(experts, form.first).shape[0]  # of all ranks
    own = routed is not None and routed.expert is index and routed.prob is weights
    if routed is None or not own or routed.num_experts != E:
        routed = route_to(index, weights, E)
    y = call(
        x, routed, w, None, w_down, b, None, b_down,
        activation=form.activation, packed=form.packed,
    )  # fmt: skip
    return y.to(x.dtype)  # under autocast too, as the library's implementations do


@dataclass(frozen=True)
class Experts(Plan):
    """Experts behind the model's router, or one that patch() patched with them (router.py), whose
    Routing they take."""

    form: Form | None = None
    around: tuple[str, ...] = ()
    recompute: bool = False

    @property
    def op(self) -> str:
        return "moe_mlp"

    def detail(self) -> str:
        assert self.form is not None
        packed = f", packed {self.form.packed!r}" if self.form.packed else ""
        saves = ", saves x alone, 2 k H values a token less" if self.recompute else ""
        return f"activation {self.form.activation!r}{packed}{saves}"

    def recomputing(self) -> Plan:
        return replace(self, recompute=True)

    def bypassed(self) -> tuple[str, ...]:
        return self.around

    def passes_by(self) -> tuple[str, ...]:
        return self.around

    def prepare(self, module: nn.Module) -> None:
        vars(module)["_router"] = None

    def own_parameters(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, p in module._parameters.items() if p is not None)

    def restore(self, module: nn.Module) -> None:
        vars(module).pop("_router", None)

    def run(
        self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        router, routed = module._router, None
        if router is not None:
            routed, router._routed = router._routed, None
        call = moe_mlp if module._split is None else module._split
        if self.recompute:
            call = partial(call, recompute=True)
        return _run(module, hidden_states, top_k_index, top_k_weights, routed, call)


def plan_of(experts: nn.Module) -> Experts | str:
    """For patch(): the plan, or why there is none."""
    form = form_of(experts)
    if isinstance(form, str):
        return form
    around = tuple(name for name, _ in experts.named_modules() if name)
    return Experts(form=form, around=around)


def register_experts() -> bool:
    """Enter "fusedmlp" in transformers' table of experts implementations, if that is loaded (any
    model of transformers loads it); whether it is there now.

    Importing fusedmlp has it called as soon as the table is loaded, and patch() calls it; call it
    yourself where something else has put another table in its place.
    """
    table = sys.modules.get("transformers.integrations.moe")
    functions = getattr(table, "ALL_EXPERTS_FUNCTIONS", None)
    if functions is None:
        return False
    if NAME not in functions:
        functions.register(NAME, experts_forward)
    return True
