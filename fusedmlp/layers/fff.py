"""Fast feedforward networks: a binary tree of routers over experts, and one of weighted nodes.

FastFeedForward, of depth d, routes by the logits z = x router_n' + b_n of its nodes n, which lie in
breadth-first order; right is 1, and a leaf's index has the root's turn as its highest bit.

| mode | y |
|---|---|
| soft (training) | sum over leaves l of prob_l expert_l(x), prob_l the product of sigmoid(z), or 1 - it, along the path |
| hard (eval) | expert_l(x) of the leaf where right is taken iff z > 0 |

PathWeightedFFF, of depth d, has at every node a linear map; y sums act(|z_n|) (x w2s_n + b2s_n) over
the d + 1 nodes of x's path.

Source: Belcak and Wattenhofer, Fast Feedforward Networks, arXiv 2308.14711, and Charalampopoulos et
al., arXiv 2405.16836, for hardening, load balancing and the master leaf; constructors, parameter
names and ties (to the left) are mlp_utils'.
"""  # noqa: E501

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import choice
from ..backends.cpu import trees as cpu
from ..check import layer as check_layer
from ..ops.moe_linear import moe_linear
from ..ops.top1_route import route_to
from ..ops.tree_path import tree_path
from .feedforward import FeedForward
from .parts.around import bare
from .parts.block import positive_int
from .parts.experts import StackedExperts
from .parts.stacked import Stacked
from .parts.widths import Default, Reader

_CLAMP = 1e-6  # of probabilities in the hardening loss


class Routers(Stacked):
    """n Linear(dim, 1) as one: weight (n, dim), bias (n,). Of one they are `i.weight` (1, dim) and
    `i.bias` (1,)."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self._names = {"weight": "weight", "bias": "bias"}
        self.weight = nn.Parameter(torch.empty(num, dim))
        self.bias = nn.Parameter(torch.empty(num))
        self.reset_parameters()

    def __len__(self) -> int:
        return self.weight.shape[0]

    def __iter__(self) -> Iterator[nn.Linear]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> nn.Linear:
        """Router i over views: what is written there is written here, and what is differentiated
        there gets its gradient here. The module is made anew on each access."""
        i = range(len(self))[i]
        router = nn.Linear(self.weight.shape[1], 1, device="meta").train(self.training)
        for name, stack in self._stacks():
            with torch.enable_grad():  # or the view would be a leaf
                view = stack[i : i + 1]
            view.grad = None if stack.grad is None else stack.grad[i : i + 1]
            router._parameters[name] = view  # type: ignore[assignment]
        return router

    def _item_shape(self, stack: Tensor) -> torch.Size:
        return torch.Size((1, *stack.shape[1:]))

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _widen_mix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """mlp_utils' checkpoints have a scalar."""
    if (mix := state.get(f"{prefix}master_mix")) is not None and mix.dim() == 0:
        state[f"{prefix}master_mix"] = mix.unsqueeze(0)


