"""The table of all activations and gates: a name, its formula in PyTorch, its parameters, the
modules that compute it.

A row here and a device function of its name in kernels/activations.py are all it takes: functions
and layers accept the name, patch() finds what computes it, error messages list it, and the tests,
the ahead-of-time gate and the bench run it. A functor in csrc/activations.cuh is optional: without
one the CUDA kernels refuse the activation and Triton serves it.

An argument `activation` is a row's name, whose parameters then have their defaults, or a call that
sets some of them: "swiglu_oai", "swiglu_oai(limit=5.0)". `resolve` reads it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import gates
from .rows import elementwise

Kind = TypeVar("Kind", bound=type[nn.Module])
BSILU_ALPHA = 1.67  # SUGAR's B-SiLU, arXiv 2505.22074: (x + a) sigmoid(x) - a / 2
LAPLACE_MEAN, LAPLACE_DEVIATION = 0.707107, 0.282095  # sqrt(1 / 2), sqrt(1 / (4 pi))


@dataclass(frozen=True, eq=False)
class Activation:
    """One activation: `reference` is its formula in PyTorch, phi(g), for any floating dtype.

    `up`: psi(u) of a gate phi(g) psi(u), which no plain MLP takes; None where it is u.
    `parameters`: name -> default, at most three; both formulas take them, in this order, after
    their tensor, and kernels as numbers at run time.
    `kinks`: |g| or |u| where a slope jumps, as numbers or names of parameters, which must then be 0
    or more: an input within rounding of one has no single right gradient. `positive`: parameters
    that must be above 0.
    `modules`: the classes that compute it, where a module has the attributes `settings`; attributes
    named like parameters are those. Those of fusedmlp.activations, which are made of the rows, say
    it themselves by `@computes(name)`.
    """

    name: str
    reference: Callable[..., Tensor]
    kinks: tuple[float | str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    up: Callable[..., Tensor] | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    alone: Resolved = field(init=False, repr=False)  # what its name alone resolves to

    def __post_init__(self) -> None:
        object.__setattr__(self, "alone", Resolved(self, tuple(self.parameters.values())))

    def is_set_in(self, module: nn.Module) -> bool:
        """Whether `module` has the attributes `settings`."""
        # No all(), whose generator costs more than the rest: this runs in every forward.
        for name, value in self.settings.items():  # noqa: SIM110
            if getattr(module, name, None) != value:
                return False
        return True

    def spelled(self, **values: float) -> str:
        """The argument `activation` with these parameters: the name alone for the defaults."""
        own = {name: float(values.get(name, default)) for name, default in self.parameters.items()}
        changed = [f"{name}={own[name]!r}" for name in own if own[name] != self.parameters[name]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def spelled_of(self, module: nn.Module) -> str | None:
        """The same with the parameters that are attributes of `module`; None where it has one that
        the row does not take, as an infinite one."""
        spelling = self.spelled(**{n: getattr(module, n) for n in self.parameters})
        try:
            resolve(spelling)
        except ValueError:
            return None
        return spelling


class Resolved(NamedTuple):
    """What an argument `activation` names: a row, and its parameters' values in the row's order."""

    row: Activation
    scalars: tuple[float, ...]

    def phi(self, g: Tensor) -> Tensor:
        return elementwise(lambda t: self.row.reference(t, *self.scalars), g)

    def psi(self, u: Tensor) -> Tensor:
        up = self.row.up
        return u if up is None else elementwise(lambda t: up(t, *self.scalars), u)


def bsilu(x: Tensor, alpha: float = BSILU_ALPHA) -> Tensor:
    """(x + alpha) sigmoid(x) - alpha / 2, rearranged: in 16 bits, too, it is 0 at 0."""
    s = x.sigmoid()
    return x * s + alpha * (s - 0.5)


def laplace(x: Tensor) -> Tensor:
    """The normal distribution's integral with MEGA's mean and deviation, arXiv 2209.10655."""
    z = (x - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))
    return 0.5 * (1 + z.erf())


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("silu", F.silu, modules=(nn.SiLU,)),
        Activation("gelu", F.gelu, modules=(nn.GELU,), settings={"approximate": "none"}),
        Activation(
            "gelu_tanh", lambda x: F.gelu(x, approximate="tanh"),
            modules=(nn.GELU,), settings={"approximate": "tanh"},
        ),
        Activation("quick_gelu", lambda x: x * (1.702 * x).sigmoid()),
        Activation("relu", F.relu, kinks=(0.0,), modules=(nn.ReLU,)),
        Activation("relu_sq", lambda x: F.relu(x).square()),
        Activation("sigmoid", lambda x: x.sigmoid(), modules=(nn.Sigmoid,)),
        Activation("tanh", lambda x: x.tanh(), modules=(nn.Tanh,)),
        Activation("identity", lambda x: x, modules=(nn.Identity,)),
        Activation("gelu2", lambda x: F.gelu(x).square()),
        Activation("bsilu", bsilu, settings={"alpha": BSILU_ALPHA}),
        Activation("mish", F.mish, modules=(nn.Mish,)),
        Activation("relu6", F.relu6, kinks=(0.0, 6.0), modules=(nn.ReLU6,)),
        Activation("hardswish", F.hardswish, kinks=(3.0,), modules=(nn.Hardswish,)),
        Activation("hardsigmoid", F.hardsigmoid, kinks=(3.0,), modules=(nn.Hardsigmoid,)),
        Activation(
            "leaky_relu", F.leaky_relu, kinks=(0.0,), modules=(nn.LeakyReLU,),
            parameters={"negative_slope": 0.01},
        ),
        Activation("elu", F.elu, kinks=(0.0,), modules=(nn.ELU,), parameters={"alpha": 1.0}),
        Activation("selu", F.selu, kinks=(0.0,), modules=(nn.SELU,)),
        Activation(
            "softplus", F.softplus, modules=(nn.Softplus,),
            parameters={"beta": 1.0, "threshold": 20.0}, positive=("beta", "threshold"),
        ),
        Activation("sqrtsoftplus", lambda x: F.softplus(x).sqrt()),
        Activation("laplace", laplace),
        Activation(
            "clipped_gelu", lambda x, limit: F.gelu(x).clamp(-limit, limit),
            parameters={"limit": 10.0}, kinks=("limit",),
        ),
        # Gates, phi(g) psi(u). Which models have them: docs/gates.md.
        Activation(
            "swiglu_oai", gates.oai_gate, up=gates.oai_up,
            parameters={"limit": 7.0, "alpha": 1.702}, kinks=("limit",),
        ),
        Activation(
            "clamped_swiglu", gates.clamped_gate, up=gates.clip,
            parameters={"limit": 7.0}, kinks=("limit",),
        ),
        Activation(
            "swiglu_step", gates.step_gate, up=gates.clip,
            parameters={"limit": 7.0}, kinks=("limit",),
        ),
        Activation(
            "softcap_swiglu", gates.softcap_gate, up=gates.softcap_up,
            parameters={"gate_cap": 4.0, "up_cap": 25.0}, positive=("gate_cap", "up_cap"),
        ),
        Activation(
            "situ", gates.softcap_gate, up=gates.softcap_up,
            parameters={"beta": 4.0, "beta_up": 25.0}, positive=("beta", "beta_up"),
        ),
        Activation(
            "scaled_swiglu", gates.scaled_gate, up=gates.scaled_up,
            parameters={"gate_scale": 1.0, "up_scale": 1.0},
        ),
    )
}  # fmt: skip

# The names of the rows that a class of modules may compute, as its settings say.
MODULES: dict[type[nn.Module], tuple[str, ...]] = {}


def computes(name: str) -> Callable[[Kind], Kind]:
    """Enter a class of modules as one that computes the row `name`."""

    def enter(kind: Kind) -> Kind:
        MODULES[kind] = (*MODULES.get(kind, ()), name)
        return kind

    return enter


for _row in ACTIVATIONS.values():
    for _kind in _row.modules:
        computes(_row.name)(_kind)


# What others call a row of this table.
ALIASES = {
    "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu_sq",
    "linear": "identity",
}  # fmt: skip


def computed_by(what: object) -> str | None:
    """The argument `activation` for a function of torch, a module, its class or another name; None
    where no row computes it."""
    if isinstance(what, str):
        lower = what.lower()
        return ALIASES.get(lower, lower if lower in ACTIVATIONS else None)
    if isinstance(what, type) and what in MODULES:
        try:
            what = what()
        except TypeError:  # it has arguments without defaults
            return None
    if isinstance(what, nn.Module):
        rows = (ACTIVATIONS[name] for name in MODULES.get(type(what), ()))
        return next((row.spelled_of(what) for row in rows if row.is_set_in(what)), None)
    for row in ACTIVATIONS.values():
        if what is row.reference and row.up is None:
            return row.name
    # torch.relu, F.relu and Tensor.relu are three functions of one name.
    name = getattr(what, "__name__", None)
    of_torch = name in ACTIVATIONS and what in (
        getattr(place, name, None) for place in (torch, F, Tensor)
    )
    return name if of_torch else None


# name(parameter=number, ...)
_CALL = re.compile(r"\w+\((.+)\)")
_SET = re.compile(r"(\w+)=([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


def resolve(activation: str) -> Resolved:
    """The row and the parameters that the argument `activation` names.

    Raises ValueError, whose message is what it must be.
    """
    row = ACTIVATIONS.get(activation)
    if row is not None:
        return row.alone
    row = ACTIVATIONS.get(activation.partition("(")[0])
    if row is None:
        raise ValueError(f"one of {', '.join(ACTIVATIONS)}")
    # torch.compile traces the function itself, which it cannot do quietly through a cache.
    parse = _parsed if torch.compiler.is_compiling() else _cached
    return parse(row, activation)


def _parsed(row: Activation, activation: str) -> Resolved:
    """The row with those scalars that the call `activation` sets."""
    if not row.parameters:
        raise ValueError(f"{row.name!r} alone, which has no parameters")
    values = dict(row.parameters)
    left = set(values)
    call = _CALL.fullmatch(activation)
    for item in call[1].split(",") if call else ("",):
        setting = _SET.fullmatch(item.strip())
        if setting is None or setting[1] not in left:
            example = ", ".join(f"{name}={value}" for name, value in row.parameters.items())
            raise ValueError(
                f"{row.name!r}, or that with some of its parameters {', '.join(row.parameters)}, "
                f"each once and by name with a finite number, as {row.name + '(' + example + ')'!r}"
            )
        name, value = setting[1], float(setting[2])
        if not math.isfinite(value):
            raise ValueError(f"{row.name!r} with a finite number for {name}")
        if name in row.positive and value <= 0:
            raise ValueError(f"{row.name!r} with a {name} above 0")
        if name in row.kinks and value < 0:
            raise ValueError(f"{row.name!r} with a {name} of 0 or more")
        left.remove(name)
        values[name] = value
    return Resolved(row, tuple(values.values()))


_cached = functools.lru_cache(1024)(_parsed)
