"""What is known of an op, in one row.

An `Op` is a public function with the kernels that it launches; a `Kernel` is one op registered with
torch. `library.define` makes a kernel's row, and every file of fusedmlp/ops/ ends with
`register(Op(...))`. Public names, explain(), backends, the gate, the bench and the tests read the
rows; no other list names them. A row with a missing piece, or two rows of one name, raise a
`RowError` when the file is imported.

FLOPs are those of products: elementwise work counts as PyTorch counts it, as none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels.launch import Launch, no_extras
from .flops import Shapes

MISSING: Any = None  # what a row was not given; the check names it
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (*SIXTEEN_BITS, torch.float32)
# Kernels of csrc/ with each architecture's own instructions.
HOPPER_AND_NEWER = ("sm_90a", "sm_100f")
# Arguments whose elements are no numbers of the call's dtype: prefix of their name -> (bytes of an
# element, whether it has a gradient). Bit planes of masks; words and scales of one-bit weights.
BIT_PLANES = {"masks": (1, False)}
ONE_BIT = {"q_": (4, False), "s_": (2, True)}
# Sizes of a product's result, and the depth that its sums run over.
DEPTHS = {"MH": "D", "MD": "H", "HD": "M"}
# The package's own name: as a kernel of the Hub it is loaded under another, more than once.
NAMESPACE = __name__.partition(".")[0]


class RowError(ValueError):
    """A row that lacks something; the message names the op, the field, and what to write there."""

    def __init__(self, op: str, name: str, expected: str, got: object, remedy: str) -> None:
        super().__init__(f"{op}: {name} must be {expected}, got {got!r}; {remedy}")


@dataclass(frozen=True)
class Cuda:
    """The kernel of csrc/ beside a Triton kernel.

    launch: takes the extension's launcher, then the arguments of the Triton launcher. archs: those
    it is built for; one with an "a" or "f" has its own instructions, and serves that GPU alone or
    its family too (`loader.serves`). dtypes: of a call's first tensor. few_rows: whether `auto` may
    take it for few rows, where some Triton kernels cut K and their CUDA twins do not. decodes: it
    serves inference of few rows, nothing else.
    """

    launch: Callable[..., Any]
    archs: tuple[str, ...] = ("sm_80",)
    dtypes: tuple[torch.dtype, ...] = SIXTEEN_BITS
    few_rows: bool = True
    decodes: bool = False

    @property
    def portable(self) -> bool:
        """Has no architecture's own instructions."""
        return not any(arch.endswith(("a", "f")) for arch in self.archs)


@dataclass(frozen=True)
class Kernel:
    """One op registered with torch.

    triton: its Triton launcher. fake: its shape rule. flops: of a call, from its arguments with
    shapes in place of tensors. result: sizes of its result where it is a product with tiles in the
    table of kernels/arch. grouped: one product an expert. cuda: the kernel of csrc/, if any.
    cutlass: the launcher of that of csrc/cutlass/, if any, with the arguments of the Triton one.
    launches: calls that the gate compiles, and with which its tiles are searched.
    """

    schema: str
    triton: Callable[..., Any] = MISSING
    fake: Callable[..., Any] = MISSING
    flops: Callable[..., int] = MISSING
    result: str | None = None
    grouped: bool = False
    cuda: Cuda | None = None
    cutlass: Callable[..., Any] | None = None
    launches: tuple[Launch, ...] = ()

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def call(self) -> Any:
        """The registered overload."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def cuda_row(self) -> Cuda:
        assert self.cuda is not None, f"{self.name} has no kernel in csrc/"
        return self.cuda

    @property
    def depth(self) -> str | None:
        return None if self.result is None else DEPTHS[self.result]


@dataclass(frozen=True)
class Op:
    """A public function and what it is made of.

    forward, backward: the kernels that a call and its gradient launch when every gradient is
    wanted; other products are PyTorch's own. flops: of one forward, from the shapes of its
    arguments by name, and only those that are useful (of causal scores, the visible ones). counted:
    what PyTorch's counter says of the same call, where that is not `flops`. remade: FLOPs that
    recompute=True adds. own_bytes: arguments whose elements have a size of their own: prefix of
    their name -> (bytes, whether they have a gradient). within: the op whose cases exercise this
    one too, if it has no case. public: whether users call it; else a layer does.
    """

    name: str
    function: Callable[..., Any] = MISSING
    reference: Callable[..., Any] = MISSING
    forward: tuple[Kernel, ...] = ()
    flops: Callable[[Shapes], int] = MISSING
    backward: tuple[Kernel, ...] = ()
    counted: Callable[[Shapes], int] | None = None
    remade: Callable[[Shapes], int] | None = None
    own_bytes: Mapping[str, tuple[int, bool]] = field(default_factory=dict)
    within: str = ""
    public: bool = True

    @functools.cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """Each once, the forward's first."""
        return tuple({k.name: k for k in (*self.forward, *self.backward)}.values())

    @functools.cached_property
    def cuda(self) -> tuple[Kernel, ...]:
        """Its kernels that csrc/ holds too."""
        return tuple(kernel for kernel in self.kernels if kernel.cuda)

    def products(self, shapes: Shapes) -> int:
        """FLOPs of one forward as PyTorch's counter has them."""
        return (self.counted or self.flops)(shapes)


