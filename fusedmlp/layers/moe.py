"""TopKMoE: a router, E experts with stacked weights, k of them a token, and an optional expert for
every token. Top1MoE is its k = 1, with the weights of Switch Transformer and of Llama 4.

| tensor | shape | |
|---|---|---|
| x, y | (..., dim) | |
| router.weight, router.bias | (E, dim), (E,) | logits z = x router' |
| w_gate, w_up | (E, hidden, dim) | expert e: (act(x w_gate[e]') * (x w_up[e]')) w_down[e]'; w_gate (E, 2 hidden, dim) packed, w_up None; plain: act(x w_gate[e]') w_down[e]' |
| w_down | (E, dim, hidden) | |
| b_gate, b_up, b_down | (E, hidden), (E, hidden), (E, dim) | or None; b_gate (E, 2 hidden) packed |
| correction | (E,) float32 | a buffer, or None: added to the scores for the choice |
| shared.* | | an MLP of width shared_hidden, added for every token |

y = sum over the k chosen experts e of weight_e expert_e(x), with the weights of
`fusedmlp.topk_route`. dtype: x has the parameters' floating dtype, which is kept.

| Top1MoE's score, scaled | y without the shared expert | as in |
|---|---|---|
| "softmax", "output" | softmax(z)_e expert_e(x), e = argmax z | Switch Transformer |
| "sigmoid", "input" | expert_e(sigmoid(z_e) x) | Llama 4 |

Sources: Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961; the shared expert and the
correction: DeepSeek-V3, arXiv 2412.19437.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import check
from ..check import layer as check_layer
from ..ops.moe_mlp import moe_mlp
from ..ops.top1_route import top1_route
from ..ops.topk_route import check_options, topk_route
from ..packing import Packed
from ..reference import Routing
from ..reference.moe import Compared, GroupScore, Score
from .parts.block import gated_block, plain_block, positive_int
from .parts.capacity import capacity_of
from .parts.widths import Reader

Top1Score = Literal["softmax", "sigmoid"]
Scaled = Literal["output", "input"]
EXPERTS = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


class TopKMoE(Reader):
    """y = sum of weight_e * expert_e(x) over the k experts that the router chooses (+ shared(x)).

    Args:
        dim, hidden: width of x, and of each expert.
        num_experts: E.
        k: experts a token, from 1 to E.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, with parameters where
            its row has some: "swiglu_oai(limit=5.0)".
        gated: False for plain experts: act(x w_gate') w_down'.
        packed: gate and up weights in one parameter w_gate, in this order of its rows: "gate_up",
            "up_gate" or "interleaved"; None for w_gate and w_up.
        bias: give the router and every expert biases.
        capacity_factor: an expert takes up to max(1, floor(T k / E * capacity_factor)) choices of T
            tokens, later ones add nothing; None, the default, drops none.
        shared_hidden: width of an expert that every token passes; None for none.
        shared_score: multiply that one's result by sigmoid(x shared.score'), as Qwen2-MoE does.
        score, norm, eps, least, scale, compared, groups, topk_group, group_score: how scores become
            choices and weights: `fusedmlp.topk_route`. docs/moe.md has those of models.
        correction: add the buffer `correction` (E,) to the scores for the choice: after a step
            `fusedmlp.update_router_bias(layer.correction, routing.counts)` evens the load without a
            loss. It stays float32 where the layer is cast to 16 bits, in which its steps vanish.
        recompute: save neither g nor u for backward, of the shared expert too: x alone.

    `layer(x, return_routing=True)` gives (y, routing), for `fusedmlp.load_balancing_loss` and
    `fusedmlp.router_z_loss`; routing.expert is (T, k). Parameters are uniform within
    1 / sqrt(their columns), biases within that of their weights, as nn.Linear's.
    Raises ValueError or TypeError for a bad argument, and in forward for an x of another width or
    dtype.

    Examples:
        >>> import torch
        >>> from fusedmlp import load_balancing_loss, router_z_loss
        >>> from fusedmlp.layers import TopKMoE
        >>> moe = TopKMoE(64, 128, num_experts=8, k=2, shared_hidden=128)
        >>> y, routing = moe(torch.randn(2, 8, 64), return_routing=True)
        >>> aux = 0.01 * load_balancing_loss(routing) + 0.001 * router_z_loss(routing)
        >>> (y.square().mean() + aux).backward()
        >>> moe.w_gate.grad.shape, routing.expert.shape
        (torch.Size([8, 128, 64]), torch.Size([16, 2]))
    """

    w_gate: nn.Parameter
    w_up: nn.Parameter | None
    w_down: nn.Parameter
    correction: Tensor | None
    _route = "topk_route"

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        k: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        packed: Packed | None = None,
        bias: bool = False,
        capacity_factor: float | None = None,
        shared_hidden: int | None = None,
        shared_score: bool = False,
        score: Score = "softmax",
        norm: bool = True,
        eps: float = 0.0,
        least: float = 0.0,
        scale: float = 1.0,
        compared: Compared = "score",
        groups: int | None = None,
        topk_group: int | None = None,
        group_score: GroupScore = "top2",
        correction: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        for name, value in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts)):
            positive_int(owner, name, value)
        check.activation(owner, activation, gated=gated)
        check_layer.capacity_factor(owner, capacity_factor)
        _check_packed(owner, packed, gated)
        # What topk_route takes beside logits, k, bias and capacity.
        self.router_options: Any = {
            "score": score, "norm": norm, "eps": eps, "least": least, "scale": scale,
            "compared": compared, "groups": groups, "topk_group": topk_group,
            "group_score": group_score,
        }  # fmt: skip
        check_options(owner, num_experts, k, **self.router_options)
        self.k, self.activation, self.gated, self.packed = k, activation, gated, packed
        self.capacity_factor, self.score, self.recompute = capacity_factor, score, recompute
        # moe_mlp, or what shard_experts puts in its place: the experts of every rank.
        self.parallel_mlp: Callable[..., Tensor] | None = None
        self.router = nn.Linear(dim, num_experts, bias=bias)
        first = 2 * hidden if packed else hidden
        up = hidden if gated and not packed else None
        self._stack("w_gate", num_experts, first, dim)
        self._stack("w_up", num_experts, up, dim)
        self._stack("w_down", num_experts, dim, hidden)
        self._stack("b_gate", num_experts, first if bias else None)
        self._stack("b_up", num_experts, up if bias else None)
        self._stack("b_down", num_experts, dim if bias else None)
        kept = torch.empty(num_experts, dtype=torch.float32) if correction else None
        self.register_buffer("correction", kept)
        self.shared = self._make_shared(dim, shared_hidden, bias, shared_score)
        self.init_weights_()

    def _stack(self, name: str, *shape: int | None) -> None:
        """A parameter of this shape; None where a size is."""
        w = None if None in shape else nn.Parameter(torch.empty(shape))  # type: ignore[arg-type]
        self.register_parameter(name, w)

    def _make_shared(
        self, dim: int, hidden: int | None, bias: bool, scored: bool
    ) -> nn.ModuleDict | None:
        owner = type(self).__name__
        if hidden is None:
            if scored:
                raise ValueError(
                    f"{owner}: shared_score must be False without a shared_hidden, got {scored!r}"
                )
            return None
        positive_int(owner, "shared_hidden", hidden)
        shared = nn.ModuleDict({"gate": nn.Linear(dim, hidden, bias=bias)})
        if self.gated:
            shared["up"] = nn.Linear(dim, hidden, bias=bias)
        shared["down"] = nn.Linear(hidden, dim, bias=bias)
        if scored:
            shared["score"] = nn.Linear(dim, 1, bias=False)
        return shared

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        for name in ("gate", "up", "down"):
            w, b = getattr(self, f"w_{name}"), getattr(self, f"b_{name}")
            for t in (w, b):
                if t is not None:
                    nn.init.uniform_(t, -(w.shape[-1] ** -0.5), w.shape[-1] ** -0.5)
        if self.correction is not None:
            nn.init.zeros_(self.correction)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKMoE:
        """For `.to()` and its like: all but `correction` takes 16 bits."""
        kept = self.correction
        super()._apply(fn, recurse)
        cast = self.correction
        if kept is not None and cast is not None and cast.dtype.itemsize < 4:
            self.correction = kept.to(cast.device)
        return self

    def route(self, x: Tensor) -> Routing:
        """The routing of x (T, dim)."""
        return topk_route(
            self.router(x), self.k, **self.router_options,
            bias=self.correction, capacity=self._capacity(x),
        )  # fmt: skip

    def _capacity(self, x: Tensor) -> int | None:
        return capacity_of(self.k * x.shape[0], self.w_gate.shape[0], self.capacity_factor)

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        """x (..., dim) -> y (..., dim), and with `return_routing` the routing of its tokens."""
        router = self.router
        check_layer.check_x(type(self).__name__, x, router.in_features, router.weight.dtype)
        flat = x.reshape(-1, x.shape[-1])
        routing = self.route(flat)
        y = self._experts(flat, routing)
        if self.shared is not None:
            y = y + self._shared(flat)
        y = y.view(x.shape)
        return (y, routing) if return_routing else y

    def _experts(self, x: Tensor, routing: Routing) -> Tensor:
        weights = (getattr(self, name) for name in EXPERTS)
        options: Any = {"activation": self.activation, "packed": self.packed}
        options["recompute"] = self.recompute
        return (self.parallel_mlp or moe_mlp)(x, routing, *weights, **options)

    def _shared(self, x: Tensor) -> Tensor:
        shared: Any = self.shared
        options: Any = {"activation": self.activation, "recompute": self.recompute}
        if self.gated:
            gate, up, down = (shared[name] for name in ("gate", "up", "down"))
            y = gated_block(self, x, gate, up, down, None, **options)
        else:
            y = plain_block(self, x, shared["gate"], shared["down"], None, **options)
        return shared["score"](x).sigmoid() * y if "score" in shared else y

    def path(self) -> str:
        """For explain()."""
        own = "one moe_mlp" + (" of each rank's experts" if self.parallel_mlp else "")
        block = "gated_mlp" if self.gated else "mlp"
        also = "" if self.shared is None else f", and one {block} for the shared expert"
        return f"{self._route}, {own}, {self.activation!r}{also}"

    def extra_repr(self) -> str:
        """The number of experts, of which k, and what computes them."""
        own = f"{self.k} of {self.w_gate.shape[0]} experts: {self.path()}"
        return self._noted(own, "recompute=True" if self.recompute else "")


class Top1MoE(TopKMoE):
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
        recompute: save neither g nor u for backward, of the shared expert too: x alone.

    A TopKMoE with k = 1 and norm=False that routes by `fusedmlp.top1_route`, whose routing.expert
    is (T,). `layer(x, return_routing=True)` gives (y, routing), for `fusedmlp.load_balancing_loss`
    and `fusedmlp.router_z_loss`. Parameters are uniform within 1 / sqrt(their columns), as
    nn.Linear's. Raises ValueError or TypeError for a bad argument, and in forward for an x of
    another width or dtype.

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

    _route = "top1_route"

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str = "silu",
        capacity_factor: float | None = None,
        shared_hidden: int | None = None,
        score: Top1Score = "softmax",
        scaled: Scaled = "output",
        recompute: bool = False,
    ) -> None:
        owner = type(self).__name__
        if score not in get_args(Top1Score):
            raise ValueError(f"{owner}: score must be 'softmax' or 'sigmoid', got {score!r}")
        if scaled not in get_args(Scaled):
            raise ValueError(f"{owner}: scaled must be 'output' or 'input', got {scaled!r}")
        super().__init__(
            dim, hidden, num_experts, 1, activation=activation, capacity_factor=capacity_factor,
            shared_hidden=shared_hidden, score=score, norm=False, recompute=recompute,
        )  # fmt: skip
        self.scaled = scaled

    def route(self, x: Tensor) -> Routing:
        """The routing of x (T, dim)."""
        logits = self.router(x)
        routing = top1_route(logits, capacity=self._capacity(x))
        if self.score == "sigmoid":
            chosen = logits.gather(1, routing.expert.unsqueeze(1)).squeeze(1)
            wide = torch.promote_types(logits.dtype, torch.float32)
            routing = routing._replace(prob=chosen.to(wide).sigmoid().to(logits.dtype))
        return routing

    def _experts(self, x: Tensor, routing: Routing) -> Tensor:
        if self.scaled == "input":
            x = (x * routing.prob.unsqueeze(1)).to(x.dtype)
            routing = routing._replace(prob=torch.ones_like(routing.prob))
        return super()._experts(x, routing)


def _check_packed(owner: str, packed: Packed | None, gated: bool) -> None:
    check.order(owner, packed)
    if packed and not gated:
        raise ValueError(
            f"{owner}: packed must be None for plain experts, gated=False, got {packed!r}"
        )
