"""Errors of a block's adapters, worded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..reference.lora import Adapter, Lora
from . import cast as _cast

RANKS = range(1, 257)


def check(
    op: str, x: Tensor, given: Lora, sizes: Mapping[str, tuple[int, int]], *experts: int
) -> None:
    """`sizes`: (out, in) of each projection that the block has, by its adapter's name. experts: how
    many, where a and b are stacked."""
    if not isinstance(given, Lora):
        raise TypeError(
            f"{op}: lora must be None or a fusedmlp.Lora, got {type(given).__name__}; write "
            "lora=Lora(down=Adapter(a, b, scale))"
        )
    for name, adapter in zip(Lora._fields, given, strict=True):
        if adapter is None:
            continue
        if name not in sizes:
            raise ValueError(
                f"{op}: lora.{name} must be None, for this block has no {name} projection, got an "
                f"adapter; it has {' and '.join(sizes)}"
            )
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"{op}: lora.{name} must be None or a fusedmlp.Adapter, got "
                f"{type(adapter).__name__}; write Adapter(a, b, scale)"
            )
        _adapter(op, x, f"lora.{name}", adapter, sizes[name], experts)


def _adapter(
    op: str, x: Tensor, name: str, adapter: Adapter, size: tuple[int, int], experts: tuple[int, ...]
) -> None:
    a, b, scale = adapter
    for part, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"{op}: {name}.{part} must be a Tensor, got {type(t).__name__}; an "
                "adapter has both a and b"
            )
        if t.dtype != x.dtype:
            raise TypeError(
                f"{op}: {name}.{part} must have x's dtype {x.dtype}, got {t.dtype}; cast it by "
                f"{part}.to(x.dtype), or run the block under autocast"
            )
        if t.device != x.device:
            raise ValueError(
                f"{op}: {name}.{part} must be on x's device {x.device}, got {t.device}; move it "
                f"by {part}.to(x.device)"
            )
    if not isinstance(scale, (int, float)):
        raise TypeError(
            f"{op}: {name}.scale must be a number, got {type(scale).__name__}; multiply b by a "
            "scale that has a gradient"
        )
    rows, columns = size
    stacked = "".join(f"{n}, " for n in experts)
    rank = a.shape[-2] if a.dim() == 2 + len(experts) else None
    if rank is None or not RANKS[0] <= rank <= RANKS[-1] or a.shape != (*experts, rank, columns):
        raise ValueError(
            f"{op}: {name}.a must be ({stacked}r, {columns}) with r from {RANKS[0]} to "
            f"{RANKS[-1]}, got shape {tuple(a.shape)}; leave an adapter of rank 0 out, merge one "
            "of a larger rank"
        )
    if b.shape != (*experts, rows, rank):
        raise ValueError(
            f"{op}: {name}.b must be {(*experts, rows, rank)}, ({stacked}out, r) by {name}.a, got "
            f"shape {tuple(b.shape)}; y gains scale b (a x)"
        )


def cast(dtype: torch.dtype, given: Lora) -> Lora:
    """The adapters in autocast's dtype; what is no adapter stays for `check` to refuse."""
    if not isinstance(given, Lora):
        return given
    return Lora(
        *(
            Adapter(*_cast(dtype, t.a, t.b), t.scale) if isinstance(t, Adapter) else t  # type: ignore
            for t in given
        )
    )


def lora_of(tensors: Sequence[Tensor | None], scales: Sequence[float]) -> Lora:
    """What `tensors_of` was made of."""
    pairs = zip(tensors[::2], tensors[1::2], scales, strict=True)
    return Lora(*(None if a is None or b is None else Adapter(a, b, s) for a, b, s in pairs))


def scales_of(given: Lora) -> tuple[float, ...]:
    """Those that gate, up and down have; 1 where there is no adapter."""
    return tuple(1.0 if p is None else float(p.scale) for p in given)


def tensors_of(given: Lora | None) -> tuple[Tensor | None, ...]:
    """a and b of gate, up, down; none without adapters."""
    if given is None:
        return ()
    return tuple(t for pair in given for t in ((None, None) if pair is None else pair[:2]))
