"""What rounding alone does to a result, simulated in float64.

Eager's error is a matter of luck where terms cancel or a tensor has few elements: another processor
sums in another order, and the error may be 0. So the tolerance rule has a second yardstick. The
reference runs in float64, forward and backward, and the result t of every operation is moved by a
normal random number times

    0.6 (u |t| + p (S - |t|)),   u = eps(dtype) / 2,   p = min(u, 2^-24),

where S is the sum of the magnitudes of the terms of a product of matrices or of a sum, and |t| for
every other operation. The first part is the rounding of the result: half an ulp of t lies between
u |t| / 2 and u |t|, so its RMS is 0.3 to 0.6 u |t|. The second part is that of the partial sums,
which are float32 at least: added one after another, terms of random sign err by 0.4 p S in RMS.

The moves are made smaller by one factor and the differences larger by the same, so that no move
crosses a kink, and float64's own rounding, which differs between processors, is 1e-5 of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# One draw may be lucky itself: of 1424 honest results at sizes of 1 it was too small for 2.
DRAWS = 8
# Largest move relative to a result, and how far the response to it may be from proportional.
MOVE = 2.0**-36
CURVED = 2.0**-8
# Inputs are drawn from small seeds: their own numbers again would be correlated with them.
SEED = 0x5EED

Results = Mapping[str, Tensor]

_SUMS = {
    getattr(torch.ops.aten, name)
    for name in (
        "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "sum", "mean",
        "scatter_add", "index_add", "index_put",
    )
}  # fmt: skip


def _magnitude(t: Tensor) -> Tensor:
    return t.abs() if t.is_floating_point() else t


class _Rounding(TorchDispatchMode):
    """Moves the result of every operation in float64; `scale` times what rounding to dtype does."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int, sign: int) -> None:
        super().__init__()
        self.unit = torch.finfo(dtype).eps / 2
        self.partial = min(self.unit, 2.0**-24)
        self.scale = sign * MOVE / self.unit
        self.generator = torch.Generator(device).manual_seed(SEED + seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(result.alias_info for result in func._schema.returns):
            return out  # a view, or something written in place
        terms = None
        if func.overloadpacket in _SUMS:
            terms = func(*tree_map_only(Tensor, _magnitude, args), **kwargs)
        return tree_map_only(Tensor, lambda t: self._moved(t, terms), out)

    def _moved(self, t: Tensor, terms: Tensor | None) -> Tensor:
        if t.dtype != torch.float64 or t.device != self.generator.device:
            return t
        size = self.unit * t.abs()
        if terms is not None:
            size = size + self.partial * (terms.abs() - t.abs())
        draw = torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=self.generator)
        return t + self.scale * 0.6 * draw * size


def rounding_errors(
    run: Callable[[], Results], exact: Results, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """name -> largest maximum and largest RMS, over DRAWS simulations, of what rounding to `dtype`
    does to the results of `run`, which are `exact`.

    Each tensor must move in proportion to the moves on its way. One that does not hangs on a kink
    or a tie at these very inputs: there rounding counts as nothing.
    """
    device = next(iter(exact.values())).device

    def moves(seed: int, sign: int = 1) -> dict[str, Tensor]:
        with _Rounding(dtype, device, seed, sign) as mode:
            moved = run()
        return {k: ((moved[k] - t) / mode.scale).nan_to_num(0, 0, 0) for k, t in exact.items()}

    there, back = moves(0), moves(0, -1)
    bent = {k: _size(t - back[k])[1] for k, t in there.items()}
    sizes = {k: [_size(t)] for k, t in there.items()}
    for seed in range(1, DRAWS):
        for k, t in moves(seed).items():
            sizes[k].append(_size(t))
    largest = {k: (max(m for m, _ in pair), max(r for _, r in pair)) for k, pair in sizes.items()}
    return {k: pair if bent[k] <= CURVED * pair[1] else (0, 0) for k, pair in largest.items()}


def _size(t: Tensor) -> tuple[float, float]:
    """Maximum and RMS of |t|."""
    if t.numel() == 0:
        return 0.0, 0.0
    return t.abs().max().item(), t.square().mean().sqrt().item()
