"""transformers' table of experts implementations: "fusedmlp" in it is moe_mlp.

    model.set_experts_implementation("fusedmlp")

Each of a token's k experts is a row of its own there, so for k > 1 its x is repeated k times, as
the library's own implementations do; for k = 1 nothing is copied.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..layers.parts.activation import name_of
from ..ops.moe_mlp import moe_mlp
from ..ops.top1_route import route_to
from .activation import name_by_values

NAME = "fusedmlp"


# By class, the row with its parameters as the module has them and, of nn.GELU, its option; of a
# plain function, by itself.
_ACTIVATIONS: dict[Any, str | None] = {}


def _activation(experts: Any) -> str | None:
    act = getattr(experts, "act_fn", None)
    key = act
    if isinstance(act, nn.Module):
        key = (type(act), name_of(act), getattr(act, "approximate", None))
    if key not in _ACTIVATIONS:
        _ACTIVATIONS[key] = None if act is None else name_by_values(act)
    return _ACTIVATIONS[key]


def decorated(module: Any) -> bool:
    """Whether transformers' use_experts_implementation has been at its class, in any release."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def misfit(experts: Any) -> str | None:
    """Why `experts_forward` cannot run `experts`."""
    for name, wanted in (("is_concatenated", True), ("has_post_expert_norm", False)):
        if getattr(experts, name, wanted) is not wanted:
            return f"{name} of {type(experts).__name__} must be {wanted}, got {not wanted}"
    table = sys.modules["transformers.integrations.moe"]
    own_gate = experts.has_gate and type(experts)._apply_gate is not table._default_apply_gate
    if own_gate or _activation(experts) is None:
        act = type(getattr(experts, "act_fn", None)).__name__
        what = "a gate of its own" if own_gate else f"activation {act}"
        return (
            f"{type(experts).__name__} must multiply up by an activation of gate that has a "
            f"kernel, got {what}"
        )
    return None


def advice(experts: Any) -> str:
    """For the report: what to do with experts of transformers' table, or why nothing."""
    reason = misfit(experts)
    if reason is not None:
        return f"experts implementation {NAME!r} does not take it: {reason}"
    return f"experts by transformers' table: model.set_experts_implementation({NAME!r})"


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """sum_k weight[t, k] MLP_{index[t, k]}(x[t]), in transformers' experts interface.

    Args:
        experts: a module that transformers' `use_experts_implementation` decorates.
        hidden_states: (T, D). top_k_index, top_k_weights: (T, k); an index of E or more (an expert
            of another rank) adds nothing.

    Raises ValueError for experts that interleave gate and up, have a norm after each expert, or
    whose gate or activation has no kernel.
    """
    if (reason := misfit(experts)) is not None:
        raise ValueError(f"experts implementation {NAME!r}: {reason}")
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    w, w_down = getattr(experts, first), experts.down_proj
    b, b_down = (
        (getattr(experts, f"{first}_bias"), experts.down_proj_bias)
        if experts.has_bias
        else (None, None)
    )
    if experts.is_transposed:
        w, w_down = w.mT, w_down.mT
    T, k = top_k_index.shape
    x = hidden_states if k == 1 else hidden_states.repeat_interleave(k, 0)
    prob = top_k_weights.reshape(-1)
    routing = route_to(top_k_index.reshape(-1), prob, w.shape[0])
    y = moe_mlp(
        x, routing, w, None, w_down, b, None, b_down,
        activation=_activation(experts),  # type: ignore[arg-type]
        packed="gate_up" if experts.has_gate else None,
    )  # fmt: skip
    return y if k == 1 else y.view(T, k, -1).sum(1)


def register_experts() -> bool:
    """Enter "fusedmlp" in transformers' table of experts implementations, if that is loaded (any
    model of transformers loads it); whether it is there now.

    Importing fusedmlp calls it, and patch(); call it yourself where fusedmlp was imported before
    transformers and nothing is to be patched.
    """
    table = sys.modules.get("transformers.integrations.moe")
    functions = getattr(table, "ALL_EXPERTS_FUNCTIONS", None)
    if functions is None:
        return False
    if NAME not in functions:
        functions.register(NAME, experts_forward)
    return True
