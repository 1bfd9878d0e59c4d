"""The nodes that each token visits in a binary tree: from node n to 2n + 2 where its logit of n is
above 0, else (at 0 and at NaN too) to 2n + 1.

| tensor | shape | dtype | |
|---|---|---|---|
| logits | (..., N) | floating | of nodes in breadth-first order, N at least 2^depth - 1 |
| path | (..., depth + 1) | int64 | path[..., 0] = 0, the root; path[..., depth] - (2^depth - 1) is the leaf, from the left |

No gradient. One launch, which finds the logits of all nodes made: a path needs depth of them, and
whoever makes them pays for 2^depth - 1 a token; backends/cpu/trees.py makes no others, where that is
faster. Source: Belcak and Wattenhofer, Fast Feedforward
Networks, arXiv 2308.14711.
"""  # noqa: E501

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import choice, library
from ..backends.cpu import trees as cpu
from ..backends.cpu.eager import readable
from ..backends.flops import no_products
from ..backends.op import Op, kernel, register
from ..kernels.launches import moe as launches
from ..kernels.moe import tree_path as _triton
from ..packing import rows

OP = "tree_path"


fwd = library.define(
    "tree_path_fwd(Tensor logits, int depth) -> Tensor",
    _triton.tree_path_fwd,
    _triton.empty_path,
    flops=no_products,
    launches=(launches.TREE,),
)


def tree_path(logits: Tensor, *, depth: int) -> Tensor:
    """The nodes visited from the root, right where a node's logit is above 0.

    Args:
        logits: (..., N), any strides, of nodes in breadth-first order; N at least 2^depth - 1.
        depth: how many steps to take, from 0 on.

    Returns path (..., depth + 1) int64, without gradient.

    Raises ValueError (shape, depth) or TypeError (dtype), naming the argument.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"{OP}: logits must be a Tensor, got {type(logits).__name__}")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{OP}: logits must have a floating dtype, got {logits.dtype}")
    if depth < 0:
        raise ValueError(f"{OP}: depth must be at least 0, got {depth}")
    if logits.dim() < 1 or logits.shape[-1] < 2**depth - 1:
        raise ValueError(
            f"{OP}: logits must be (..., N), N at least {2**depth - 1} for depth {depth}, got "
            f"{tuple(logits.shape)}"
        )
    flat = rows(logits.detach())
    if choice.pick(OP, logits, "logits") == "reference":
        if choice.for_cpu(flat) and readable(flat) and flat.shape[0] == 1:
            path = torch.tensor([cpu.path_of_one(flat, depth)], device="cpu")
        else:
            path = reference.tree_path(flat, depth)
    else:
        path = fwd(flat, depth)
    return path.view(*logits.shape[:-1], depth + 1)


register(
    Op(
        OP,
        tree_path,
        reference.tree_path,
        forward=(kernel(fwd),),
        flops=no_products,
        public=False,
    )
)
