"""Top1MoE: a router, E gated experts with stacked weights, and an optional expert for every token.

| tensor | shape | |
|---|---|---|
| x, y | (..., dim) | |
| router.weight | (E, dim) | logits z = x router' |
| w_gate, w_up | (E, hidden, dim) | expert e: (act(x w_gate[e]') * (x w_up[e]')) w_down[e]' |
| w_down | (E, dim, hidden) | |
| shared.* | | a gated MLP of width shared_hidden, added for every token |

| score, scaled | y without the shared expert | as in |
|---|---|---|
| "softmax", "output" | softmax(z)_e expert_e(x) | Switch Transformer |
| "sigmoid", "input" | expert_e(sigmoid(z_e) x) | Llama 4 |

e = argmax z. dtype: x has the parameters' floating dtype, which is kept. Source: Fedus, Zoph,
Shazeer, Switch Transformers, arXiv 2101.03961.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import check
from ..check import layer as check_layer
from ..ops.moe_mlp import moe_mlp
from ..ops.top1_route import top1_route
from ..reference import Routing
from .parts.block import gated_block, positive_int
from .parts.capacity import capacity_of

Score = Literal["softmax", "sigmoid"]
Scaled = Literal["output", "input"]


class Top1MoE(nn.Module):
    """y = score * expert_e(x) (+ shared(x)), e the router's first choice.

    Args:
        dim, hidden: width of x, and of each expert.
        num_experts: E.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md.
        capacity_factor: an expert takes up to max(1, floor(T / E * capacity_factor)) of T tokens,
            later ones get 0; None, the default, drops none.
        shared_hidden: width of an expert that every token passes; None for none.
        score, scaled: "softmax" with "output" is Switch Transformer's softmax(z)_e expert_e(x);
            "sigmoid" with "input" is Llama 4's expert_e(sigmoid(z_e) x). z are the router's logits.
        recompute: save neither g nor u for backward.

    `layer(x, return_routing=True)` gives (y, routing), for `fusedmlp.load_balancing_loss` and
    `fusedmlp.router_z_loss`. Parameters are uniform within 1 / sqrt(their columns), as nn.Linear's.
    Raises ValueError or TypeError for a bad argument, and in forward for an x of another width or
    dtype.

    Examples:
        >>> import torch
        >>> from fusedmlp import load_balancing_loss
        >>> from fusedmlp.layers import Top1MoE
        >>> moe = Top1MoE(64, 128, num_experts=4)
        >>> y, routing = moe(torch.randn(2, 8, 64), return_routing=True)
        >>> loss = y.square().mean() + 0.01 * load_balancing_loss(routing)
        >>> loss.backward()
        >>> moe.w_gate.grad.shape
        torch.Size([4, 128, 64])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str = "silu",
        capacity_factor: float | None = None,
        shared_hidden: int | None = None,
        score: Score = "softmax",
        scaled: Scaled = "output",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts)):
            positive_int("Top1MoE", name, value)
        check.activation("Top1MoE", activation)
        check_layer.capacity_factor("Top1MoE", capacity_factor)
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"Top1MoE: score must be 'softmax' or 'sigmoid', got {score!r}")
        if scaled not in ("output", "input"):
            raise ValueError(f"Top1MoE: scaled must be 'output' or 'input', got {scaled!r}")
        self.activation, self.capacity_factor = activation, capacity_factor
        self.score, self.scaled, self.recompute = score, scaled, recompute
        # moe_mlp, or what shard_experts puts in its place: the experts of every rank.
        self.parallel_mlp: Callable[..., Tensor] | None = None
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.w_gate = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.w_up = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.w_down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.shared: nn.ModuleDict | None = None
        if shared_hidden is not None:
            positive_int("Top1MoE", "shared_hidden", shared_hidden)
            self.shared = nn.ModuleDict({
                "gate": nn.Linear(dim, shared_hidden, bias=False),
                "up": nn.Linear(dim, shared_hidden, bias=False),
                "down": nn.Linear(shared_hidden, dim, bias=False),
            })  # fmt: skip
        self.init_weights_()

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        for w in (self.w_gate, self.w_up, self.w_down):
            nn.init.uniform_(w, -(w.shape[-1] ** -0.5), w.shape[-1] ** -0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def route(self, x: Tensor) -> Routing:
        """The routing of x (T, dim)."""
        capacity = capacity_of(x.shape[0], self.w_gate.shape[0], self.capacity_factor)
        logits = self.router(x)
        routing = top1_route(logits, capacity=capacity)
        if self.score == "sigmoid":
            chosen = logits.gather(1, routing.expert.unsqueeze(1)).squeeze(1)
            wide = torch.promote_types(logits.dtype, torch.float32)
            routing = routing._replace(prob=chosen.to(wide).sigmoid().to(logits.dtype))
        return routing

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        """x (..., dim) -> y (..., dim), and with `return_routing` the routing of its tokens."""
        check_layer.check_x("Top1MoE", x, self.router.in_features, self.router.weight.dtype)
        flat = x.reshape(-1, x.shape[-1])
        routing = self.route(flat)
        rows, used = flat, routing
        if self.scaled == "input":
            rows = (flat * routing.prob.unsqueeze(1)).to(flat.dtype)
            used = routing._replace(prob=torch.ones_like(routing.prob))
        y = self._run(rows, used)
        if self.shared is not None:
            gate, up, down = (self.shared[name] for name in ("gate", "up", "down"))
            y = y + gated_block(self, flat, gate, up, down, None, activation=self.activation)
        y = y.view(x.shape)
        return (y, routing) if return_routing else y

    def path(self) -> str:
        """For explain()."""
        own = "one moe_mlp" + (" of each rank's experts" if self.parallel_mlp else "")
        also = "" if self.shared is None else ", and one gated_mlp for the shared expert"
        return f"top1_route, {own}, {self.activation!r}{also}"

    def _run(self, x: Tensor, routing: Routing) -> Tensor:
        weights = (self.w_gate, self.w_up, self.w_down)
        options: Any = {"activation": self.activation, "recompute": self.recompute}
        return (self.parallel_mlp or moe_mlp)(x, routing, *weights, **options)
