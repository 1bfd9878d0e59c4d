"""SwitchFFN: each token to the one of E FeedForwards that a router likes best.

| step | |
|---|---|
| p = softmax(x router.weight') | in float32 |
| e = argmax p, the lowest index at a tie | capacity = max(1, floor(N / E * capacity_factor)) |
| y = p_e expert_e(x) | x itself (or 0) for tokens past an expert's capacity, in their order |
| aux = loss_coef E sum_e f_e P_e | f_e: fraction of tokens that chose e; P_e: mean p of e |

| tensor | shape |
|---|---|
| x, y | (..., dim), N tokens in all |
| router.weight | (E, dim) |
| experts.* | (E, ...) of each tensor in FeedForward, `net_0_weight` of its `net.0.weight` |

dtype: x has the parameters' floating dtype, which is kept (under autocast: the autocast dtype); aux
is float32. Source: Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961; constructor and
parameter names are mlp_utils'.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..check import layer as check_layer
from ..ops.top1_route import jitter, load_balancing_loss, router_z_loss, top1_route
from .feedforward import FeedForward
from .parts.block import positive_int
from .parts.capacity import capacity_of
from .parts.experts import StackedExperts
from .parts.freezing import Freezing


class SwitchFFN(Freezing):
    """(y, aux): y = p_e expert_e(x) by the router's first choice, and the auxiliary loss.

    Args:
        dim: width of x and y.
        num_experts: E.
        capacity_factor: an expert takes up to max(1, floor(N / E * capacity_factor)) tokens; None
            for no limit.
        loss_coef: weight of the load-balancing loss in aux.
        ff_kwargs: further arguments of each expert's FeedForward.
        legacy_aux: count only tokens that an expert took in f, as mlp_utils does; then a router
            that sends all to one expert is hardly punished.
        dropped: what a token past the capacity becomes: "identity" (x, as mlp_utils has it; with a
            residual around the layer it counts twice) or "zero" (as in the paper).
        jitter: in training the router sees x times a factor from 1 - jitter .. 1 + jitter.
        z_loss_coef: weight of the router's z-loss in aux.

    Attributes: `router`, a Linear without bias; `experts`, indexed by expert. `has_aux_loss` is
    True: forward returns a pair, in eval too.

    Raises ValueError or TypeError for a bad argument, and in forward for an x of another width or
    dtype.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import SwitchFFN
        >>> switch = SwitchFFN(64, num_experts=4, ff_kwargs={"glu_variant": "swiglu"})
        >>> y, aux = switch(torch.randn(8, 64))
        >>> y.shape, aux.shape
        (torch.Size([8, 64]), torch.Size([]))
    """

    has_aux_loss = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity_factor: float | None = 1.25,
        loss_coef: float = 1e-2,
        ff_kwargs: dict[str, Any] | None = None,
        *,
        legacy_aux: bool = False,
        dropped: Literal["identity", "zero"] = "identity",
        jitter: float = 0.0,
        z_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        positive_int("SwitchFFN", "dim", dim)
        positive_int("SwitchFFN", "num_experts", num_experts)
        check_layer.capacity_factor("SwitchFFN", capacity_factor)
        check_layer.coefficient("SwitchFFN", "loss_coef", loss_coef)
        check_layer.coefficient("SwitchFFN", "z_loss_coef", z_loss_coef)
        check_layer.fraction("SwitchFFN", "jitter", jitter)
        if dropped not in ("identity", "zero"):
            raise ValueError(f"SwitchFFN: dropped must be 'identity' or 'zero', got {dropped!r}")
        self.num_experts = num_experts
        self.capacity_factor, self.loss_coef = capacity_factor, loss_coef
        self.legacy_aux, self.dropped = legacy_aux, dropped
        self.jitter, self.z_loss_coef = jitter, z_loss_coef
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = StackedExperts(num_experts, lambda: FeedForward(dim, **(ff_kwargs or {})))

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        self.router.reset_parameters()
        self.experts.init_weights_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., dim) -> y (..., dim) and aux, a float32 scalar."""
        check_layer.check_x("SwitchFFN", x, self.router.in_features, self.router.weight.dtype)
        flat = x.reshape(-1, x.shape[-1])
        seen = jitter(flat, self.jitter) if self.training else flat
        capacity = capacity_of(flat.shape[0], self.num_experts, self.capacity_factor)
        routing = top1_route(self.router(seen), capacity=capacity)
        y = self.experts(flat, routing)
        if self.dropped == "identity" and capacity is not None:
            y = torch.where(routing.kept.unsqueeze(1), y, flat.to(y.dtype))
        aux = self.loss_coef * load_balancing_loss(routing, kept_only=self.legacy_aux)
        if self.z_loss_coef:
            aux = aux + self.z_loss_coef * router_z_loss(routing)
        return y.view(x.shape), aux
