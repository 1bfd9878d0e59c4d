"""Each token to expert r = argmax(logits), with p = softmax(logits)[r]; tokens grouped by expert.

| tensor | shape | dtype | |
|---|---|---|---|
| logits | (..., E) | floating | flattened to (T, E) |
| expert | (...,) | int64 | given, in route_to |
| Routing | | | fields in `fusedmlp.Routing` |

The softmax is float32 (float64 for float64 logits); prob has the dtype of the logits. A tie goes to
the lowest index. With a capacity c, an expert takes the first c of its tokens in their order; the
others are dropped. NaN logits make that token's prob NaN and send it to the first of them; -inf
keeps an expert from being chosen. Where a token's largest logit is inf, or -inf, prob is NaN, and
log_sum_exp that logit in the reference and NaN in the kernels. Two launches, no sort, no
synchronisation with the host.

Saved for backward: logits and expert. With q the gradient of the probabilities
(of the chosen one and of their mean): dlogits = p (q - sum p q) + dlog_sum_exp p.

Source: Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961; the z-loss is that of Zoph et
al., ST-MoE, arXiv 2202.08906.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.cpu import routing as cpu
from ..backends.cpu.eager import readable
from ..backends.cuda import route as cuda_route
from ..backends.derivatives import differentiable, save
from ..backends.flops import no_products
from ..backends.op import TRITON_DTYPES, Cuda, Op, kernel, register
from ..check.experts import check_kind
from ..kernels.launches import moe as launches
from ..kernels.moe import top1_route as _triton
from ..packing import rows
from ..reference import Routing

OP = "top1_route"
Groups = tuple[Tensor, Tensor, Tensor, Tensor]


def _fwd_fake(logits: Tensor, capacity: int | None) -> tuple[Tensor, ...]:
    T, E = logits.shape
    expert, prob, mean, lse = _triton.empty_choice(logits)
    return expert, prob, *_triton.empty_groups(logits, T, E), mean, lse


def _given_fake(expert: Tensor, num_experts: int, capacity: int | None) -> Groups:
    return _triton.empty_groups(expert, expert.shape[0], num_experts)


def _bwd_fake(
    logits: Tensor,
    expert: Tensor,
    dprob: Tensor | None,
    dmean: Tensor | None,
    dlse: Tensor | None,
) -> Tensor:
    return logits.new_empty(logits.shape)


# logits (T, E) -> expert, prob, tokens, rows, offsets, counts, mean_prob, log_sum_exp
fwd = library.define(
    "top1_route_fwd(Tensor logits, SymInt? capacity) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _triton.top1_route_fwd,
    _fwd_fake,
    flops=no_products,
    cuda=Cuda(cuda_route.top1_route_fwd, dtypes=TRITON_DTYPES),
    launches=(launches.ROUTE,),
)
# expert (T,) -> tokens, rows, offsets, counts
given = library.define(
    "route_to_fwd(Tensor expert, SymInt num_experts, SymInt? capacity) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _triton.route_to_fwd,
    _given_fake,
    flops=no_products,
    cuda=Cuda(cuda_route.route_to_fwd, dtypes=(torch.int64, *TRITON_DTYPES)),
    launches=(launches.GIVEN,),
)
bwd = library.define(
    "top1_route_bwd(Tensor logits, Tensor expert, Tensor? dprob, Tensor? dmean, Tensor? dlse) "
    "-> Tensor",
    _triton.top1_route_bwd,
    _bwd_fake,
    flops=no_products,
    launches=(launches.ROUTE_BWD,),
)


class Top1RouteFunction(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, capacity: int | None) -> tuple[Tensor, ...]:
        expert, prob, *groups, mean, lse = fwd(logits, capacity)
        save(ctx, (logits,), (capacity,), expert)
        ctx.set_materialize_grads(False)
        return expert, prob, *groups, mean, lse

    @staticmethod
    @differentiable(reference.top1_route)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        logits, expert = ctx.saved_tensors
        return bwd(logits, expert, grads[1], grads[6], grads[7]), None


def check_capacity(op: str, capacity: int | None) -> None:
    if capacity is None:
        return
    if not isinstance(capacity, int | torch.SymInt) or isinstance(capacity, bool):
        raise TypeError(f"{op}: capacity must be None or an int, got {capacity!r}")
    if capacity < 1:
        raise ValueError(f"{op}: capacity must be None or at least 1, got {capacity}")


def check_logits(op: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{op}: logits must be a Tensor, got {type(logits).__name__}")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{op}: logits must have a floating dtype, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits must be (..., E), E at least 1, got {tuple(logits.shape)}")


def top1_route(logits: Tensor, *, capacity: int | None = None) -> Routing:
    """Each token to the expert of its largest logit.

    Args:
        logits: (..., E), any strides; E at least 1.
        capacity: the most tokens that an expert takes, or None for no limit. Later tokens are
            dropped: moe_mlp gives them rows of 0.

    Returns a `Routing` over the flattened tokens; prob, mean_prob and log_sum_exp carry gradients.

    Raises ValueError (shape, capacity) or TypeError (dtype), naming the argument.

    logits have any floating dtype; the softmax is taken in float32. Source: Fedus, Zoph, Shazeer,
    Switch Transformers, arXiv 2101.03961.

    Examples:
        >>> import torch
        >>> from fusedmlp import top1_route
        >>> logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0]])  # 3 tokens, 2 experts
        >>> routing = top1_route(logits, capacity=1)
        >>> routing.expert.tolist(), routing.counts.tolist()
        ([1, 0, 1], [1, 2])
        >>> routing.kept.tolist()  # expert 1 was full when the third token came
        [True, True, False]
    """
    check_logits(OP, logits)
    check_capacity(OP, capacity)
    flat = rows(logits)
    if choice.for_cpu(flat) and readable(flat) and flat.shape[0] == 1:
        return cpu.top1_route_one(flat)
    if choice.pick(OP, logits, "logits") == "reference":
        return reference.top1_route(flat, capacity)
    if check.wants_grad(logits):
        return Routing(*Top1RouteFunction.apply(flat, capacity))
    return Routing(*fwd(flat, capacity))


def route_to(
    expert: Tensor, prob: Tensor, num_experts: int, *, capacity: int | None = None
) -> Routing:
    """Each token to an expert, or to k, that the caller chose, with factors of the caller's.

    Args:
        expert: (T,) or, k choices a token, (T, k) int64. A choice whose index is not in 0 ..
            num_experts - 1 is dropped, on every backend: checking it here would wait for the GPU.
        prob: as expert, floating, on its device; carries gradients through moe_mlp.
        num_experts: E, at least 1.
        capacity: as in top1_route.

    Returns a `Routing` without mean_prob and log_sum_exp.

    Raises ValueError (shape, device, num_experts, capacity) or TypeError (dtype), naming the
    argument.

    Examples:
        >>> import torch
        >>> from fusedmlp import route_to
        >>> routing = route_to(torch.tensor([2, 0, 2]), torch.ones(3), num_experts=4)
        >>> routing.counts.tolist()
        [1, 0, 2, 0]
        >>> routing.tokens.tolist()  # rows in the order of experts
        [1, 0, 2]
        >>> route_to(torch.tensor([[2, 0], [2, 1]]), torch.ones(2, 2), num_experts=4).k
        2
    """
    op = "route_to"
    for name, t in (("expert", expert), ("prob", prob)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if expert.dtype != torch.int64:
        raise TypeError(f"{op}: expert must be int64, got {expert.dtype}")
    if not prob.dtype.is_floating_point:
        raise TypeError(f"{op}: prob must have a floating dtype, got {prob.dtype}")
    if expert.dim() not in (1, 2) or not all(expert.shape[1:]):
        raise ValueError(
            f"{op}: expert must be (T,) or (T, k), k at least 1, got {tuple(expert.shape)}; "
            "flatten leading dimensions"
        )
    check.shape(op, "prob", prob, *expert.shape)
    if prob.device != expert.device:
        raise ValueError(f"{op}: prob must be on {expert.device}, as expert is, got {prob.device}")
    if not isinstance(num_experts, int | torch.SymInt) or isinstance(num_experts, bool):
        raise TypeError(f"{op}: num_experts must be an int, got {num_experts!r}")
    if num_experts < 1:
        raise ValueError(f"{op}: num_experts must be at least 1, got {num_experts}")
    check_capacity(op, capacity)
    if choice.pick(op, prob, "prob") == "reference":
        if choice.for_cpu(prob) and readable(expert) and expert.numel() <= cpu.FEW:
            return cpu.route_few(expert, prob, num_experts, capacity)
        return reference.route_to(expert, prob, num_experts, capacity)
    return Routing(expert, prob, *given(expert.reshape(-1), num_experts, capacity))


def load_balancing_loss(routing: Routing, *, kept_only: bool = False) -> Tensor:
    """E sum_e f_e P_e, at least about k and k when balanced: Switch Transformer's auxiliary loss.

    P_e is the mean router probability of expert e over all tokens; f_e is the fraction of tokens
    that chose e, of k experts each, before any was dropped, or with `kept_only` of those that e
    took. f carries no gradient. 0 for no tokens. Float32. Raises ValueError for a routing without
    mean_prob, TypeError for what is no Routing.

    Source: Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961.

    Examples:
        >>> import torch
        >>> from fusedmlp import load_balancing_loss, top1_route
        >>> even, all_to_one = 9 * torch.eye(4), 9 * torch.eye(4)[[0, 0, 0, 0]]
        >>> [round(load_balancing_loss(top1_route(z)).item(), 1) for z in (even, all_to_one)]
        [1.0, 4.0]
    """
    op = "load_balancing_loss"
    check_kind(op, routing)
    if routing.mean_prob is None:
        raise ValueError(f"{op}: routing must come from top1_route or topk_route, got no mean_prob")
    return reference.load_balancing_loss(routing, kept_only)


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of log(sum_e exp(logit_e))^2: keeps a router's logits small. Float32.

    0 for no tokens. Raises ValueError for a routing without log_sum_exp, TypeError for what is no
    Routing.

    Source: Zoph et al., ST-MoE, arXiv 2202.08906.

    Examples:
        >>> import torch
        >>> from fusedmlp import router_z_loss, top1_route
        >>> logits = torch.randn(6, 4)
        >>> loss = router_z_loss(top1_route(logits))
        >>> torch.allclose(loss, logits.logsumexp(-1).square().mean())
        True
    """
    check_kind("router_z_loss", routing)
    if routing.log_sum_exp is None:
        raise ValueError(
            "router_z_loss: routing must come from top1_route or topk_route, got no log_sum_exp"
        )
    return reference.router_z_loss(routing)


