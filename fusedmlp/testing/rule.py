"""The tolerance rule.

For every dtype, op and backend: with exact = the reference in float64 and eager = the reference in
the dtype under test,

    max |out - exact| <= 2 max |eager - exact| + eps(dtype) max |exact|,   and the same for the RMS.

A tensor under 64 elements gets 4 eps: eager's own worst error is then a matter of luck. NaN and Inf
never pass where exact is finite, and must stand where exact has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 64


@dataclass(frozen=True)
class Error:
    """Errors of `out` and of eager PyTorch against exact, and the bounds the rule gives."""

    max: float
    rms: float
    relative_l2: float
    eager_max: float
    eager_rms: float
    max_bound: float
    rms_bound: float
    worst: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.max <= self.max_bound and self.rms <= self.rms_bound


def _distance(a: Tensor, exact: Tensor) -> Tensor:
    """|a - exact| in float64; equal infinities and matching NaNs are at distance 0, others at
    inf."""
    a = a.detach().double().to(exact.device)
    same = (a == exact) | (a.isnan() & exact.isnan())
    distance = torch.where(same, 0.0, (a - exact).abs())
    return distance.nan_to_num(nan=torch.inf, posinf=torch.inf)


def error_of(out: Tensor, exact: Tensor, eager: Tensor) -> Error:
    """The tolerance rule; see the module. `exact` is float64, `eager` has the dtype under test."""
    if out.shape != exact.shape:
        raise AssertionError(f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}")
    if out.dtype != eager.dtype:
        raise AssertionError(f"dtype {out.dtype}, expected {eager.dtype}")
    if out.numel() == 0:
        return Error(0, 0, 0, 0, 0, 0, 0, ())
    exact = exact.detach()
    ours, eagers = _distance(out, exact), _distance(eager, exact)
    # Where eager overflows the dtype, so may the kernel; its error says nothing there.
    eagers = torch.where(eagers.isinf(), 0.0, eagers)
    finite = torch.where(exact.isfinite(), exact, 0.0)
    fits = finite.abs().clamp(max=torch.finfo(out.dtype).max)
    ulp = torch.finfo(out.dtype).eps * (4 if out.numel() < TINY else 1)
    rms = lambda t: t.square().mean().sqrt().item()  # noqa: E731
    worst = int(ours.argmax())
    return Error(
        max=ours.max().item(),
        rms=rms(ours),
        relative_l2=rms(ours) / max(rms(finite), 1e-300),
        eager_max=eagers.max().item(),
        eager_rms=rms(eagers),
        max_bound=2 * eagers.max().item() + ulp * fits.max().item(),
        rms_bound=2 * rms(eagers) + ulp * rms(fits),
        worst=tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), out.shape)),
    )


def assert_close_to(out: Tensor, exact: Tensor, eager: Tensor, name: str = "out") -> None:
    """Raise AssertionError, naming the worst coordinate, unless `out` passes the tolerance rule."""
    e = error_of(out, exact, eager)
    if not e.passed:
        at = e.worst
        raise AssertionError(
            f"{name}: max error {e.max:.3e} (bound {e.max_bound:.3e}, eager {e.eager_max:.3e}), "
            f"rms {e.rms:.3e} (bound {e.rms_bound:.3e}, eager {e.eager_rms:.3e}); worst at {at}: "
            f"{out[at].item():.6e}, exact {exact[at].item():.6e}, eager {eager[at].item():.6e}"
        )
