"""Argument errors, worded once: op, argument, what was expected, what was got.

These run on every call, so each tensor's attributes are read once: on a CPU they cost as much as a
small matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..packing import ORDERS, Packed
from ..reference.activations import ACTIVATIONS, computed_by, resolve


def shape(op: str, name: str, t: Tensor, *expected: int) -> None:
    if t.shape != expected:
        hint = transposed(name, t.shape, expected)
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(t.shape)}{hint}")


def transposed(name: str, got: Sequence[int], expected: Sequence[int]) -> str:
    """What to say of a weight, or a stack of them, that is right but for its last two sizes."""
    if len(got) < 2 or (*got[:-2], got[-1], got[-2]) != (*expected,):
        return ""
    return f"; {name} is (out, in), as nn.Linear's weight: is it transposed? Transpose it back"


def columns(op: str, name: str, t: Tensor, size: Sequence[int], letter: str, of: str) -> None:
    """`t` is (..., D) by `size` (..., H, D) of the weight `of`, in which D is called `letter`."""
    own = t.shape
    if not own or own[-1] != size[-1]:
        if own and own[-1] == size[-2]:
            turned = (*size[:-2], size[-1], size[-2])
            raise ValueError(
                f"{op}: {of} must have shape {turned} beside {name} of shape {tuple(own)}, got "
                f"{tuple(size)}{transposed(of, size, turned)}"
            )
        raise ValueError(
            f"{op}: {name} must be (..., {size[-1]}): {letter} of {of}; got {tuple(own)}"
        )


def matrix(op: str, name: str, t: Tensor, meaning: str) -> torch.Size:
    """The shape of `t`, which must be a matrix."""
    size = t.shape
    if len(size) != 2:
        raise ValueError(f"{op}: {name} must be a matrix {meaning}, got shape {tuple(size)}")
    return size


def down(op: str, w_name: str, w: Tensor, H: int, b_name: str, b: Tensor | None) -> None:
    """The down projection w (D_out, H) and its bias (D_out,)."""
    D_out, width = matrix(op, w_name, w, "(D_out, H)")
    if width != H:
        down_shape(op, w_name, w.shape, H)
    if b is not None:
        shape(op, b_name, b, D_out)


def down_shape(op: str, name: str, got: Sequence[int], H: int) -> NoReturn:
    """Raise for a down projection, or a stack of them, that has not H columns. With H rows it is
    transposed, and what it should be is that turned."""
    *experts, D_out, width = got
    expected = (*experts, width if D_out == H else D_out, H)
    hint = transposed(name, got, expected)
    raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(got)}{hint}")


def like_x(
    op: str,
    x: Tensor,
    required: tuple[str, ...] = (),
    *,
    called: str = "x",
    **others: Tensor | None,
) -> None:
    """Every tensor shares x's floating dtype and device; only the `required` cannot be None.
    `called` is what the op calls x."""
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: {called} must have a floating dtype, got {dtype}")
    for name, t in others.items():
        if t is None and name not in required:
            continue
        if not (isinstance(t, Tensor) and t.dtype is dtype and t.device == device):
            _raise_unlike_x(op, called, x, name, t)


def _raise_unlike_x(op: str, called: str, x: Tensor, name: str, t: object) -> NoReturn:
    if not isinstance(t, Tensor):
        remedy = "; give its weight" if isinstance(t, nn.Linear) else ""
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}{remedy}")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have {called}'s dtype {x.dtype}, got {t.dtype}")
    raise ValueError(f"{op}: {name} must be on {called}'s device {x.device}, got {t.device}")


_GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid"}


def _instead(name: object, gated: bool) -> str:
    """What to give in place of `name`, which is no row's."""
    known = _GATED.get(name.lower()) if gated and isinstance(name, str) else None
    if (known := known or computed_by(name)) is not None:
        return f": give its name, {known!r}"
    return (
        ". Any other runs in PyTorch as a module: fusedmlp.layers.FeedForward(dim, "
        "activation=YourModule)"
    )


def activation(op: str, name: str, *, gated: bool = True, called: str = "activation") -> None:
    """`name` is a row of the table, perhaps with parameters. Without an up projection (not `gated`)
    a gate, whose row has a factor of its own for it, is refused. `called` is what the op calls
    it."""
    row = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if row is not None and (gated or row.up is None):
        return
    if not isinstance(name, str) or name.partition("(")[0] not in ACTIVATIONS:
        names = (n for n, row in ACTIVATIONS.items() if gated or row.up is None)
        raise ValueError(
            f"{op}: {called} must be one of {', '.join(names)}; got {name!r}{_instead(name, gated)}"
        )
    try:
        row = resolve(name).row
    except ValueError as error:
        raise ValueError(f"{op}: {called} must be {error}; got {name!r}") from None
    if row.up is not None and not gated:
        raise ValueError(
            f"{op}: {called} must be a function of one tensor here, where there is no up "
            f"projection; got {name!r}, a gate: give w_up, or take another activation"
        )


_ORDERS = ", ".join(map(repr, ORDERS[:-1])) + f" or {ORDERS[-1]!r}"


def order(op: str, packed: Packed | None) -> None:
    if packed is not None and packed not in ORDERS:
        raise ValueError(f"{op}: packed must be None, {_ORDERS}, got {packed!r}")


def apart(op: str, packed: object, remedy: str) -> None:
    """An op whose gate and up share no tensor."""
    if packed is not None:
        raise ValueError(f"{op}: packed must be None, got {packed!r}; {remedy}")


def packed(op: str, first: str, second: str, is_packed: bool, named: Packed | None) -> None:
    """`second` is None exactly when `first` holds both halves and `packed` names their order."""
    order(op, named)
    if is_packed != (named is not None):
        raise ValueError(
            f"{op}: packed must be {_ORDERS} with {second}=None and both halves in "
            f"{first}, or None with {first} and {second} apart; got packed={named!r} and "
            f"{second}={'None' if is_packed else 'a tensor'}"
        )


def autocast_dtype(op: str, x: Tensor, name: str = "x") -> torch.dtype | None:
    """The dtype that autocast wants, or None outside autocast."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    # Not x.device.type: making that string costs a microsecond.
    device = "cuda" if x.is_cuda else "cpu"
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All floating tensors in autocast's dtype, but for float64 as autocast has it; autograd casts
    the gradients back."""
    return tuple(t.to(dtype) if _is_castable(t) else t for t in tensors)  # type: ignore[union-attr]


def _is_castable(t: object) -> bool:
    return isinstance(t, Tensor) and t.dtype.is_floating_point and t.dtype != torch.float64


def wants_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:  # any() of a generator costs more
            if t is not None and t.requires_grad:
                return True
    return False
