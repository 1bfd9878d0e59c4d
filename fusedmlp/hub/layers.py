"""Layers whose forward replaces that of a model's MLP: no constructor, no state, members of the
adopting class alone.

| layer | members that it reads | computes |
|---|---|---|
| FusedSwiGLUMLP | gate_proj, up_proj, down_proj | down(silu(gate(x)) * up(x)): Llama, Qwen |
| FusedGeGLUMLP | the same | with tanh-gelu: Gemma |
| FusedPackedSwiGLUMLP | gate_up_proj, down_proj | gate and up in one projection: Phi-3 |

The projections are nn.Linears. Shapes, dtypes and errors: fusedmlp.gated_mlp. Which activation the
adopting class has, a layer cannot see: map a class to the layer that computes the same, or let
fusedmlp.patch(model) choose.
"""

from __future__ import annotations

from torch import Tensor, nn

from .._api import gated_mlp


class FusedSwiGLUMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    has_backward: bool = True
    can_torch_compile: bool = True

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return gated_mlp(x, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)


class FusedGeGLUMLP(nn.Module):
    """down_proj(gelu_tanh(gate_proj(x)) * up_proj(x))."""

    has_backward: bool = True
    can_torch_compile: bool = True

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return gated_mlp(
            x, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias,
            activation="gelu_tanh",
        )  # fmt: skip


class FusedPackedSwiGLUMLP(nn.Module):
    """down_proj(silu(g) * u) with [g, u] = gate_up_proj(hidden_states)."""

    has_backward: bool = True
    can_torch_compile: bool = True

    gate_up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., D) -> (..., D)."""
        both, down = self.gate_up_proj, self.down_proj
        return gated_mlp(
            hidden_states, both.weight, None, down.weight, both.bias, None, down.bias,
            packed="gate_up",
        )  # fmt: skip