def jitter(x: Tensor, epsilon: float) -> Tensor:
    """x times a factor drawn uniformly from 1 - epsilon .. 1 + epsilon for each value: what Switch
    Transformer gives its router in training. Raises ValueError for an epsilon outside 0 .. 1,
    TypeError for what is no Tensor or no number.

    Examples:
        >>> import torch
        >>> from fusedmlp import jitter
        >>> noisy = jitter(torch.ones(1000), 0.01)
        >>> bool(noisy.min() >= 0.99 and noisy.max() <= 1.01)
        True
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"jitter: x must be a Tensor, got {type(x).__name__}")
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool):
        raise TypeError(f"jitter: epsilon must be a number, got {epsilon!r}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"jitter: epsilon must be in [0, 1], got {epsilon}")
    return x * torch.empty_like(x).uniform_(1 - epsilon, 1 + epsilon) if epsilon else x


register(
    Op(
        OP,
        top1_route,
        reference.top1_route,
        forward=(kernel(fwd),),
        backward=(kernel(bwd),),
        flops=lambda shapes: 5 * math.prod(shapes["logits"]),
        counted=no_products,
    )
)
register(
    Op(
        "route_to",
        route_to,
        reference.route_to,
        forward=(kernel(given),),
        flops=no_products,
        within="moe_mlp",
    )
)
