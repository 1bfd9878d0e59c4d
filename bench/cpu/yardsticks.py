"""What is measured beside ours, written for this purpose: mlp_utils' algorithms, a plain loop over
the experts in use, and the three ways in which transformers runs experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...hyperglu.chunked import by_source, laid_out
from ...layers import FastFeedForward, PathWeightedFFF

WAYS = ("eager", "grouped_mm", "batched_mm")


def experts_loop(x: Tensor, router: Tensor, experts: Sequence[Sequence[Tensor]]) -> Tensor:
    """A top-1 mixture of SwiGLU experts (gate, up, down), each a tensor of its own."""
    prob, chosen = F.linear(x, router).softmax(-1).max(-1)
    y = torch.zeros_like(x)
    for e in chosen.unique().tolist():
        own = (chosen == e).nonzero().squeeze(1)
        rows, (gate, up, down) = x.index_select(0, own), experts[e]
        made = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
        y = y.index_add(0, own, made * prob.index_select(0, own).unsqueeze(1))
    return y


def leaves_by_mask(tree: FastFeedForward, x: Tensor) -> Tensor:
    """FastFeedForward in eval: a router a level for all tokens, then every leaf asks who is its."""
    node = torch.zeros(x.shape[0], dtype=torch.int64)
    assert tree.routers.bias is not None
    for _ in range(tree.depth):
        weight, bias = tree.routers.weight[node], tree.routers.bias[node]
        node = 2 * node + 1 + ((x * weight).sum(-1) + bias > 0).long()
    leaf, y = node - (tree.num_experts - 1), torch.zeros_like(x)
    stacks = dict(tree.experts.named_parameters())
    w1, b1, w2, b2 = (stacks[f"net_{i}_{n}"] for i in (0, 3) for n in ("weight", "bias"))
    for e in range(tree.num_experts):
        mine = leaf == e
        if mine.any():
            y[mine] = F.linear(F.gelu(F.linear(x[mine], w1[e], b1[e])), w2[e], b2[e])
    return y


def path_by_gathers(tree: PathWeightedFFF, x: Tensor) -> Tensor:
    """PathWeightedFFF with a copy of its node's weights for each token."""
    node, y = torch.zeros(x.shape[0], dtype=torch.int64), torch.zeros(())
    assert tree.b1s is not None and tree.b2s is not None
    for _ in range(tree.depth + 1):
        z = (x * tree.w1s[node]).sum(-1) + tree.b1s[node]
        out = torch.bmm(x.unsqueeze(1), tree.w2s[node]).squeeze(1) + tree.b2s[node]
        y = y + tree.activation(z.abs()).unsqueeze(1) * out
        node = 2 * node + 1 + (z > 0).long()
    return y


def hyper_in_chunks(tensors: Sequence[Tensor], chunk: int, again: bool) -> Tensor:
    """The chunked path of HyperGLU's published code, "offset" and causal, of the first 11 arguments
    of hyper_attention: blocks of query rows, kept for backward, or `again` made there."""
    q, k, v, c1, u1, vt1, d1, c2, u2, vt2, d2 = tensors
    T, L = q.shape[-2], u1.shape[-2]

    def mixed(X: Tensor, c: Tensor, u: Tensor, vt: Tensor, d: Tensor, dead: Tensor) -> Tensor:
        end = X.shape[-1]
        h = torch.einsum("bhts,hsr->bhtr", X, u[:, L - end :])
        low = torch.einsum("bhtr,hrs->bhts", h * c, vt[..., L - end :])
        return (X + X * d[:, None, L - end :] + low).masked_fill(dead, 0)

    def block(start: int, end: int) -> Tensor:
        here = slice(start, end)
        S = torch.einsum("bhtd,bhsd->bhts", q[:, :, here], k[:, :, :end])
        lag = end - 1 - torch.arange(start, end).unsqueeze(1)
        dead = torch.arange(end) < lag
        P = mixed(laid_out(S, end), c1[:, :, here], u1, vt1, d1, dead)
        P1, P2 = P.chunk(2, 1)
        scale = 1 / P1.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        A = F.softplus(P2) * F.relu(P1)
        Y = mixed(A, c2[:, :, here], u2, vt2, d2, dead)
        return torch.einsum("bhts,bhsd->bhtd", by_source(Y, end), v[:, :, :end]) * scale

    run = functools.partial(checkpoint, block, use_reentrant=False) if again else block
    return torch.cat([run(i, min(i + chunk, T)) for i in range(0, T, chunk)], -2)


def transformers_experts(E: int, width: int, k: int) -> tuple[nn.Module, dict[str, Callable]]:
    """Qwen3-MoE's experts, and their forward (x, expert, prob) by each of WAYS."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=width, num_experts=E, num_experts_per_tok=k
    )
    experts = Qwen3MoeExperts(config)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=width**-0.5)

    def by(way: str) -> Callable[..., Tensor]:
        def run(x: Tensor, expert: Tensor, prob: Tensor) -> Tensor:
            config._experts_implementation = way
            return experts(x, expert, prob)

        return run

    return experts, {way: by(way) for way in WAYS}
