"""h = act(x w') in one pass, and its backward: the kernels of gated_linear.py without the up
branch."""

from __future__ import annotations

from torch import Tensor

from .gated_act import act_bwd, act_fwd
from .gated_linear import launch_bwd, launch_fwd


def linear_act_results(x: Tensor, w: Tensor, want_h: bool, want_z: bool) -> tuple[Tensor, Tensor]:
    """Memory for h and z (M, H), each with no rows if not wanted."""
    M, H = x.shape[0], w.shape[0]
    return x.new_empty((M if want_h else 0, H)), x.new_empty((M if want_z else 0, H))


def linear_act_grads(dy: Tensor, w_out: Tensor, want_h: bool) -> tuple[Tensor, Tensor]:
    """Memory for dz (M, H), and for h (M, or 0 if not wanted, H)."""
    M, H = dy.shape[0], w_out.shape[1]
    return dy.new_empty((M, H)), dy.new_empty((M if want_h else 0, H))


def linear_act_fwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    activation: str,
    want_h: bool,
    want_z: bool,
    t: Tensor | None = None,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, z = linear_act_results(x, w, want_h, want_z)
    launch_fwd(
        "linear_act_fwd", x, w, None, b, None,
        h if want_h else None, z if want_z else None, None, activation,
        (t, None, low, None),
    )  # fmt: skip
    return h, z


def linear_act_bwd(
    dy: Tensor,
    w_out: Tensor,
    z: Tensor,
    activation: str,
    want_h: bool,
    want_db: bool,
    t: Tensor | None = None,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dz, h = linear_act_grads(dy, w_out, want_h)
    rows = (z, dz, None, h if want_h else None)
    db = launch_bwd("linear_act_bwd", dy, w_out, *rows, want_db, activation, t, low)
    return dz, h, db


def linear_act_dz(dh: Tensor, z: Tensor, activation: str) -> Tensor:
    dz = dh.new_empty(z.shape)
    act_bwd(dh, z, None, dz, None, activation)
    return dz


def linear_act_h(z: Tensor, activation: str) -> Tensor:
    return act_fwd(z, None, activation)
