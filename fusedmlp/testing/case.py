"""A Case: one public function with one way of calling it, its inputs, and its comparison with the
reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _api, reference
from ..backends.op import OPS
from ..reference.activations import Resolved, resolve
from .rounding import rounding_errors
from .rule import Error, Rounding, error_of

Shapes = dict[str, tuple[int, ...]]
Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Case:
    """One public function with one way of calling it, over token count M, width D, hidden width H.

    shapes: argument name -> shape, in the order of fn's signature. options: fixed keywords of fn,
    of which the reference takes those in `reference_options`. draws: how arguments that
    are no floating numbers are drawn, from shape and generator; they get no gradient. adapt: from
    the drawn arguments to those of fn, by the functions of a module: the public ones or the
    reference. result: from what fn returns to the tensor to compare.
    out_shape: where the reference cannot run on the meta device. straight_through: arguments whose
    gradient is by definition not the derivative. forward_only: it has no gradient. scales: what
    some arguments are multiplied by when they are drawn.
    """

    name: str
    fn: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: Callable[[int, int, int], Shapes]
    options: Mapping[str, Any] = field(default_factory=dict)
    reference_options: tuple[str, ...] = ("packed",)
    draws: Mapping[str, Draw] = field(default_factory=dict)
    adapt: Callable[[dict[str, Any], Any], dict[str, Any]] = lambda arguments, functions: arguments
    result: Callable[[Any], Tensor] = lambda out: out
    out_shape: Callable[[int, int, int], tuple[int, ...]] | None = None
    straight_through: tuple[str, ...] = ()
    forward_only: bool = False
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def op(self) -> str:
        """The stem of its files: ops/<op>.py, and kernels/<op>.py where it has kernels."""
        return self.fn.__name__

    @property
    def gated(self) -> bool:
        """Whether it has an up projection, so that a gate with a factor for it can be asked for."""
        return "packed" in self.options or not _UP.isdisjoint(self.shapes(1, 1, 1))

    def with_activation(self, activation: str) -> Case:
        """The same call with another activation, whose inputs are drawn for it."""
        return dataclasses.replace(
            self,
            options={**self.options, "activation": activation},
            reference_options=(*self.reference_options, "activation"),
        )

    @property
    def fits_cuda(self) -> bool:
        """Whether the CUDA kernels of its op, if there are any, take it: they write gate and up
        apart, never in turn, and add no adapter."""
        return self.options.get("packed") != "interleaved" and not self.adapted

    @property
    def adapted(self) -> bool:
        """Whether it has low-rank adapters."""
        return any(name.endswith("_a") for name in self.shapes(1, 1, 1))

    def inputs(
        self,
        M: int,
        D: int,
        H: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        activation: str | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Random arguments, drawn on `device`.

        Pre-activations have variance 1 and lie within 1.73, or have both times the largest kink or
        scale of the activation, 7 for a limit of 7: about a third of them lie beyond it, on both
        sides, and none on a kink. Weights keep what comes after near that.
        """
        generator = torch.Generator(device).manual_seed(seed)
        gate = resolve(activation or self.options.get("activation", "silu"))
        draw, reach = _off_kink if gate.row.kinks else _uniform, _reach(gate)
        made = {}
        for name, shape in self.shapes(M, D, H).items():
            if name in self.draws:
                t = made[name] = self.draws[name](shape, generator)
                if gate.row.kinks and t.is_floating_point():
                    t.fill_(_off_kink_step(D))  # scales of one-bit weights, which are all odd
                continue
            scale = self.scales.get(name, 1) * (reach if name in _FIRST else 1)
            t = draw(name, shape, D, generator).mul_(scale)
            made[name] = t.to(device=device, dtype=dtype)
        return made

    def run(self, inputs: Mapping[str, Tensor | None], **options: Any) -> Tensor:
        arguments = self._arguments(inputs, _api)
        return self.result(self.fn(**arguments, **{**self.options, **options}))

    def run_reference(self, inputs: Mapping[str, Tensor | None], **options: Any) -> Tensor:
        options = {
            **{k: self.options[k] for k in self.reference_options if k in self.options},
            **options,
        }
        return self.result(self.reference(**self._arguments(inputs, reference), **options))

    def _arguments(self, inputs: Mapping[str, Tensor | None], functions: Any) -> dict[str, Any]:
        """A packed call has no second half: pass None where the signature wants a name."""
        if "packed" not in self.options:
            return self.adapt(dict(inputs), functions)
        absent = "u" if "g" in inputs else "w_up"
        return self.adapt({**inputs, absent: None}, functions)

    def flops(self, M: int, D: int, H: int) -> int:
        """The FLOPs of one forward."""
        return OPS[self.op].flops(self.shapes(M, D, H))

    def elements(self, M: int, D: int, H: int) -> int:
        """The elements that one forward moves: each argument read once, the result written once."""
        shapes = self.shapes(M, D, H)
        out = self.fake_output(M, D, H)
        return sum(torch.Size(s).numel() for s in shapes.values()) + out.numel()

    def fake_output(self, M: int, D: int, H: int) -> Tensor:
        """The result on the meta device: its shape, at no cost."""
        if self.out_shape is not None:
            return torch.empty(self.out_shape(M, D, H), device="meta")
        inputs = {k: torch.empty(s, device="meta") for k, s in self.shapes(M, D, H).items()}
        return self.run_reference(inputs)


