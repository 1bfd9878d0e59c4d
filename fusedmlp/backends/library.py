"""How an op reaches PyTorch: one schema, one shape rule (its fake), its launchers, its FLOPs.

Library.define/impl costs 1.8 us a call where torch.library.custom_op costs 6.3. Autograd is not
registered here: each ops/*.py wraps its ops in one autograd.Function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..invariance import STATE, batch_invariant
from ..kernels.device import INTERPRETED
from ..kernels.plans import planned
from . import driver
from .choice import launcher
from .op import KERNELS, MISSING, NAMESPACE, Kernel, add_kernel

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# kernel -> its Triton launcher, by launch plans.
BY_PLANS: dict[str, Callable[..., Any]] = {}
FOR_CPU: set[str] = set()  # ops without a row, which no kernel stands behind


def on_its_device(impl: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current GPU, whatever GPU the tensors are on, and makes TMA
    descriptors in the thread's context, whether there is one or not."""

    @functools.wraps(impl)
    def guarded(first: torch.Tensor, *args: Any) -> Any:
        device = first.get_device()
        if device == torch.cuda.current_device():
            driver.bind(device)
            return impl(first, *args)
        # A change of device binds its context.
        with torch.cuda.device(first.device):
            return impl(first, *args)

    return guarded


def define(
    schema: str,
    triton: Callable[..., Any] = MISSING,
    fake: Callable[..., Any] = MISSING,
    **rest: Any,
) -> Any:
    """Register `fusedmlp::<schema>` with torch and enter its row; returns what calls it.

    The arguments are the fields of `Kernel`. Compiled code cannot ask a thread for its mode when it
    runs: inside batch_invariant() it calls a second op, `<name>_invariant`, which is always in it.
    """
    row = Kernel(schema, triton, fake, **rest)
    add_kernel(row)
    BY_PLANS[row.name] = planned(row.triton)
    by_plans = _by_widths(row, BY_PLANS[row.name])
    impl = by_plans if row.cuda is None else launcher(row, by_plans)
    call = _enter(row, schema, impl)
    always = _enter(row, schema.replace("(", "_invariant(", 1), batch_invariant()(impl))

    @functools.wraps(call)
    def either(*args: Any) -> Any:
        if STATE.on and torch.compiler.is_compiling():
            return always(*args)
        return call(*args)

    either._schema = call._schema  # type: ignore[attr-defined]
    return either


def _enter(row: Kernel, schema: str, impl: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, on_its_device(impl), "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(name, impl, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", row.fake, lib=_LIBRARY)
    call = getattr(getattr(torch.ops, NAMESPACE), name)
    register_flop_formula(call)(functools.partial(_count, row))
    return call.default


def _by_widths(row: Kernel, impl: Callable[..., Any]) -> Callable[..., Any]:
    """Inside batch_invariant() the rows of the first argument lie one behind the other, from 16
    bytes on: a tile is chosen by that too. Products over all rows have one batch to agree with."""
    if row.result not in ("MH", "MD"):
        return impl

    @functools.wraps(impl)
    def launch(first: torch.Tensor, *args: Any) -> Any:
        if STATE.on and not _lies_by_width(first):
            first = first.new_empty(first.shape).copy_(first)
        return impl(first, *args)

    return launch


def _lies_by_width(t: torch.Tensor) -> bool:
    return t.is_contiguous() and t.stride(-2) == t.shape[-1] and t.data_ptr() % 16 == 0


def define_for_cpu(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register `fusedmlp::<schema>` for CPU tensors alone: what `auto` runs there in the place of a
    formula (backends/cpu), opaque to torch.compile; returns the callable overload.

    backward: of ctx, whose saved tensors are the arguments, and the result's gradient. It stays
    with the op, so that an exported program has gradients too."""
    name = schema.partition("(")[0]
    FOR_CPU.add(name)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, impl, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _one_by_one(name), lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=_keep_inputs, lib=_LIBRARY
        )
    call = getattr(getattr(torch.ops, NAMESPACE), name)
    register_flop_formula(call)(flops)
    return call.default


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _one_by_one(name: str) -> Callable[..., Any]:
    """The vmap of an op with one result: a batch of gradients is a loop over them."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[torch.Tensor, int]:
        call = getattr(getattr(torch.ops, NAMESPACE), name).default
        pick = lambda i: (  # noqa: E731
            a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)
        )
        return torch.stack([call(*pick(i)) for i in range(info.batch_size)]), 0

    return vmap


@functools.cache
def serve_cpu() -> None:
    """Let kernels take CPU tensors, for a stand-in for Triton's driver to run them. Which tensors
    come here is `choice.pick`'s to say."""
    if not INTERPRETED:  # the interpreter takes them already
        for row in KERNELS.values():
            _LIBRARY.impl(row.name, _by_widths(row, BY_PLANS[row.name]), "CPU")


def _count(row: Kernel, *shapes: Any, out_shape: object = None) -> int:
    """What torch.utils.flop_counter asks of a formula."""
    return row.flops(*shapes)
