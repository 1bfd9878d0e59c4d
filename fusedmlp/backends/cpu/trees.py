"""Binary trees on the CPU: the path of a token, and the nodes on it.

A path needs `depth` of the 2^depth - 1 routers. The product of all is one fast call, so that
a walk, which multiplies a token by the routers that it meets, is faster only in large trees:

| tokens T | walk where | measured, one thread, width 256 |
|---|---|---|
| 1 | routers times width from 2^19 on | depth 11: 50 us, all routers 102 us; depth 6: 26 and 6 |
| more | 127 routers or more, and T times that from 2^22 on | T 256, depth 9: 0.34 ms, all 1.07 |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import tree_path
from ...reference.moe import route_to
from .eager import needs_grad, readable
from .traced import weighted_linear


def path_of_one(logits: Tensor, depth: int) -> list[int]:
    """`tree_path` of one token, (1, N)."""
    row, node, path = logits[0].tolist(), 0, [0]
    for _ in range(depth):
        node = 2 * node + (2 if row[node] > 0 else 1)
        path.append(node)
    return path


def worth_a_walk(x: Tensor, w: Tensor) -> bool:
    """Whether a walk of x (T, D) past routers w (N, D) is faster than the product of all."""
    (T, D), N = x.shape, w.shape[0]
    if not readable(x) or torch.is_autocast_enabled("cpu"):
        return False
    return bool(N * D >= 1 << 19) if T == 1 else N >= 127 and T * N * D >= 1 << 22


def walk(x: Tensor, w: Tensor, b: Tensor | None, depth: int) -> Tensor:
    """The path (T, depth + 1) of x (T, D) past routers w (N, D), b (N,); no gradient."""
    x, w = x.detach(), w.detach()
    b = w.new_zeros(w.shape[0]) if b is None else b.detach()
    if x.shape[0] == 1:
        row, node, path = x[0], 0, [0]
        for _ in range(depth):
            logit = torch.dot(row, w.select(0, node)).item() + b.select(0, node).item()
            node = 2 * node + (2 if logit > 0 else 1)
            path.append(node)
        return torch.tensor([path], device="cpu")
    nodes = [torch.zeros(x.shape[0], dtype=torch.int64, device="cpu")]
    for _ in range(depth):
        logit = torch.linalg.vecdot(x, w.index_select(0, nodes[-1])) + b.index_select(0, nodes[-1])
        nodes.append(2 * nodes[-1] + 1 + (logit > 0))
    return torch.stack(nodes, 1)


def path_weighted(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    depth: int,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """sum over the nodes n of the path of act(|z_n|) (x w2[n] + b2[n]), z_n = x w1[n] + b1[n]:
    a routing to depth + 1 of the nodes. w2 (N, D, D_out)."""
    logits = F.linear(x, w1, b1)
    if readable(x) and x.shape[0] == 1 and not needs_grad(x, w1, b1, w2, b2):
        nodes = path_of_one(logits, depth)
        path = torch.tensor([nodes], device="cpu")
        weights = activation(logits.gather(1, path).abs())
        if b2 is None:
            y = x.new_zeros(1, w2.shape[2])
        else:
            y = weights @ b2.index_select(0, path[0])
        for node, weight in zip(nodes, weights[0].tolist(), strict=True):
            y.addmm_(x, w2.select(0, node), alpha=weight)
        return y
    path = tree_path(logits.detach(), depth)
    weights = activation(logits.gather(1, path).abs())
    return weighted_linear(x, route_to(path, weights, w1.shape[0]), w2.mT, b2)
