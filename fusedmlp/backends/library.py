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

from ..kernels.device import INTERPRETED
from ..kernels.plans import planned
from . import driver
from .choice import launcher
from .op import KERNELS, MISSING, NAMESPACE, Kernel, add_kernel

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# kernel -> its Triton launcher, by launch plans.
BY_PLANS: dict[str, Callable[..., Any]] = {}


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
    """Register `fusedmlp::<schema>` with torch and enter its row; returns the callable overload.

    The arguments are the fields of `Kernel`.
    """
    row = Kernel(schema, triton, fake, **rest)
    add_kernel(row)
    by_plans = BY_PLANS[row.name] = planned(row.triton)
    impl = by_plans if row.cuda is None else launcher(row, by_plans)
    _LIBRARY.define(schema)
    _LIBRARY.impl(row.name, on_its_device(impl), "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(row.name, impl, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{row.name}", row.fake, lib=_LIBRARY)
    register_flop_formula(row.call.overloadpacket)(functools.partial(_count, row))
    return row.call


@functools.cache
def serve_cpu() -> None:
    """Let kernels take CPU tensors, for a stand-in for Triton's driver to run them. Which tensors
    come here is `choice.pick`'s to say."""
    if not INTERPRETED:  # the interpreter takes them already
        for row in KERNELS.values():
            _LIBRARY.impl(row.name, BY_PLANS[row.name], "CPU")


def _count(row: Kernel, *shapes: Any, out_shape: object = None) -> int:
    """What torch.utils.flop_counter asks of a formula."""
    return row.flops(*shapes)
