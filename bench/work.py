"""One thing to measure or compute: a case at one size, dtype and activation; and its FLOPs and
bytes.

| phase | runs | FLOPs | bytes |
|---|---|---|---|
| forward | the call, no gradient wanted | F | arguments read, result written |
| backward | every gradient, after a forward | 2 F | arguments and dy read, every gradient written |
| both | forward that saves what backward needs, then backward | 3 F | the sum of the two |
| dglu | the GEMM dh = dy w_down of a gated_mlp's backward, alone | 2 M D H | as stated below |

F is the case's own count. FLOPs are useful ones: what a kernel computes a second time is not
counted. Bytes are the least that any implementation must move between memory and chip; what is
saved between forward and backward is an implementation's own affair and not counted either. dglu
reads dy, w_down, g and u and writes dg, du and h, which are made from dh in the GEMM's epilogue.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends.flops import bytes_moved
from ..backends.op import OPS
from ..reference.activations import resolve
from ..testing import CASES, Case, Shapes, hyper, moe
from .shapes import MOE

# The tests' cases, the experts' with as many experts as models have, and HyperGLU's at a layer's
# sizes.
ALL_CASES: dict[str, Case] = (
    CASES
    | {
        case.name: case
        for own in dict.fromkeys((m.experts or 0, m.top_k or 1, m.bias) for m in MOE.values())
        for case in moe.sized(*own).values()
    }
    | {case.name: case for case in hyper.sized()}
)
PHASES = ("forward", "backward", "both")
DGLU = "dglu"
DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Work:
    """`label`: what this size stands for in a table; `model`: whose widths these are, if
    anyone's."""

    case: Case = field(hash=False)  # it holds a dict
    activation: str
    dtype: str
    M: int
    D: int
    H: int
    model: str | None = None
    label: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def size(self) -> str:
        return f"{self.M}x{self.D}x{self.H}"

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for case.run and case.run_reference."""
        return {"activation": self.activation} if takes_activation(self.case) else {}

    def shapes(self, phase: str) -> Shapes:
        """The shapes of the tensors that a call of the phase is handed."""
        if phase == DGLU:
            M, D, H = self.M, self.D, self.H
            return {"dy": (M, D), "w_down": (D, H), "gu": (2, M, H)}
        return self.case.shapes(self.M, self.D, self.H)

    def flops(self, phase: str) -> int:
        if phase == DGLU:
            return 2 * self.M * self.D * self.H
        forward = self.case.flops(self.M, self.D, self.H)
        return forward * {"forward": 1, "backward": 2, "both": 3}[phase]

    def bytes(self, phase: str) -> int:
        sizes, size = self.shapes(phase), self.torch_dtype.itemsize
        elements = sum(math.prod(shape) for shape in sizes.values())
        if phase == DGLU:
            return (elements + 3 * self.M * self.H) * size
        results = self.case.elements(self.M, self.D, self.H) - elements
        arguments = [self._argument(name, math.prod(shape)) for name, shape in sizes.items()]
        return bytes_moved(arguments, results * size, phase)

    def _argument(self, name: str, elements: int) -> tuple[int, bool]:
        """Bytes of an argument, and whether it gets a gradient."""
        own = OPS[self.case.op].own_bytes
        prefix = next((p for p in own if name.startswith(p)), None)
        if prefix is None or name not in self.case.draws:
            return elements * self.torch_dtype.itemsize, True
        size, differentiable = own[prefix]
        return elements * size, differentiable

    def gemm(self, phase: str = "forward") -> tuple[int, int, int] | None:
        """(M, N, K) of the GEMM that cuBLAS is timed on beside a phase: of a call its first, of one
        kernel its own; None without one."""
        if phase == DGLU:
            return self.M, self.H, self.D
        shapes = self.case.shapes(self.M, self.D, self.H)
        first = ("w", "w_in", "w_gate", "w_up", "q_weight", "q_gate", "q_up")
        # Experts' weights have one dimension more; a row meets one expert.
        columns = sum(s[-2] for name, s in shapes.items() if name in first and len(s) > 1)
        return (self.rows, columns, self.D) if columns else None

    @property
    def rows(self) -> int:
        """Rows of the products: tokens, each as often as it has experts."""
        shapes = self.case.shapes(self.M, self.D, self.H)
        return math.prod(shapes["expert"]) if "expert" in shapes else self.M

    def identity(self) -> dict[str, object]:
        """The fields of a record that say what was run."""
        return {
            "case": self.case.name,
            "op": self.case.op,
            "activation": self.activation,
            "dtype": self.dtype,
            "M": self.M,
            "D": self.D,
            "H": self.H,
        }


def takes_activation(case: Case) -> bool:
    return "activation" in inspect.signature(case.fn).parameters


def default_activation(case: Case) -> str:
    """The one that the public function itself defaults to; "identity" where it takes none."""
    if not takes_activation(case):
        return "identity"
    return str(inspect.signature(case.fn).parameters["activation"].default)


def activations_of(case: Case, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those asked for that the case takes, a plain one no gate; its default if none were asked for,
    or if it takes none at all."""
    if not asked or not takes_activation(case):
        return (default_activation(case),)
    return tuple(name for name in asked if case.gated or resolve(name).row.up is None)


def case_of(name: str) -> Case:
    if name not in ALL_CASES:
        raise ValueError(f"case must be one of {', '.join(ALL_CASES)}; got {name!r}")
    return ALL_CASES[name]


def ops() -> list[str]:
    """Every op that a case calls, then those whose row is new and that no case calls yet."""
    called = dict.fromkeys(case.op for case in CASES.values())
    new = (name for name, op in OPS.items() if op.public and not op.within and name not in called)
    return [*called, *new]