class FastFeedForward(nn.Module):
    """A binary tree of 2^depth FeedForwards, the leaves, behind 2^depth - 1 routers.

    In eval y = expert_l(x) of the one leaf that a token reaches by going right where a router's
    logit is > 0. In soft training y = sum over leaves l of prob_l expert_l(x), where prob_l is the
    product of the routers' probabilities along the path.

    Args:
        dim: width of x and y. depth: of the tree, at least 1.
        expert_dim: width that the experts see, dim if None; if it differs, x is projected to it and
            back. The routers always see x.
        mult, dropout, activation, glu_variant, pre_norm, norm_layer: of each expert's FeedForward;
            and so hidden, multiple_of, recompute.
        bias: give experts, master leaf and projections biases; routers keep theirs.
        soft_routing_during_train: False trains one leaf a token, and no router.
        load_balancing_alpha: weight of alpha E sum_l f_l P_l, with f_l the fraction of tokens whose
            hard path ends in l and P_l the mean of prob_l.
        hardening_coef: weight of the nodes' mean entropy. Without it soft training leaves the tree
            soft, and eval computes something else.
        has_master_leaf, master_leaf_dim: a FeedForward of that hidden width beside the tree:
            y = k tree(x) + (1 - k) master(x), k = sigmoid of a learnt scalar that begins at 0.5.
        region_leak: probability with which a node's p is replaced by 1 - p in soft training.
        return_aux: forward returns (y, aux), the sum of the weighted losses, 0 outside soft
            training.

    Attributes: `num_experts`; `routers`, `experts` and `project_in`, `project_out`; `has_aux_loss`,
    whether forward returns a pair; `aux_loss`, aux of the last forward in soft training, to be
    added to the loss where forward returns y alone: None before it, without weights of losses, and
    in a copy or a pickle, which cannot hold a graph.

    Raises ValueError or TypeError for a bad argument, and in forward for an x of another width or
    dtype.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import FastFeedForward
        >>> tree = FastFeedForward(64, depth=2, hardening_coef=1.0, return_aux=True)  # 4 experts
        >>> y, aux = tree(torch.randn(2, 8, 64))
        >>> y.shape, aux.shape
        (torch.Size([2, 8, 64]), torch.Size([]))
    """

    aux_loss: Tensor | None

    def __init__(
        self,
        dim: int,
        depth: int,
        expert_dim: int | None = None,
        mult: float = Default(4),
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] | str = nn.GELU,
        glu_variant: str = "none",
        pre_norm: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.RMSNorm,
        soft_routing_during_train: bool = True,
        *,
        load_balancing_alpha: float = 0.0,
        hardening_coef: float = 0.0,
        has_master_leaf: bool = False,
        master_leaf_dim: int = 8,
        region_leak: float = 0.0,
        return_aux: bool = False,
        hidden: int | None = None,
        multiple_of: int | None = None,
        bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        positive_int("FastFeedForward", "dim", dim)
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"FastFeedForward: depth {depth!r}: Tree depth must be at least 1.")
        check_layer.coefficient("FastFeedForward", "load_balancing_alpha", load_balancing_alpha)
        check_layer.coefficient("FastFeedForward", "hardening_coef", hardening_coef)
        check_layer.fraction("FastFeedForward", "region_leak", region_leak)
        self.dim, self.depth, self.num_experts = dim, depth, 2**depth
        self.expert_dim = dim if expert_dim is None else expert_dim
        positive_int("FastFeedForward", "expert_dim", self.expert_dim)
        self.soft_routing_during_train = soft_routing_during_train
        self.load_balancing_alpha, self.hardening_coef = load_balancing_alpha, hardening_coef
        self.region_leak = region_leak
        self.has_aux_loss = return_aux
        self.aux_loss = None
        self.routers = Routers(2**depth - 1, dim)
        make = lambda: FeedForward(  # noqa: E731
            self.expert_dim, mult, dropout, activation, glu_variant, pre_norm, norm_layer,
            hidden=hidden, multiple_of=multiple_of, bias=bias, recompute=recompute,
        )  # fmt: skip
        self.experts = StackedExperts(self.num_experts, make)
        self.glu_variant = self.experts[0].glu_variant
        same = self.expert_dim == dim
        self.project_in = nn.Identity() if same else nn.Linear(dim, self.expert_dim, bias)
        self.project_out = nn.Identity() if same else nn.Linear(self.expert_dim, dim, bias)
        self.master: FeedForward | None = None
        if has_master_leaf:
            positive_int("FastFeedForward", "master_leaf_dim", master_leaf_dim)
            self.master = FeedForward(
                dim, activation=activation, glu_variant=self.glu_variant, hidden=master_leaf_dim,
                bias=bias, recompute=recompute,
            )  # fmt: skip
            # Not a scalar, which FSDP2 refuses.
            self.master_mix = nn.Parameter(torch.full((1,), 0.5))
            self.register_load_state_dict_pre_hook(_widen_mix)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        self.routers.reset_parameters()
        self.experts.init_weights_()
        for module in (self.project_in, self.project_out):
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        if self.master is not None:
            self.master.init_weights_()
            nn.init.constant_(self.master_mix, 0.5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., dim) -> y (..., dim), or with return_aux (y, aux)."""
        check_layer.check_x("FastFeedForward", x, self.dim, self.routers.weight.dtype)
        flat = x.reshape(-1, self.dim)
        aux = flat.new_zeros((), dtype=torch.float32)
        if self.training and self.soft_routing_during_train:
            y, aux = self._soft(flat, self.routers(flat))
            if self.hardening_coef or self.load_balancing_alpha:
                self.aux_loss = aux
        else:
            y = self._hard(flat)
        y = self.project_out(y)
        if self.master is not None:
            k = self.master_mix.sigmoid()
            y = (k * y + (1 - k) * self.master(flat)).to(y.dtype)
        y = y.view(x.shape)
        return (y, aux) if self.has_aux_loss else y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "aux_loss": None}

    def _leaves(self, logits: Tensor) -> Tensor:
        return tree_path(logits, depth=self.depth)[:, -1] - (self.num_experts - 1)

    def _hard(self, x: Tensor) -> Tensor:
        ones = x.new_ones(x.shape[0], dtype=torch.float32)
        own = self.routers
        if bare(own) and choice.for_cpu(x) and cpu.worth_a_walk(x, own.weight):
            leaves = cpu.walk(x, own.weight, own.bias, self.depth)[:, -1] - (self.num_experts - 1)
        else:
            leaves = self._leaves(own(x))
        routing = route_to(leaves, ones, self.num_experts)
        return cast(Tensor, self.experts(self.project_in(x), routing))

    def _soft(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        right = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        aux = self._aux(logits, right)
        if self.region_leak:
            right = torch.where(torch.rand_like(right) < self.region_leak, 1 - right, right)
        prob = self._leaf_probabilities(right).to(x.dtype)
        return cast(Tensor, self.experts(self.project_in(x), prob)), aux

    def _leaf_probabilities(self, right: Tensor) -> Tensor:
        """(T, leaves) from the nodes' probabilities of going right (T, nodes)."""
        prob = torch.ones_like(right[:, :1])
        for level in range(self.depth):
            nodes = right[:, 2**level - 1 : 2 ** (level + 1) - 1]
            prob = torch.stack([prob * (1 - nodes), prob * nodes], 2).flatten(1)
        return prob

    def _aux(self, logits: Tensor, right: Tensor) -> Tensor:
        """The weighted losses of soft training, float32; 0 without weights or tokens."""
        aux = right.new_zeros(())
        T = max(right.shape[0], 1)
        if self.hardening_coef:
            p = right.clamp(_CLAMP, 1 - _CLAMP)
            entropy = -(p * p.log() + (1 - p) * (1 - p).log())
            aux = aux + self.hardening_coef * entropy.sum() / (T * right.shape[1])
        if self.load_balancing_alpha:
            leaves = self._leaves(logits)
            taken = F.one_hot(leaves, self.num_experts).to(right.dtype).sum(0) / T
            mean = self._leaf_probabilities(right).sum(0) / T
            aux = aux + self.load_balancing_alpha * self.num_experts * (taken * mean).sum()
        return aux


