"""Mixture of experts: routing, the experts' MLPs, and the router's losses.

T tokens, E experts, k choices a token. A choice goes to one expert, or, past that expert's
capacity, to none. Choice j of token t has the number t k + j. Rows in expert order: first expert
0's choices in the order of their numbers, then expert 1's, ..., and last the dropped ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import Packed
from ..transforms import transformed
from .dense import gated_mlp, mlp
from .lora import Lora, of_each
from .rows import linear
from .values import has_values

__all__ = [
    "Routing",
    "RoutingStats",
    "load_balancing_loss",
    "moe_linear",
    "moe_mlp",
    "route_to",
    "router_z_loss",
    "top1_route",
    "topk_route",
    "tree_path",
]

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Compared = Literal["score", "logits"]
GroupScore = Literal["top2", "max"]


class RoutingStats(NamedTuple):
    """What to log of a routing: tensors on its device, without gradients.

    | field | shape | |
    |---|---|---|
    | load | (E,) float32 | share of the T k choices that chose each expert; 1 / E when balanced |
    | dropped | () float32 | share of the T k choices that no expert takes |
    | entropy | () float32 | of the load, -sum_e p_e ln p_e with p = load / sum(load); ln E when balanced |

    Examples:
        >>> import torch
        >>> from fusedmlp import topk_route
        >>> topk_route(torch.eye(4), 2).stats().load.tolist()
        [0.5, 0.25, 0.125, 0.125]
    """  # noqa: E501

    load: Tensor
    dropped: Tensor
    entropy: Tensor


class Routing(NamedTuple):
    """Which token goes to which experts; a tuple of tensors, hence a pytree.

    | field | shape | dtype | |
    |---|---|---|---|
    | expert | (T,) or (T, k) | int64 | the chosen experts, dropped choices too |
    | prob | as expert | floating | what the expert's result is multiplied by |
    | tokens | (T k,) | int32 | row in expert order -> t k + j, choice j of token t; t where k = 1 |
    | rows | (T k,) | int32 | t k + j -> row in expert order |
    | offsets | (E + 2,) | int32 | expert e has rows offsets[e] .. offsets[e + 1]; dropped choices have the rows offsets[E] .. offsets[E + 1] = T k |
    | counts | (E,) | int32 | choices of each expert, dropped ones included |
    | mean_prob | (E,) | float32 | mean router probability of each expert, or None |
    | log_sum_exp | (T,) | float32 | of the router's logits, or None |

    prob, mean_prob and log_sum_exp carry gradients to the logits.

    Examples:
        >>> import torch
        >>> from fusedmlp import top1_route, topk_route
        >>> logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0]])
        >>> routing = top1_route(logits)
        >>> routing.num_experts, routing.k, routing.tokens.tolist(), routing.offsets.tolist()
        (2, 1, [1, 0, 2], [0, 1, 3, 3])
        >>> both = topk_route(logits, 2)  # row 0 is the second choice of token 0
        >>> both.k, both.tokens.tolist()
        (2, [1, 2, 5, 0, 3, 4])
    """  # noqa: E501

    expert: Tensor
    prob: Tensor
    tokens: Tensor
    rows: Tensor
    offsets: Tensor
    counts: Tensor
    mean_prob: Tensor | None = None
    log_sum_exp: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def k(self) -> int:
        """Choices of a token."""
        return self.expert.shape[1] if self.expert.dim() == 2 else 1

    @property
    def kept(self) -> Tensor:
        """As expert, bool: whether the expert takes it."""
        return (self.rows < self.offsets[-2]).view(self.expert.shape)

    def stats(self) -> RoutingStats:
        """Load of each expert, share of dropped choices and entropy of the load, for any k. Nothing
        waits for the GPU until a value is read.

        Examples:
            >>> import torch
            >>> from fusedmlp import top1_route
            >>> stats = top1_route(torch.eye(4)[[0, 0, 0, 1]], capacity=2).stats()
            >>> stats.load.tolist(), stats.dropped.item(), round(stats.entropy.item(), 3)
            ([0.75, 0.25, 0.0, 0.0], 0.25, 0.562)
        """
        choices = max(self.expert.numel(), 1)
        load = self.counts.float() / choices
        dropped = (self.offsets[-1] - self.offsets[-2]).float() / choices
        p = load / load.sum().clamp_min(1e-30)
        return RoutingStats(load, dropped, torch.special.entr(p).sum())


def top1_route(logits: Tensor, capacity: int | None = None) -> Routing:
    """Each token to the expert of its largest logit, the lowest index at a tie."""
    T, E = logits.shape
    z = logits if logits.dtype == torch.float64 else logits.float()
    p = z.softmax(-1)
    expert = z.argmax(-1)
    prob = p.gather(1, expert.unsqueeze(1)).squeeze(1).to(logits.dtype)
    routing = route_to(expert, prob, E, capacity)
    return routing._replace(mean_prob=p.sum(0) / max(T, 1), log_sum_exp=z.logsumexp(-1))


def _sqrtsoftplus(z: Tensor) -> Tensor:
    """Its slope at 0, where softplus has underflowed, is 0 and not NaN."""
    t = F.softplus(z)
    return torch.where(t > 0, torch.where(t > 0, t, 1).sqrt(), t)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}


def _sorted(t: Tensor) -> Tensor:
    """Places by falling value, NaN first, the lower one of equals first."""
    return t.sort(dim=-1, descending=True, stable=True).indices


def _best_groups(compared: Tensor, groups: int, taken: int, score: GroupScore) -> Tensor:
    """(T, E) int: 1 for the experts of the best groups."""
    parts = compared.unflatten(1, (groups, -1))
    if score == "max":
        best = parts.amax(-1)
    else:
        best = parts.gather(-1, _sorted(parts)[..., :2]).sum(-1)
    inside = torch.zeros_like(best, dtype=torch.int32).scatter(1, _sorted(best)[:, :taken], 1)
    return inside.repeat_interleave(compared.shape[1] // groups, 1)


def topk_route(
    logits: Tensor,
    k: int,
    score: Score = "softmax",
    norm: bool = True,
    eps: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
    capacity: int | None = None,
    bias: Tensor | None = None,
    compared: Compared = "score",
    groups: int | None = None,
    topk_group: int | None = None,
    group_score: GroupScore = "top2",
) -> Routing:
    """Each token to the k experts of its largest scores (plus bias), the lowest of equals first."""
    T, E = logits.shape
    z = logits if logits.dtype == torch.float64 else logits.float()
    s = SCORES[score](z)
    value = (s if compared == "score" else z).detach()
    if bias is not None:
        value = value + bias
    # Scores rise with logits, which tell apart what a score rounds to the same number.
    order = _sorted(z.detach() if bias is None else value)
    if groups is not None:
        assert topk_group is not None
        inside = _best_groups(value, groups, topk_group, group_score)
        order = order.gather(1, _sorted(inside.gather(1, order)))
    expert = order[:, :k]
    chosen = s.gather(1, expert)
    if norm:
        chosen = chosen / (chosen.sum(1, keepdim=True).clamp(min=least) + eps)
    p = s if score == "softmax" else s / s.sum(1, keepdim=True)
    routing = route_to(expert, (scale * chosen).to(logits.dtype), E, capacity)
    return routing._replace(mean_prob=p.sum(0) / max(T, 1), log_sum_exp=z.logsumexp(-1))


def route_to(
    expert: Tensor, prob: Tensor, num_experts: int, capacity: int | None = None
) -> Routing:
    """Each choice to a given expert; an index outside 0 .. E - 1 drops it."""
    chosen_by, E = expert.reshape(-1), num_experts
    inside = (chosen_by >= 0) & (chosen_by < E)
    chosen, order = torch.where(inside, chosen_by, E).sort(stable=True)
    experts = torch.arange(E + 2, device=expert.device)
    offsets = torch.searchsorted(chosen, experts, out_int32=True)
    counts = offsets[:-1].diff()
    if capacity is not None:
        # Dropped choices move behind all others, in their own order.
        place = torch.arange(chosen_by.shape[0], device=expert.device)
        late = place - offsets[chosen] >= capacity
        bucket = torch.empty_like(chosen).scatter_(0, order, torch.where(late, E, chosen))
        chosen, order = bucket.sort(stable=True)
        offsets = torch.searchsorted(chosen, experts, out_int32=True)
    tokens = order.to(torch.int32)
    place = torch.arange(chosen_by.shape[0], dtype=torch.int32, device=expert.device)
    rows = torch.empty_like(place).scatter_(0, order, place)
    return Routing(expert, prob, tokens, rows, offsets, counts)


def load_balancing_loss(routing: Routing, kept_only: bool = False) -> Tensor:
    """E sum_e f_e P_e: f_e the fraction of tokens that chose e, P_e its mean probability; k when
    balanced."""
    assert routing.mean_prob is not None
    T, E = routing.expert.shape[0], routing.num_experts
    counts = routing.offsets[: E + 1].diff() if kept_only else routing.counts
    return E / max(T, 1) * (counts * routing.mean_prob).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """mean over tokens of log(sum_e exp(logit_e))^2."""
    assert routing.log_sum_exp is not None
    return routing.log_sum_exp.square().sum() / max(routing.expert.shape[0], 1)


def by_expert(x: Tensor, routing: Routing, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Row t k + j is run(x[t], the expert of choice j), and 0 where that is dropped."""
    E, k = routing.num_experts, routing.k
    if torch.compiler.is_compiling() or transformed() or not has_values(routing.offsets):
        # Sizes that depend on the routing are not known, or cannot be batched by vmap: every expert
        # sees every row.
        bucket = torch.where(routing.kept, routing.expert, E).view(-1, k)
        mine = lambda e: bucket == e  # noqa: E731
        chosen = lambda e: torch.where(mine(e).any(1, keepdim=True), x, 0)  # noqa: E731
        made = run(chosen(0), 0).unsqueeze(1)
        y = torch.where(mine(0).unsqueeze(2), made, 0)
        for e in range(1, E):
            y = torch.where(mine(e).unsqueeze(2), run(chosen(e), e).unsqueeze(1), y)
        return y.flatten(0, 1)
    ends = routing.offsets.tolist()
    tokens = routing.tokens if k == 1 else routing.tokens // k
    # Expert 0 always, so that without tokens too gradients are 0, not missing.
    busy = [e for e in range(E) if ends[e] < ends[e + 1] or e == 0]
    parts = [run(x[tokens[ends[e] : ends[e + 1]]], e) for e in busy]
    # In what `run` returns, which under autocast may not be x's dtype.
    dropped = parts[0].new_zeros(x.shape[0] * k - ends[E], parts[0].shape[1])
    return torch.cat([*parts, dropped])[routing.rows]


