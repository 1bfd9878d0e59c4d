"""How autograd meets the kernels: what the autograd Functions of all ops share.

Kernels compute a result and its first derivatives. Everything beyond goes through the reference:

| asked for | where | runs |
|---|---|---|
| a result | inside a transform of torch.func or forward-mode AD | the reference (`choice.pick`) |
| a gradient | backward | the kernels |
| a gradient with create_graph=True, or under vmap | backward | the reference |

A Function's `forward` calls `save`, and its `backward` is decorated with `differentiable`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..invariance import STATE, batch_invariant
from ..transforms import batched, transformed

Grads = tuple[Tensor | None, ...]
Backward = Callable[..., Grads]


def save(
    ctx: Any, inputs: Sequence[Tensor | None], options: tuple[Any, ...], *made: Tensor | None
) -> None:
    """For backward: `inputs`, the Function's first arguments, then what was made of them.

    `options` follow the inputs in a call of the reference. An input may be None where backward
    needs it for a second derivative alone and it is dear.
    """
    ctx.save_for_backward(*inputs, *made)
    ctx.num_inputs, ctx.options, ctx.invariant = len(inputs), options, STATE.on


def differentiable(
    formula: Callable[..., Any], stand_in: Callable[..., Tensor] | None = None
) -> Callable[[Backward], Backward]:
    """Decorate a Function's `backward`, which launches kernels and has no derivative itself.

    formula: the op by the reference, from the saved inputs and options; it is differentiated where
    a graph of the backward is wanted. stand_in: from ctx and dy to what stands for a first input
    that was not saved, where the formula is linear in it; without one that raises RuntimeError.

    Backward runs in the mode of batch_invariant() that forward ran in, and with autocast off,
    whatever is on around it: what was saved has the dtype that forward computed in, so that there
    is nothing to cast.

    Traced by torch.compile, it is the kernels: compiled code refuses a second backward itself.
    """

    def decorate(kernels: Backward) -> Backward:
        @functools.wraps(kernels)
        def backward(ctx: Any, *grads: Tensor | None) -> Grads:
            if ctx.invariant != STATE.on:
                with batch_invariant(ctx.invariant):
                    return backward(ctx, *grads)
            run = kernels
            if torch.is_grad_enabled() or transformed() or batched(*grads):
                run = functools.partial(_by_formula, formula, stand_in)
            on_gpu = any(g is not None and g.is_cuda for g in grads)
            device = "cuda" if on_gpu else "cpu"
            if not torch.is_autocast_enabled(device):
                return run(ctx, *grads)
            with torch.autocast(device, enabled=False):
                return run(ctx, *grads)

        return backward

    return decorate


def _by_formula(
    formula: Callable[..., Any],
    stand_in: Callable[..., Tensor] | None,
    ctx: Any,
    *grads: Tensor | None,
) -> Grads:
    needed, create_graph = ctx.needs_input_grad, torch.is_grad_enabled()
    if ctx.invariant:
        raise RuntimeError(
            f"{formula.__name__}: create_graph must be False for what ran in batch_invariant(), "
            "got True, or a transform of torch.func; such gradients are the formula's, which "
            "promises nothing: compute them outside of it"
        )
    with torch.enable_grad():
        inputs = list(ctx.saved_tensors[: ctx.num_inputs])
        if needed[0] and inputs[0] is None:
            if stand_in is None:
                raise RuntimeError(
                    f"{formula.__name__}: a second derivative needs x, which the kernels save only "
                    "where scales have a gradient or with recompute=True; use one of the two, or "
                    "backend('reference')"
                )
            inputs[0] = stand_in(ctx, *grads).requires_grad_()
        # Each argument by itself: two may be one tensor, or one a function of another.
        inputs = [t.view_as(t) if n else t for t, n in zip(inputs, needed, strict=False)]
        results = formula(*inputs, *ctx.options)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        wanted = [i for i in range(ctx.num_inputs) if needed[i]]
        found = torch.autograd.grad(
            [r for r, _ in pairs], [inputs[i] for i in wanted], [g for _, g in pairs],
            create_graph=create_graph,
        )  # fmt: skip
    made = dict(zip(wanted, found, strict=True))
    return tuple(made.get(i) for i in range(len(needed)))


def by_reference(formula: Callable[..., Any], *arguments: Any, recompute: bool = False) -> Any:
    """formula(*arguments); with `recompute` made again in backward, where torch can: inside
    torch.func it takes no checkpoints."""
    if recompute and not transformed():
        if not torch.compiler.is_compiling():
            formula = batch_invariant(STATE.on)(formula)
        return checkpoint(formula, *arguments, use_reentrant=False)
    return formula(*arguments)
