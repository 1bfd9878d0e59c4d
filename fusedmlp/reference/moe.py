"""Top-1 mixture of experts: routing, the experts' MLPs, and the router's losses.

T tokens, E experts. A token goes to one expert, or, past that expert's capacity, to none. Rows in
expert order: first expert 0's tokens in the order of tokens, then expert 1's, ..., and last the
dropped tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..packing import Packed
from ..transforms import transformed
from .dense import gated_mlp, mlp

__all__ = [
    "Routing",
    "load_balancing_loss",
    "moe_linear",
    "moe_mlp",
    "route_to",
    "router_z_loss",
    "top1_route",
    "tree_path",
]


class Routing(NamedTuple):
    """Which token goes to which expert; a tuple of tensors, hence a pytree.

    | field | shape | dtype | |
    |---|---|---|---|
    | expert | (T,) | int64 | the chosen expert, of a dropped token too |
    | prob | (T,) | floating | what the expert's result is multiplied by |
    | tokens | (T,) | int32 | row in expert order -> token |
    | rows | (T,) | int32 | token -> row in expert order |
    | offsets | (E + 2,) | int32 | expert e has rows offsets[e] .. offsets[e + 1]; dropped tokens have the rows offsets[E] .. offsets[E + 1] = T |
    | counts | (E,) | int32 | tokens that chose each expert, dropped ones included |
    | mean_prob | (E,) | float32 | mean router probability of each expert, or None |
    | log_sum_exp | (T,) | float32 | of the router's logits, or None |

    prob, mean_prob and log_sum_exp carry gradients to the logits.

    Examples:
        >>> import torch
        >>> from fusedmlp import top1_route
        >>> routing = top1_route(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0]]))
        >>> routing.num_experts, routing.tokens.tolist(), routing.offsets.tolist()
        (2, [1, 0, 2], [0, 1, 3, 3])
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
    def kept(self) -> Tensor:
        """(T,) bool: whether an expert takes the token."""
        return self.rows < self.offsets[-2]


def top1_route(logits: Tensor, capacity: int | None = None) -> Routing:
    """Each token to the expert of its largest logit, the lowest index at a tie."""
    T, E = logits.shape
    z = logits if logits.dtype == torch.float64 else logits.float()
    p = z.softmax(-1)
    expert = z.argmax(-1)
    prob = p.gather(1, expert.unsqueeze(1)).squeeze(1).to(logits.dtype)
    routing = route_to(expert, prob, E, capacity)
    return routing._replace(mean_prob=p.sum(0) / max(T, 1), log_sum_exp=z.logsumexp(-1))


def route_to(
    expert: Tensor, prob: Tensor, num_experts: int, capacity: int | None = None
) -> Routing:
    """Each token to a given expert; an index outside 0 .. E - 1 drops the token."""
    T, E = expert.shape[0], num_experts
    inside = (expert >= 0) & (expert < E)
    chosen, order = torch.where(inside, expert, E).sort(stable=True)
    starts = torch.searchsorted(chosen, torch.arange(E + 1, device=expert.device))
    counts = starts.diff()
    place = torch.arange(T, device=expert.device)
    if capacity is not None:
        # Dropped tokens move behind all others, in their own order.
        late = place - starts[chosen] >= capacity
        bucket = torch.empty_like(chosen).scatter_(0, order, torch.where(late, E, chosen))
        chosen, order = bucket.sort(stable=True)
    last = torch.arange(E + 2, device=expert.device)
    offsets = torch.searchsorted(chosen, last)
    rows = torch.empty_like(order).scatter_(0, order, place)
    as_int = lambda t: t.to(torch.int32)  # noqa: E731
    return Routing(expert, prob, as_int(order), as_int(rows), as_int(offsets), as_int(counts))


def load_balancing_loss(routing: Routing, kept_only: bool = False) -> Tensor:
    """E sum_e f_e P_e: f_e the fraction of tokens that chose e, P_e its mean probability."""
    assert routing.mean_prob is not None
    T, E = routing.expert.shape[0], routing.num_experts
    counts = routing.offsets[: E + 1].diff() if kept_only else routing.counts
    return E / max(T, 1) * (counts * routing.mean_prob).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """mean over tokens of log(sum_e exp(logit_e))^2."""
    assert routing.log_sum_exp is not None
    return routing.log_sum_exp.square().sum() / max(routing.expert.shape[0], 1)


def _has_values(t: Tensor) -> bool:
    """Whether the host can read `t`: not on meta, and not in a FakeTensorMode."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def by_expert(x: Tensor, routing: Routing, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Row t is run(x[t], its expert), and 0 where the token is dropped."""
    E = routing.num_experts
    if torch.compiler.is_compiling() or transformed() or not _has_values(routing.offsets):
        # Sizes that depend on the routing are not known, or cannot be batched by vmap: every expert
        # sees every row.
        bucket = torch.where(routing.kept, routing.expert, E).unsqueeze(1)
        chosen = lambda e: torch.where(bucket == e, x, 0)  # noqa: E731
        y = torch.where(bucket == 0, run(chosen(0), 0), 0)
        for e in range(1, E):
            y = torch.where(bucket == e, run(chosen(e), e), y)
        return y
    ends = routing.offsets.tolist()
    # Expert 0 always, so that without tokens too gradients are 0, not missing.
    busy = [e for e in range(E) if ends[e] < ends[e + 1] or e == 0]
    parts = [run(x[routing.tokens[ends[e] : ends[e + 1]]], e) for e in busy]
    # In what `run` returns, which under autocast may not be x's dtype.
    dropped = parts[0].new_zeros(x.shape[0] - ends[E], parts[0].shape[1])
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
) -> Tensor:
    """prob * the MLP of each token's expert: gated_mlp, or mlp where there is no up weight."""
    own = [None if t is None else t.unbind() for t in (w_gate, w_up, w_down, b_gate, b_up, b_down)]

    def run(rows: Tensor, e: int) -> Tensor:
        gate, up, down, bg, bu, bd = (None if t is None else t[e] for t in own)
        assert gate is not None and down is not None
        if up is None and packed is None:
            return mlp(rows, gate, down, bg, bd, activation)
        return gated_mlp(rows, gate, up, down, bg, bu, bd, activation, packed)

    y = by_expert(x, routing, run)
    # Not prob * y alone: a NaN probability must leave a dropped token's row 0.
    scaled = (routing.prob.unsqueeze(1) * y).to(x.dtype)
    return torch.where(routing.kept.unsqueeze(1), scaled, 0)


def moe_linear(x: Tensor, routing: Routing, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w[e]' + b[e] with each token's own expert e; `prob` is not used."""
    ws, bs = w.unbind(), None if b is None else b.unbind()
    run = lambda rows, e: F.linear(rows, ws[e], None if bs is None else bs[e])  # noqa: E731
    return by_expert(x, routing, run)


def tree_path(logits: Tensor, depth: int) -> Tensor:
    """(T, depth + 1): the nodes from the root down, right (2n + 2) where the logit is above 0."""
    nodes = [torch.zeros(logits.shape[0], 1, dtype=torch.int64, device=logits.device)]
    for _ in range(depth):
        right = logits.gather(1, nodes[-1]) > 0
        nodes.append(2 * nodes[-1] + torch.where(right, 2, 1))
    return torch.cat(nodes, 1)
