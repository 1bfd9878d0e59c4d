"""What HyperGLU refuses: argument, what was expected, what was got."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choice
from ..check import autocast_dtype
from ..check.layer import check_x
from .cache import HyperGLUCache, shapes_of
from .config import HyperGLUConfig


def working_dtype(x: Tensor) -> torch.dtype:
    """What projections of x come out in: autocast leaves float64 alone."""
    if x.dtype is torch.float64:
        return x.dtype
    return autocast_dtype("HyperGLU", x) or x.dtype


def check_prompt(
    config: HyperGLUConfig, dtype: torch.dtype, x: Tensor, attention_mask: Tensor | None
) -> None:
    """x (B, T, D), T <= L, in the parameters' dtype or under autocast; attention_mask (B, T)."""
    check_x("HyperGLU", x, config.n_embd, dtype)
    if x.dim() != 3:
        raise ValueError(f"HyperGLU: x must be (B, T, {config.n_embd}), got {tuple(x.shape)}")
    if x.shape[1] > config.block_size:
        raise ValueError(
            f"HyperGLU: T must be at most block_size = {config.block_size}, got {x.shape[1]}"
        )
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        got = type(attention_mask).__name__
        raise TypeError(f"HyperGLU: attention_mask must be a tensor or None, got {got}")
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"HyperGLU: attention_mask must be {tuple(x.shape[:2])}, "
            f"got {tuple(attention_mask.shape)}"
        )
    _on("attention_mask", attention_mask, x)


def check_token(
    config: HyperGLUConfig, dtype: torch.dtype, x: Tensor, cache: HyperGLUCache
) -> None:
    """x (B, D) or (B, 1, D), and a cache that this configuration made for B sequences."""
    D = config.n_embd
    check_x("HyperGLU", x, D, dtype)
    if not isinstance(cache, HyperGLUCache):
        raise TypeError(f"HyperGLU: cache must be a HyperGLUCache, got {type(cache).__name__}")
    B = cache.k.shape[0]
    for name, shape in shapes_of(config, B).items():
        t = getattr(cache, name)
        if t.shape != shape:
            raise ValueError(
                f"HyperGLU: cache.{name} must have shape {shape}, as this layer's init_cache makes "
                f"it, got {tuple(t.shape)}"
            )
        _on(f"cache.{name}", t, x)
    wanted = working_dtype(x)
    for t in (cache.x, cache.k, cache.v):
        if t.dtype is not wanted:
            raise TypeError(
                f"HyperGLU: cache must hold {wanted}, as the projections come out here, got "
                f"{t.dtype}; see init_cache(dtype=...)"
            )
    if x.shape not in ((B, D), (B, 1, D)):
        raise ValueError(
            f"HyperGLU: x must be ({B}, {D}) or ({B}, 1, {D}) for this cache, got {tuple(x.shape)}"
        )


def _on(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"HyperGLU: {name} must be on x's device {x.device}, got {t.device}")


def where(like: Tensor) -> str:
    return f"on {like.device.type} tensors with backend {choice.chosen()!r}"


def no_kernel(like: Tensor) -> str:
    """The message of "fused" where hyper_attention would run its reference, T x T in memory."""
    return (
        "HyperGLU: impl_default, or impl, must not be 'fused' where no kernel runs: "
        f"{where(like)}; 'chunked' runs in PyTorch there"
    )
