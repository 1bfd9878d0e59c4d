"""How an op reaches PyTorch: one schema, one shape rule (its fake), its launchers.

Library.define/impl costs 1.8 us a call where torch.library.custom_op costs 6.3. Autograd is not
registered here: each ops/*.py wraps its ops in one autograd.Function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.device import INTERPRETED
from .choice import launcher

# The package's own name: as a kernel of the Hub it is loaded under another, more than once.
_NAMESPACE = __name__.partition(".")[0]
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")


def _on_its_device(impl: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current GPU, whatever GPU the tensors are on."""

    @functools.wraps(impl)
    def guarded(first: torch.Tensor, *args: Any) -> Any:
        if first.get_device() == torch.cuda.current_device():
            return impl(first, *args)
        with torch.cuda.device(first.device):
            return impl(first, *args)

    return guarded


def define(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """Register `fusedmlp::<schema>`; returns the callable overload.

    impl launches Triton; cuda, where there is one, the extension's kernel of that name.
    """
    name = schema.partition("(")[0]
    if cuda is not None:
        impl = launcher(name, impl, cuda)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _on_its_device(impl), "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(name, impl, "CPU")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default