# What pre-activations are made of, beside weights.
_UP = {"u", "w_up", "q_up", "masks"}
_FIRST = ("x", "g", "u", "b", "b_gate", "b_up", "b_in")


def _reach(gate: Resolved) -> float:
    """What pre-activations are multiplied by, so that they pass every bend of phi and psi."""
    row, scalars = gate
    own = dict(zip(row.parameters, scalars, strict=True))
    named = (own[n] if isinstance(n, str) else n for n in (*row.kinks, *row.positive))
    return max(1.0, *named) if row.kinks or row.positive else 1.0


def _uniform(name: str, shape: tuple[int, ...], D: int, generator: torch.Generator) -> Tensor:
    """Uniform of variance 1; a weight is divided by the root of its columns. Not normal: in its
    tails one lucky rounding of eager's decides a whole column's bound."""
    options: Any = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    t = torch.rand(shape, **options).mul_(2).sub_(1).mul_(3**0.5)
    return t.div_(shape[-1] ** 0.5) if name.startswith("w_") or name == "w" else t


def _off_kink_step(columns: int) -> float:
    """The power of 2 nearest to 1 / sqrt(columns): it keeps products exact and sums near 1."""
    return 2.0 ** -round(math.log2(max(columns, 1)) / 2)


def _off_kink(name: str, shape: tuple[int, ...], D: int, generator: torch.Generator) -> Tensor:
    """Pre-activations that no rounding can carry across 0.

    An odd number of products of odd integers is odd, so x' w is exact and never 0; biases are even,
    and so is what an adapter adds by one entry in a row of a and four in a row of b.
    """
    options: Any = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    t = torch.randn(shape, **options)
    if name.endswith("_a"):
        columns = torch.arange(shape[0], device=t.device) % max(1, shape[1] - 1)
        one = torch.zeros_like(t).scatter_(1, columns.unsqueeze(1), 1)
        return one * t.sign() * _off_kink_step(shape[1])
    if name.endswith("_b"):
        return 4 * t.sign() * (torch.arange(shape[1], device=t.device) < 4)
    if name.startswith("w_") or name == "w":
        return torch.where(t.abs() < 1, t.sign(), 3 * t.sign()) * _off_kink_step(shape[-1])
    if name.startswith("b"):
        return 2 * t.round() * _off_kink_step(D)  # an even number of steps: the sum stays odd
    if name == "masks":
        # As with no mask: an odd number of products each, of what x's last column leaves.
        even = (t[..., : D - 1 + D % 2] > 0).sum(-1) % 2 == 0
        t[..., 0] = torch.where(even, -t[..., 0], t[..., 0])
        return t
    if name == "x":
        t = t.sign()
        if D and D % 2 == 0:
            t[..., -1] = 0
        return t
    return t + 0.05 * t.sign()


def floating(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `inputs` that can have a gradient."""
    return {name: t for name, t in inputs.items() if t.is_floating_point()}


def doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` in float64, but for those that are no floating numbers."""
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def evaluate(
    fn: Callable[[Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    dy: Tensor | None,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """fn's output under "out" and, given its upstream gradient dy, the gradient of each `wanted`
    input (default: all that can have one) under "d" + name."""
    wanted = tuple(floating(inputs)) if wanted is None else wanted
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


def yardsticks(
    fn: Callable[[Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    dy: Tensor | None = None,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, tuple[Tensor, Tensor, Rounding]]:
    """(exact, eager, rounding) of each result that `evaluate` gives of the reference `fn`: all that
    the tolerance rule judges another computation by."""
    exact_inputs, exact_dy = doubled(inputs), None if dy is None else dy.double()
    run = lambda: evaluate(fn, exact_inputs, exact_dy, wanted)  # noqa: E731
    eager = evaluate(fn, inputs, dy, wanted)
    return with_rounding(run, eager, eager["out"].dtype)


def with_rounding(
    run: Callable[[], dict[str, Tensor]], eager: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor, Rounding]]:
    """(exact, eager, rounding) of each result: `run` computes them exactly, and what rounding to
    `dtype` does to them is simulated where the rule asks for it."""
    exact = run()
    errors = functools.cache(lambda: rounding_errors(run, exact, dtype))
    one = lambda name: errors()[name]  # noqa: E731
    return {k: (t, eager[k], functools.partial(one, k)) for k, t in exact.items()}


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
    return {name: error_of(*numbers) for name, numbers in results.items()}


def compare(
    case: Case,
    inputs: Mapping[str, Tensor],
    *,
    backward: bool = True,
    wanted: tuple[str, ...] | None = None,
    dy: Tensor | None = None,
    **options: Any,
) -> dict[str, tuple[Tensor, Tensor, Tensor, Rounding]]:
    """name -> (out, exact, eager, rounding) for the output and every gradient."""
    reference = lambda t: case.run_reference(t, **options)  # noqa: E731
    backward = backward and not case.forward_only
    if backward and dy is None:
        with torch.no_grad():
            out = reference(inputs)
        generator = torch.Generator(out.device).manual_seed(1)
        dy = _uniform("dy", tuple(out.shape), 0, generator).to(out)
    grads = dy if backward else None
    ours = evaluate(lambda t: case.run(t, **options), inputs, grads, wanted)
    known = yardsticks(reference, inputs, grads, wanted)
    return {name: (out, *known[name]) for name, out in ours.items()}
