"""What tests and bench share: the cases, the tolerance rule, NaN-poisoned memory.

The rule, for every dtype, op and backend: with exact = the reference in float64 and eager = the
reference in the dtype under test,

    max |out - exact| <= 2 max |eager - exact| + eps(dtype) max |exact|,   and the same for the RMS.

A tensor under 64 elements gets 4 eps: eager's own worst error is then a matter of luck. NaN and Inf
never pass where exact is finite, and must stand where exact has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._api import gated_act, gated_linear, gated_mlp, linear_act, mlp
from .kernels.activations import ACTIVATIONS

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


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One public function with one way of calling it, over token count M, width D, hidden width H.

    shapes: argument name -> shape, in the order of fn's signature. options: fixed keywords of fn,
    of which the reference takes those in `reference_options`. flops, elements: of one forward, the
    latter counting each argument read once and each result written once.
    """

    name: str
    fn: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: Callable[[int, int, int], Shapes]
    flops: Callable[[int, int, int], int]
    options: Mapping[str, Any] = field(default_factory=dict)
    reference_options: tuple[str, ...] = ("packed",)

    @property
    def op(self) -> str:
        """The stem of its files: ops/<op>.py, and kernels/<op>.py where it has kernels."""
        return self.fn.__name__

    def inputs(
        self,
        M: int,
        D: int,
        H: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        activation: str = "silu",
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Random arguments, scaled so that results stay near 1; off the kink of a kinked
        activation."""
        generator = torch.Generator().manual_seed(seed)
        draw = _off_kink if ACTIVATIONS[activation].kink else _uniform
        return {
            name: draw(name, shape, D, generator).to(device=device, dtype=dtype)
            for name, shape in self.shapes(M, D, H).items()
        }

    def run(self, inputs: Mapping[str, Tensor | None], **options: Any) -> Tensor:
        return self.fn(**self._absent(inputs), **{**self.options, **options})

    def run_reference(self, inputs: Mapping[str, Tensor | None], **options: Any) -> Tensor:
        options = {
            **{k: self.options[k] for k in self.reference_options if k in self.options},
            **options,
        }
        return self.reference(**self._absent(inputs), **options)

    def _absent(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """A packed call has no second half: pass None where the signature wants a name."""
        if "packed" not in self.options:
            return dict(inputs)
        absent = "u" if "g" in inputs else "w_up"
        return {**inputs, absent: None}

    def elements(self, M: int, D: int, H: int) -> int:
        shapes = self.shapes(M, D, H)
        out = self.fake_output(M, D, H)
        return sum(torch.Size(s).numel() for s in shapes.values()) + out.numel()

    def fake_output(self, M: int, D: int, H: int) -> Tensor:
        """The result on the meta device: its shape, at no cost."""
        inputs = {k: torch.empty(s, device="meta") for k, s in self.shapes(M, D, H).items()}
        return self.run_reference(inputs)


def _uniform(name: str, shape: tuple[int, ...], D: int, generator: torch.Generator) -> Tensor:
    """Uniform of variance 1; a weight is divided by the root of its columns. Not normal: in its
    tails one lucky rounding of eager's decides a whole column's bound."""
    t = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * 3**0.5
    return t / shape[-1] ** 0.5 if name.startswith("w_") or name == "w" else t


def _off_kink_step(columns: int) -> float:
    """The power of 2 nearest to 1 / sqrt(columns): it keeps products exact and sums near 1."""
    return 2.0 ** -round(math.log2(max(columns, 1)) / 2)


def _off_kink(name: str, shape: tuple[int, ...], D: int, generator: torch.Generator) -> Tensor:
    """Pre-activations that no rounding can carry across 0.

    An odd number of products of odd integers is odd, so x' w is exact and never 0; biases are even.
    """
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.startswith("w_") or name == "w":
        return torch.where(t.abs() < 1, t.sign(), 3 * t.sign()) * _off_kink_step(shape[-1])
    if name.startswith("b"):
        return 2 * t.round() * _off_kink_step(D)  # an even number of steps: the sum stays odd
    if name == "x":
        t = t.sign()
        if D and D % 2 == 0:
            t[..., -1] = 0
        return t
    return t + 0.05 * t.sign()


def evaluate(
    fn: Callable[[Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    dy: Tensor | None,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """fn's output under "out" and, given its upstream gradient dy, the gradient of each `wanted`
    input (default: all) under "d" + name."""
    wanted = tuple(inputs) if wanted is None else wanted
    leaves = {
        # Views keep the strides under test; a clone would pack them.
        name: t.detach().requires_grad_(dy is not None and name in wanted)
        for name, t in inputs.items()
    }
    out = fn(leaves)
    results = {"out": out.detach()}
    if dy is not None and wanted:
        grads = torch.autograd.grad(out, [leaves[name] for name in wanted], dy)
        results |= {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return results


def judge(
    case: Case,
    inputs: Mapping[str, Tensor],
    *,
    backward: bool = True,
    wanted: tuple[str, ...] | None = None,
    dy: Tensor | None = None,
    **options: Any,
) -> dict[str, Error]:
    """Errors of case.fn's output and gradients by the tolerance rule, on whatever backend is
    chosen."""
    results = compare(case, inputs, backward=backward, wanted=wanted, dy=dy, **options)
    return {name: error_of(*triple) for name, triple in results.items()}


def compare(
    case: Case,
    inputs: Mapping[str, Tensor],
    *,
    backward: bool = True,
    wanted: tuple[str, ...] | None = None,
    dy: Tensor | None = None,
    **options: Any,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """name -> (out, exact, eager) for the output and every gradient."""
    reference = lambda t: case.run_reference(t, **options)  # noqa: E731
    exact_inputs = {name: t.double() for name, t in inputs.items()}
    if backward and dy is None:
        with torch.no_grad():
            out = reference(inputs)
        generator = torch.Generator().manual_seed(1)
        dy = _uniform("dy", tuple(out.shape), 0, generator).to(out)
    grads = dy if backward else None
    ours = evaluate(lambda t: case.run(t, **options), inputs, grads, wanted)
    eager = evaluate(reference, inputs, grads, wanted)
    exact = evaluate(reference, exact_inputs, None if grads is None else grads.double(), wanted)
    return {name: (ours[name], exact[name], eager[name]) for name in ours}


@contextmanager
def poison() -> Iterator[None]:
    """Fill memory from torch.empty, empty_like and new_empty with NaN: an unwritten element
    shows."""
    empties = (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")
    originals = [(owner, name, getattr(owner, name)) for owner, name in empties]

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            t = original(*args, **kwargs)
            if torch.compiler.is_compiling() or type(t) is not Tensor or t.is_meta:
                return t
            with torch.no_grad():
                return t.fill_(float("nan")) if t.is_floating_point() else t

        return make

    try:
        for owner, name, original in originals:
            setattr(owner, name, poisoned(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _act_shapes(packed: bool) -> Callable[[int, int, int], Shapes]:
    return lambda M, D, H: {"g": (M, 2 * H)} if packed else {"g": (M, H), "u": (M, H)}


def _gated_shapes(bias: bool, packed: bool, down: bool) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        rows = 2 * H if packed else H
        named: Shapes = {"x": (M, D), "w_gate": (rows, D)}
        if not packed:
            named["w_up"] = (H, D)
        if down:
            named["w_down"] = (D, H)
        if bias:
            named["b_gate"] = (rows,)
            if not packed:
                named["b_up"] = (H,)
            if down:
                named["b_down"] = (D,)
        return named

    return shapes


def _plain_shapes(bias: bool, down: bool) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        if not down:
            return {"x": (M, D), "w": (H, D)} | ({"b": (H,)} if bias else {})
        named: Shapes = {"x": (M, D), "w_in": (H, D), "w_out": (D, H)}
        return named | ({"b_in": (H,), "b_out": (D,)} if bias else {})

    return shapes


def _flops(per_weight: int) -> Callable[[int, int, int], int]:
    """Of a GEMM family: so many FLOPs for each of M D H."""
    return lambda M, D, H: per_weight * M * D * H


def _cases() -> Iterator[Case]:
    orders = ("gate_up", "up_gate")
    fn: Callable[..., Tensor] = gated_act
    ref: Callable[..., Tensor] = reference.gated_act
    flops: Callable[[int, int, int], int] = lambda M, D, H: 2 * M * H  # noqa: E731
    yield Case("gated_act", fn, ref, _act_shapes(False), flops)
    for order in orders:
        yield Case(f"gated_act-{order}", fn, ref, _act_shapes(True), flops, {"packed": order})

    for fn, ref, down in (
        (gated_linear, reference.gated_linear, False),
        (gated_mlp, reference.gated_mlp, True),
    ):
        name, flops = fn.__name__, _flops(6 if down else 4)
        yield Case(name, fn, ref, _gated_shapes(False, False, down), flops)
        yield Case(f"{name}-bias", fn, ref, _gated_shapes(True, False, down), flops)
        packed = _gated_shapes(True, True, down)
        for order in orders:
            yield Case(f"{name}-{order}-bias", fn, ref, packed, flops, {"packed": order})
        if down:
            shapes, options = _gated_shapes(True, False, True), {"recompute": True}
            yield Case(f"{name}-recompute-bias", fn, ref, shapes, flops, options)

    for fn, ref, down in ((linear_act, reference.linear_act, False), (mlp, reference.mlp, True)):
        name, flops = fn.__name__, _flops(4 if down else 2)
        yield Case(name, fn, ref, _plain_shapes(False, down), flops)
        yield Case(f"{name}-bias", fn, ref, _plain_shapes(True, down), flops)
        if down:
            shapes, options = _plain_shapes(True, True), {"recompute": True}
            yield Case(f"{name}-recompute-bias", fn, ref, shapes, flops, options)


CASES: dict[str, Case] = {case.name: case for case in _cases()}
