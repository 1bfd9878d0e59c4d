"""Checkpoints with a name for each expert, as mlp_utils writes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .parts.stacked import Stacked


def per_expert_state_dict(module: nn.Module) -> dict[str, Any]:
    """`module.state_dict()` with the names of mlp_utils: `experts.3.net.0.weight` (H, D) and so on
    in the place of each stack `experts.net_0_weight` (E, H, D), and `routers.0.weight` (1, D) in
    that of `routers.weight`.

    Args:
        module: a `SwitchFFN`, a `FastFeedForward`, or any module that holds some.

    Returns a new dict; what was stacked is copied, all else is as in `state_dict`. load_state_dict
    of the same module takes it, or with strict=False any part of it. Raises TypeError for another
    type.

    Examples:
        >>> from fusedmlp.layers import SwitchFFN
        >>> from fusedmlp.layers.per_expert import per_expert_state_dict
        >>> switch = SwitchFFN(64, num_experts=2)
        >>> sorted(switch.state_dict())[0], sorted(per_expert_state_dict(switch))[0]
        ('experts.net_0_bias', 'experts.0.net.0.bias')
        >>> switch.load_state_dict(per_expert_state_dict(switch))
        <All keys matched successfully>
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"per_expert_state_dict: module must be an nn.Module, got {type(module).__name__}"
        )
    state = module.state_dict()
    for name, inner in module.named_modules(remove_duplicate=False):
        if isinstance(inner, Stacked):
            inner.unstack(state, f"{name}." if name else "")
    return state
