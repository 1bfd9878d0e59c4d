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

import torch
from torch import Tensor, nn

from ..ops.moe_mlp import moe_mlp
from ..ops.top1_route import route_to
from ..reference import Routing
from .form import Form, form_of
from .lora_experts import lora_of, taken
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
    return _call(experts, form, x, index, weights, routed, call)


def _call(
    experts: Any,
    form: Form,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    routed: Routing | None,
    call: Callable[..., Tensor],
) -> Tensor:
    (first, low_first), (last, low_last) = (taken(experts, name) for name in form.names()[:2])
    w, w_down, b, b_down = form.tensors(experts, (first, last))
    lora = lora_of(low_first, low_last, form)
    E = first.shape[0]  # of all ranks
    own = routed is not None and routed.expert is index and routed.prob is weights
    if routed is None or not own or routed.num_experts != E:
        routed = route_to(index, weights, E)
    options = {} if lora is None else {"lora": lora}
    y = call(
        x, routed, w, None, w_down, b, None, b_down,
        activation=form.activation, packed=form.packed, **options,
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

    def _choices(self, module: Any) -> int | None:
        """k, where anything says it: the router that is patched too, or the configuration."""
        router = vars(module).get("_router")
        if router is not None and (route := getattr(router._plan, "route", None)):
            return int(route.k)
        k = getattr(getattr(module, "config", None), "num_experts_per_tok", None)
        return k if isinstance(k, int) else None

    def example(self, module: Any, rows: int, like: Tensor) -> tuple[Tensor, ...]:
        k = self._choices(module)
        if k is None or self.form is None:
            raise NotImplementedError("nothing says how many experts a token has")
        w, *_ = self.form.tensors(module)
        index = like.new_zeros(rows, k, dtype=torch.int64)
        return like.new_zeros(rows, w.shape[2]), index, like.new_zeros(rows, k)

    def spared(self, module: Any) -> int:
        """0 where nothing says how many experts a token has."""
        k = self._choices(module)
        if not self.recompute or self.form is None or k is None:
            return 0
        w, *_ = self.form.tensors(module)
        return k * w.shape[1] * w.itemsize

    def bypassed(self) -> tuple[str, ...]:
        return self.around

    def passes_by(self) -> tuple[str, ...]:
        return self.around

    def prepare(self, module: nn.Module) -> None:
        vars(module).update(_router=None, _adapters={})

    def own_parameters(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, p in module._parameters.items() if p is not None)

    def restore(self, module: nn.Module) -> None:
        for name in ("_router", "_adapters"):
            vars(module).pop(name, None)

    def trial(self, module: Any, *inputs: Tensor) -> Tensor:
        # The gate's values, which `run` looks at, are there at patch() alone.
        assert self.form is not None
        x, index, weights = inputs
        return _call(module, self.form, x, index, weights, None, self._moe_mlp(module))

    def _moe_mlp(self, module: Any) -> Callable[..., Tensor]:
        call = moe_mlp if module._split is None else module._split
        return partial(call, recompute=True) if self.recompute else call

    def run(
        self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        router, routed = module._router, None
        if router is not None:
            routed, router._routed = router._routed, None
        call = self._moe_mlp(module)
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