class PathWeightedFFF(Reader):
    """y = sum over the nodes n of x's path of act(|z_n|) (x w2s_n + b2s_n), z_n = x w1s_n + b1s_n.

    The path begins at node 0 and goes from n to 2n + 2 where z_n > 0, else to 2n + 1. Forward and
    backward read each node's weights in place for the tokens that visit it.

    Args:
        input_width, output_width: of x and y. depth: the path has depth + 1 nodes; from 0 on.
        activation: a function of |z|.
        bias: False leaves out b1s and b2s, which are then None.

    Parameters: `w1s` (n, input_width), `b1s` (n,), `w2s` (n, input_width, output_width), `b2s`
    (n, output_width), n = 2^(depth + 1) - 1; the weights uniform within 1 / sqrt(input_width),
    biases 0. Raises ValueError for a bad argument, and in forward for an x that is not
    (N, input_width) or (B, S, input_width).

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import PathWeightedFFF
        >>> PathWeightedFFF(64, depth=2, output_width=32)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 32])
    """

    def __init__(
        self,
        input_width: int,
        depth: int,
        output_width: int,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        positive_int("PathWeightedFFF", "input_width", input_width)
        positive_int("PathWeightedFFF", "output_width", output_width)
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
            raise ValueError(f"PathWeightedFFF: depth {depth!r}: Tree depth must be non-negative.")
        self.input_width, self.depth, self.output_width = input_width, depth, output_width
        self.activation = activation
        self.n_nodes = 2 ** (depth + 1) - 1
        self.w1s = nn.Parameter(torch.empty(self.n_nodes, input_width))
        self.b1s = nn.Parameter(torch.empty(self.n_nodes)) if bias else None
        self.w2s = nn.Parameter(torch.empty(self.n_nodes, input_width, output_width))
        self.b2s = nn.Parameter(torch.empty(self.n_nodes, output_width)) if bias else None
        self.init_weights_()

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        bound = self.input_width**-0.5
        nn.init.uniform_(self.w1s, -bound, bound)
        nn.init.uniform_(self.w2s, -bound, bound)
        for b in (self.b1s, self.b2s):
            if b is not None:
                nn.init.zeros_(b)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, input_width) or (B, S, input_width) -> (..., output_width)."""
        if isinstance(x, Tensor) and (x.dim() not in (2, 3) or x.shape[-1] != self.input_width):
            raise ValueError(
                f"PathWeightedFFF: x must be (N, {self.input_width}) or (B, S, "
                f"{self.input_width}), got {tuple(x.shape)}"
            )
        check_layer.check_x("PathWeightedFFF", x, self.input_width, self.w1s.dtype)
        flat = x.reshape(-1, self.input_width)
        own = (self.w1s, self.b1s, self.w2s, self.b2s)
        if choice.for_cpu(flat) and not torch.is_autocast_enabled("cpu"):
            y = cpu.path_weighted(flat, *own, self.depth, self.activation)
            return y.view(*x.shape[:-1], self.output_width)
        logits = F.linear(flat, self.w1s, self.b1s)
        path = tree_path(logits, depth=self.depth)
        weights = self.activation(logits.gather(1, path).abs())
        ones = torch.ones_like(path[:, 0], dtype=torch.float32)
        # By level: over all nodes, each level would have a weight gradient of full size and the
        # tile of few tokens an expert.
        sizes = [2**level for level in range(self.depth + 1)]
        biases = [None] * len(sizes) if self.b2s is None else self.b2s.split(sizes)
        parts = zip(sizes, self.w2s.split(sizes), biases, strict=True)
        terms = []
        for level, (nodes, w, b) in enumerate(parts):
            routing = route_to(path[:, level] - (nodes - 1), ones, nodes)
            terms.append(weights[:, level : level + 1] * moe_linear(flat, routing, w.mT, b))
        y = functools.reduce(torch.add, terms)
        return y.view(*x.shape[:-1], self.output_width)

    def path(self) -> str:
        """For explain()."""
        return f"one tree_path, then {self.depth + 1} times route_to and moe_linear"

    def extra_repr(self) -> str:
        return self._noted()
