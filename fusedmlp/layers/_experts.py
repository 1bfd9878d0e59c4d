"""E FeedForwards of one shape, their parameters stacked: one tensor (E, ...) for each name.

state_dict and load_state_dict speak of `i.<name>`, as a ModuleList of FeedForwards would, and
`experts[i]` is a FeedForward over views of expert i; forward neither stacks nor copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..ops.moe_mlp import moe_mlp
from ..reference import Routing
from ..reference.moe import by_expert
from ._activation import name_of
from ._block import passes_through
from .feedforward import FeedForward, drop_aliases
from .glu import GLUBase
from .masked_glu import MaskedGLU


class StackedExperts(nn.Module):
    """num FeedForwards, each made by `make()`; see the file.

    forward(x, routing) is moe_mlp in one fused call as long as nothing stands between an expert's
    two projections: no active dropout, no norm before, no masks, an activation with a kernel.
    Otherwise each expert runs on its own tokens in PyTorch, for which the host waits for the
    routing; under torch.compile every expert then runs on every token.
    """

    def __init__(self, num: int, make: Callable[[], FeedForward]) -> None:
        super().__init__()
        made = [make() for _ in range(num)]
        if next(made[0].buffers(), None) is not None:
            raise TypeError(
                "StackedExperts: an expert's activation or norm must have no buffers, which cannot "
                "be stacked; got one with"
            )
        self.num_experts = num
        # In a tuple, so that it is no submodule: it holds settings and structure, no parameters.
        self._template = (copy.deepcopy(made[0]).to("meta"),)
        self._names: dict[str, str] = {}
        for name, _ in made[0].named_parameters():
            own = name.replace(".", "_")
            self._names[own] = name
            stacked = torch.stack([e.get_parameter(name).detach() for e in made])
            self.register_parameter(own, nn.Parameter(stacked))
        self.register_state_dict_post_hook(_unstack)
        self.register_load_state_dict_pre_hook(_stack)

    def init_weights_(self) -> None:
        """Give every expert its initial values again, or at last on a module built on meta."""
        for i in range(self.num_experts):
            self[i].init_weights_()

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self) -> Iterator[FeedForward]:
        return (self[i] for i in range(self.num_experts))

    def __getitem__(self, i: int) -> FeedForward:
        """Expert i over views: what is written there is written here. Its parameters' `grad` are
        those of now; the module is made anew on each access."""
        i = range(self.num_experts)[i]
        expert = copy.deepcopy(self._template[0]).train(self.training)
        for own, name in self._names.items():
            stacked = self.get_parameter(own)
            view = nn.Parameter(stacked.detach()[i], stacked.requires_grad)
            view.grad = None if stacked.grad is None else stacked.grad[i]
            owner, _, leaf = name.rpartition(".")
            expert.get_submodule(owner)._parameters[leaf] = view
        return expert

    def _parts(self) -> dict[str, Tensor | None]:
        """The arguments of moe_mlp that hold parameters."""
        own = {name: self.get_parameter(key) for key, name in self._names.items()}
        first, last = ("net.0.proj", "net.2") if self._gated else ("net.0", "net.3")
        return {
            "w_gate": own[f"{first}.weight"], "w_up": None, "w_down": own[f"{last}.weight"],
            "b_gate": own[f"{first}.bias"], "b_down": own[f"{last}.bias"],
        }  # fmt: skip

    @property
    def _gated(self) -> bool:
        return self._template[0].glu_variant != "none"

    def _fused_activation(self) -> str | None:
        """The kernel's name of the experts' activation if all of an expert can be fused."""
        template = self._template[0]
        if isinstance(template.net[0], MaskedGLU):
            return None
        act = cast(GLUBase, template.net[0]).activation if self._gated else template.net[1]
        dropout = template.net[1] if self._gated else template.net[2]
        idle = not self.training or passes_through(dropout)
        return name_of(cast(nn.Module, act)) if idle and template.pre_norm is None else None

    def path(self) -> str:
        """For explain(): whether the experts run as one call now."""
        activation = self._fused_activation()
        if activation is None:
            return f"{self.num_experts} experts one by one in PyTorch"
        return f"{self.num_experts} experts in one call, fused as {activation!r}"

    def slices(self) -> list[dict[str, Tensor]]:
        """Every expert's parameters by their names in FeedForward, as views with gradients."""
        parts = {name: self.get_parameter(own).unbind() for own, name in self._names.items()}
        return [{name: views[i] for name, views in parts.items()} for i in range(self.num_experts)]

    def one(self, own: dict[str, Tensor], x: Tensor) -> Tensor:
        """x through the expert whose parameters are `own`, one of `slices`."""
        self._template[0].train(self.training)
        return cast(Tensor, functional_call(self._template[0], own, (x,)))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """prob * expert(x), and 0 for dropped tokens. x (..., dim)."""
        activation = self._fused_activation()
        if activation is not None:
            packed: Any = "up_gate" if self._gated else None
            return moe_mlp(x, routing, **self._parts(), activation=activation, packed=packed)  # type: ignore[arg-type]
        flat, own = x.reshape(-1, x.shape[-1]), self.slices()
        y = by_expert(flat, routing, lambda rows, e: self.one(own[e], rows), x.shape[-1])
        scaled = (routing.prob.unsqueeze(1) * y).to(y.dtype)
        return torch.where(routing.kept.unsqueeze(1), scaled, 0).view(x.shape)


def _unstack(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    experts = cast(StackedExperts, module)
    for own, name in experts._names.items():
        for i, view in enumerate(state.pop(f"{prefix}{own}").unbind()):
            state[f"{prefix}{i}.{name}"] = view


def _stack(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keys of a missing expert stay as they are, and are reported as unexpected."""
    experts = cast(StackedExperts, module)
    for i in range(experts.num_experts):
        drop_aliases(experts._template[0], state, f"{prefix}{i}.")
    for own, name in experts._names.items():
        keys = [f"{prefix}{i}.{name}" for i in range(experts.num_experts)]
        if all(key in state for key in keys):
            state[f"{prefix}{own}"] = torch.stack([state.pop(key) for key in keys])