def moe_mlp(
    x: Tensor,
    routing: Routing,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    packed: Packed | None = None,
    lora: Lora | None = None,
) -> Tensor:
    """The sum over a token's choices of prob * the expert's MLP: gated_mlp, or mlp where there is
    no up weight. Adapters are stacked, and that of a plain expert's first weight is `gate`."""
    own = [None if t is None else t.unbind() for t in (w_gate, w_up, w_down, b_gate, b_up, b_down)]
    adapters = None if lora is None else of_each(lora, len(w_gate))

    def run(rows: Tensor, e: int) -> Tensor:
        gate, up, down, bg, bu, bd = (None if t is None else t[e] for t in own)
        assert gate is not None and down is not None
        mine = None if adapters is None else adapters[e]
        if up is None and packed is None:
            mine = mine and Lora(up=mine.gate, down=mine.down)
            return mlp(rows, gate, down, bg, bd, activation, mine)
        return gated_mlp(rows, gate, up, down, bg, bu, bd, activation, packed, mine)

    return weighted(by_expert(x, routing, run), routing, x.dtype)


def weighted(y: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The sum over a token's choices of prob * y, of whose rows t k + j is that of choice j."""
    # Not prob * y alone: a NaN probability must leave a dropped choice's row 0.
    scaled = routing.prob.reshape(-1, 1) * y
    if routing.k == 1:
        return torch.where(routing.kept.view(-1, 1), scaled.to(dtype), 0)
    each = torch.where(routing.kept.view(-1, 1), scaled, 0).unflatten(0, routing.expert.shape)
    return each.sum(1).to(dtype)


def moe_linear(x: Tensor, routing: Routing, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w[e]' + b[e] with each token's own expert e; `prob` is not used."""
    ws, bs = w.unbind(), None if b is None else b.unbind()
    run = lambda rows, e: linear(rows, ws[e], None if bs is None else bs[e])  # noqa: E731
    return by_expert(x, routing, run)


def tree_path(logits: Tensor, depth: int) -> Tensor:
    """(T, depth + 1): the nodes from the root down, right (2n + 2) where the logit is above 0."""
    nodes = [torch.zeros(logits.shape[0], 1, dtype=torch.int64, device=logits.device)]
    for _ in range(depth):
        right = logits.gather(1, nodes[-1]) > 0
        nodes.append(2 * nodes[-1] + torch.where(right, 2, 1))
    return torch.cat(nodes, 1)
