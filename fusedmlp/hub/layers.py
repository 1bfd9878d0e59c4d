"""Layers whose forward replaces that of a model's MLP: no constructor, no state, members of the
adopting class alone.

| layer | adopted by |
|---|---|
| FusedMLP | an MLP of one argument: LlamaMLP, GemmaMLP, Phi3MLP, GPT2MLP, CLIPMLP and their kin |
| Llama4TextMoe | the class of this name, with one expert a token |

FusedMLP runs gated_mlp or mlp with the activation that the module has, whatever the names of its
projections and the order of their halves; a projection that is adapted, quantised or hooked is
called. It raises ValueError for a module whose forward is another or whose activation has no
kernel. Shapes, dtypes and other errors: fusedmlp.gated_mlp, fusedmlp.mlp, fusedmlp.moe_mlp.

FusedSwiGLUMLP, FusedGeGLUMLP and FusedPackedSwiGLUMLP are older names of FusedMLP.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..patching.plan import Plan
from .adopted import find_plan


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(first(x))), as the adopting module has them."""

    has_backward: bool = True
    can_torch_compile: bool = True

    _hub_plan: Plan

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        find_plan(self)
        return self._hub_plan.run(self, x)


class Llama4TextMoe(nn.Module):
    """shared_expert(x) + the chosen expert of sigmoid(logit) x, and the router's logits."""

    has_backward: bool = True
    can_torch_compile: bool = True

    _hub_plan: Plan

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states (..., D) -> (T, D), (T, E), with T tokens."""
        find_plan(self)
        return self._hub_plan.run(self, hidden_states)


FusedSwiGLUMLP = FusedGeGLUMLP = FusedPackedSwiGLUMLP = FusedMLP