KERNELS: dict[str, Kernel] = {}
OPS: dict[str, Op] = {}


def add_kernel(kernel: Kernel) -> None:
    """Check a kernel's row and enter it."""
    name = kernel.name
    for piece in ("triton", "fake", "flops"):
        found = getattr(kernel, piece)
        if not callable(found):
            raise RowError(name, piece, "a function", found, "give it to library.define")
    if kernel.result is not None and kernel.result not in DEPTHS:
        sizes = f"None or one of {', '.join(DEPTHS)}"
        raise RowError(name, "result", sizes, kernel.result, "name the sizes of its product")
    if not any(launch.size or launch.everywhere is not no_extras for launch in kernel.launches):
        remedy = "write one in kernels/launches/, which the gate compiles"
        raise RowError(name, "launches", "calls at real sizes", kernel.launches, remedy)
    if name in KERNELS:
        raise RowError(name, "name", "new", name, "two kernels cannot share it: rename one")
    KERNELS[name] = kernel


def kernel(call: Any, result: str | None = None) -> Kernel:
    """The row of a registered op. result: where it has other sizes in this use."""
    name = getattr(call, "_schema", call)
    name = str(getattr(name, "name", name)).rpartition("::")[2]
    if name not in KERNELS:
        remedy = "define it with library.define"
        raise RowError(name, "kernel", "registered", call, remedy)
    found = KERNELS[name]
    return dataclasses.replace(found, result=result) if result else found


def register(op: Op) -> None:
    """Check an op's row and enter it."""
    name = op.name
    at_the_end = "complete register(Op(...)) at the end of its file"
    for piece in ("function", "reference"):
        found = getattr(op, piece)
        if getattr(found, "__name__", None) != name:
            raise RowError(name, piece, f"a function called {name}", found, at_the_end)
    if not callable(op.flops):
        raise RowError(
            name, "flops", "a formula over the shapes of arguments", op.flops, at_the_end
        )
    for phase in ("forward", "backward"):
        rows = getattr(op, phase)
        if not isinstance(rows, tuple) or not all(isinstance(row, Kernel) for row in rows):
            raise RowError(name, phase, "a tuple of kernel(...)", rows, at_the_end)
    if not op.forward:
        raise RowError(name, "forward", "the kernels of a call", op.forward, at_the_end)
    if name in OPS:
        where = OPS[name].function.__module__
        raise RowError(name, "name", "new", f"{name}, of {where}", "rename one of the two ops")
    OPS[name] = op


def public_ops() -> list[str]:
    """Names of the ops that users call."""
    return [name for name, op in OPS.items() if op.public]
