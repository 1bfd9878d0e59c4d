"""How an op reaches PyTorch: one schema, one shape rule (its fake), one Triton launcher.

Library.define/impl costs 1.8 us a call where torch.library.custom_op costs 6.3. Autograd is not
registered here: each ops/*.py wraps its ops in one autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._backend import INTERPRETED

_LIBRARY = torch.library.Library("fusedmlp", "DEF")
_DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)


def define(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `fusedmlp::<schema>`; returns the callable overload."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in _DEVICES:
        _LIBRARY.impl(name, impl, device)
    torch.library.register_fake(f"fusedmlp::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fusedmlp, name).default
