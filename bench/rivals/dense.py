"""Everything that is timed, each behind one small adapter: this library, eager PyTorch,
torch.compile and whatever fused MLP library is installed.

An adapter declares the ops that it serves. `skip` says why it cannot run some work, `arguments`
brings the case's arguments into its own layout (not timed), `function` imports it and returns the
call to time: from those arguments to the case's result. Here are what all rivals derive from and
those of the dense ops; rivals.py has the table of all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import reference
from ...kernels.device import capability_of
from ...ops import gated_linear
from ..work import DGLU, PHASES, Work

Arguments = Mapping[str, Tensor]
Function = Callable[[Arguments], Tensor]


class Rival:
    """ops: the public functions that it can stand in for; () for all. activations: our name -> its
    own; None for all, by our names. plain: takes only weights apart, no biases. trusted: made of
    the reference, or judged by the tolerance rule: it computes the op; or it is a measure, which
    says itself what else it computes. by_name: left out unless it is asked for."""

    name: str
    ops: tuple[str, ...] = ()
    phases: tuple[str, ...] = PHASES
    module: str | None = None
    activations: Mapping[str, str] | None = None
    plain: bool = True
    trusted: bool = False
    by_name: bool = False

    def skip(self, work: Work, phase: str) -> str | None:
        """Why this work is not timed here; None if it is."""
        if self.ops and work.case.op not in self.ops:
            return f"does not serve {work.case.op}"
        if self.ops and work.case.adapted:
            return "has no adapters"
        if work.case.forward_only and phase != "forward":
            return "has no gradient"
        if self.activations is not None and work.activation not in self.activations:
            return f"has no {work.activation}"
        if self.plain and set(work.case.options) - {"recompute"}:
            return f"is timed on weights of its own layout; {work.case.name} is about ours"
        if self.plain and _has_bias(work):
            return "has no fused bias"
        return self.missing()

    def missing(self) -> str | None:
        """Why it cannot be imported; None if it can."""
        if self.module is None:
            return None
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a broken install fails in any way; its words are the reason
            return f"cannot be imported: {type(error).__name__}: {error}"
        return None

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        return dict(inputs)

    def function(self, work: Work) -> Function:
        raise NotImplementedError

    def dglu(self, work: Work) -> Callable[[Arguments], object]:
        """The same for the phase dglu, from dy, w_down and gu."""
        raise NotImplementedError

    def waits(self, work: Work) -> bool:
        """Does a call of it wait for the GPU? Such a call is never captured in a CUDA graph."""
        return False

    def preparing(self, phase: str) -> AbstractContextManager[Any]:
        """What has to be in force while a call is prepared and first made."""
        return nullcontext()

    def in_force(self) -> AbstractContextManager[Any]:
        """What has to be in force during every call, and during its check."""
        return nullcontext()

    def its(self, activation: str) -> str:
        return activation if self.activations is None else self.activations[activation]


def capability_here() -> int:
    """10 * major + minor of the GPU, 0 without one."""
    return capability_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _has_bias(work: Work) -> bool:
    return any(name.startswith("b_") or name == "b" for name in work.case.shapes(1, 8, 8))


def recomputes(work: Work) -> bool:
    return bool(work.case.options.get("recompute"))


class Fusedmlp(Rival):
    """Whatever auto, or FUSEDMLP_BACKEND, takes."""

    name = "fusedmlp"
    phases: tuple[str, ...] = (*PHASES, DGLU)
    plain = False
    trusted = True

    def function(self, work: Work) -> Function:
        return lambda t: work.case.run(t, **work.options)

    def dglu(self, work: Work) -> Callable[[Arguments], object]:
        return lambda t: gated_linear.bwd(
            t["dy"], t["w_down"], t["gu"], work.activation, None, True, False
        )


class Eager(Rival):
    """The reference, op by op; under torch.utils.checkpoint where the case recomputes."""

    name = "eager"
    phases: tuple[str, ...] = (*PHASES, DGLU)
    plain = False
    trusted = True

    def function(self, work: Work) -> Function:
        run = lambda t: work.case.run_reference(t, **work.options)  # noqa: E731
        return _recomputing(run) if recomputes(work) else run

    def waits(self, work: Work) -> bool:
        return work.case.op in ("moe_linear", "moe_mlp")  # it loops over the experts' offsets

    def dglu(self, work: Work) -> Callable[[Arguments], object]:
        def run(t: Arguments) -> object:
            pair = [half.detach().requires_grad_() for half in t["gu"]]
            with torch.enable_grad():
                h = reference.gated_act(pair[0], pair[1], work.activation)
            return torch.autograd.grad(h, pair, t["dy"] @ t["w_down"]), h.detach()

        return run


def _recomputing(run: Function) -> Function:
    def call(t: Arguments) -> Tensor:
        if not torch.is_grad_enabled():
            return run(t)
        # Nothing here draws random numbers, and saving their state cannot be captured in a CUDA
        # graph.
        return checkpoint(run, t, use_reentrant=False, preserve_rng_state=False)

    return call


class EagerPacked(Eager):
    """Gate and up as one GEMM, as many models store them."""

    name = "eager-packed"
    phases: tuple[str, ...] = PHASES
    ops = ("gated_linear", "gated_mlp")

    def skip(self, work: Work, phase: str) -> str | None:
        if "packed" in work.case.options:
            return "is what eager does here already"
        return super().skip(work, phase)

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        packed = {n: t for n, t in inputs.items() if n not in ("w_gate", "w_up", "b_gate", "b_up")}
        for letter in ("w", "b"):
            if f"{letter}_gate" in inputs:
                pair = inputs[f"{letter}_gate"], inputs[f"{letter}_up"]
                packed[f"{letter}_gate"] = torch.cat(pair)
        return packed

    def function(self, work: Work) -> Function:
        of = getattr(reference, work.case.op)
        run = lambda t: of(**t, w_up=None, activation=work.activation, packed="gate_up")  # noqa: E731
        return _recomputing(run) if recomputes(work) else run


class Compiled(Rival):
    """torch.compile of an eager rival; no CUDA graphs of its own, since everyone gets ours."""

    phases: tuple[str, ...] = PHASES

    def function(self, work: Work) -> Function:
        run = super().function(work)
        return torch.compile(run, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)

    def preparing(self, phase: str) -> AbstractContextManager[Any]:
        # A backward alone runs again and again over what one forward saved, so it may not reuse
        # that memory.
        keep = phase == "backward"
        return torch._functorch.config.patch(donated_buffer=False) if keep else nullcontext()


class Compile(Compiled, Eager):
    name = "compile"


class CompilePacked(Compiled, EagerPacked):
    name = "compile-packed"


# Our argument names -> those that the adapter uses; mlp_func calls them weight1, weight2, bias1,
# bias2.
_QUACK_NAMES = {
    "x": "x", "w": "w1", "b": "b1", "w_in": "w1", "b_in": "b1", "w_out": "w2", "b_out": "b2",
    "w_down": "w2", "b_down": "b2",
}  # fmt: skip


class Quack(Rival):
    """Dao-AILab/quack. Its packed weight has gate and up rows in turn."""

    name = "quack"
    ops = ("gated_linear", "gated_mlp", "linear_act", "mlp")
    module = "quack.gemm_interface"
    plain = False
    gated = {"silu": "swiglu", "relu": "reglu", "gelu_tanh": "geglu", "sigmoid": "glu"}
    ungated = {
        "silu": "silu",
        "relu": "relu",
        "relu_sq": "relu_sq",
        "gelu_tanh": "gelu_tanh_approx",
    }

    def skip(self, work: Work, phase: str) -> str | None:
        op, block = work.case.op, work.case.op in ("gated_mlp", "mlp")
        if op not in self.ops:
            return f"does not serve {op}"
        if work.case.adapted:
            return "has no adapters"
        if "packed" in work.case.options:
            return "is timed on weights of its own layout; this case is about ours"
        if work.activation not in self._names(work):
            return f"has no {work.activation} for {op}"
        if work.dtype == "float32":
            return "takes bfloat16 and float16 only"
        if work.D % 8 or work.H % 8:
            return "needs widths that are multiples of 8"
        if phase != "forward" and not block:
            return "has gradients of the whole block only"
        if _has_bias(work) and (phase != "forward" or recomputes(work)):
            return "fuses a bias only where no gradient is wanted"
        return self.missing()

    def _names(self, work: Work) -> Mapping[str, str]:
        return self.gated if work.case.op.startswith("gated") else self.ungated

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        if "w_gate" not in inputs:
            return {_QUACK_NAMES[name]: t for name, t in inputs.items()}
        pairs = {"w1": ("w_gate", "w_up"), "b1": ("b_gate", "b_up")}
        joined = {
            new: in_turn(inputs[gate], inputs[up])
            for new, (gate, up) in pairs.items()
            if gate in inputs
        }
        rest = {_QUACK_NAMES[n]: t for n, t in inputs.items() if n in ("x", "w_down", "b_down")}
        return joined | rest

    def function(self, work: Work) -> Function:
        activation = self._names(work)[work.activation]
        if work.case.op in ("gated_mlp", "mlp"):
            whole = importlib.import_module("quack.mlp").mlp_func
            return lambda t: whole(
                t["x"], t["w1"], t["w2"], activation,
                bias1=t.get("b1"), bias2=t.get("b2"), recompute=recomputes(work),
            )  # fmt: skip
        interface = importlib.import_module("quack.gemm_interface")
        gemm = interface.gemm_gated if work.case.op == "gated_linear" else interface.gemm_act
        return lambda t: gemm(
            t["x"], t["w1"].T, bias=t.get("b1"), activation=activation, store_preact=False
        )[1]


def in_turn(gate: Tensor, up: Tensor, dim: int = 0) -> Tensor:
    """Rows gate 0, up 0, gate 1, up 1, ... along `dim`."""
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)


RIVALS = (Fusedmlp(), Eager(), EagerPacked(), Compile(), CompilePacked(), Quack())
