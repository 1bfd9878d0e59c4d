"""The tolerance rule.

For every dtype, op and backend: with exact = the reference in float64, eager = the reference in the
dtype under test, and rounding = what rounding alone does to exact (rounding.py),

    max |out - exact| <= 2 max(max |eager - exact|, rounding) + eps(dtype) max |exact|,

and the same for the RMS. Eager's error is the yardstick of an honest computation. Rounding keeps it
from being 0 by luck: where terms cancel, or a tensor has few elements, eager's error differs from
processor to processor. Rounding is simulated only where eager's error does not suffice by itself,
which changes no verdict. A tensor under 64 elements gets 4 for the 2 and 4 eps: so few elements do
not show how far rounding goes. NaN and Inf never pass where exact is finite, and must stand where
exact has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 64

Rounding = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Error:
    """Errors of `out` and of eager PyTorch against exact, what rounding does to exact (0 where that
    was not needed), and the bounds the rule gives."""

    max: float
    rms: float
    relative_l2: float
    eager_max: float
    eager_rms: float
    rounding_max: float
    rounding_rms: float
    max_bound: float
    rms_bound: float
    worst: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.max <= self.max_bound and self.rms <= self.rms_bound


def _distance(a: Tensor, exact: Tensor) -> Tensor:
    """|a - exact| in float64; equal infinities and matching NaNs are at distance 0, others at
    inf."""
    a = a.double().to(exact.device)
    same = (a == exact) | (a.isnan() & exact.isnan())
    distance = torch.where(same, 0.0, (a - exact).abs())
    return distance.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def error_of(out: Tensor, exact: Tensor, eager: Tensor, rounding: Rounding | None = None) -> Error:
    """The tolerance rule; see the module. `exact` is float64, `eager` has the dtype under test,
    `rounding` gives the maximum and the RMS of what rounding does to `exact`."""
    if out.shape != exact.shape:
        raise AssertionError(f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}")
    if out.dtype != eager.dtype:
        raise AssertionError(f"dtype {out.dtype}, expected {eager.dtype}")
    if out.numel() == 0:
        return Error(0, 0, 0, 0, 0, 0, 0, 0, 0, ())
    ours, eagers = _distance(out, exact), _distance(eager, exact)
    # Where eager overflows the dtype, so may the kernel; its error says nothing there.
    eagers = torch.where(eagers.isinf(), 0.0, eagers)
    finite = torch.where(exact.isfinite(), exact, 0.0)
    limits = torch.finfo(out.dtype)
    fits = finite.abs().clamp(max=limits.max)
    errors, ulps = (4, 4) if out.numel() < TINY else (2, 1)

    def bound(eager: float, rounding: float, size: float) -> float:
        return errors * max(eager, rounding) + ulps * limits.eps * size

    def judged(rounding_max: float, rounding_rms: float) -> Error:
        return Error(
            max=ours.max().item(),
            rms=_rms(ours),
            relative_l2=_rms(ours) / max(_rms(finite), 1e-300),
            eager_max=eagers.max().item(),
            eager_rms=_rms(eagers),
            rounding_max=rounding_max,
            rounding_rms=rounding_rms,
            max_bound=bound(eagers.max().item(), rounding_max, fits.max().item()),
            rms_bound=bound(_rms(eagers), rounding_rms, _rms(fits)),
            worst=tuple(map(int, torch.unravel_index(ours.argmax(), out.shape))),
        )

    error = judged(0, 0)
    return error if error.passed or rounding is None else judged(*rounding())


def assert_close_to(
    out: Tensor,
    exact: Tensor,
    eager: Tensor,
    rounding: Rounding | None = None,
    *,
    name: str = "out",
) -> None:
    """Raise AssertionError, naming the worst coordinate, unless `out` passes the tolerance rule."""
    e = error_of(out, exact, eager, rounding)
    if not e.passed:
        at = e.worst
        raise AssertionError(
            f"{name}: max error {e.max:.3e} (bound {e.max_bound:.3e}, eager {e.eager_max:.3e}, "
            f"rounding {e.rounding_max:.3e}), rms {e.rms:.3e} (bound {e.rms_bound:.3e}, "
            f"eager {e.eager_rms:.3e}, rounding {e.rounding_rms:.3e}); worst at {at}: "
            f"{out[at].item():.6e}, exact {exact[at].item():.6e}, eager {eager[at].item():.6e}"
        )
