"""The table of all activations: a name, its formula in PyTorch, the modules that compute it.

A row here and a device function of its name in kernels/activations.py are all it takes: functions
and layers accept the name, patch() finds what computes it, error messages list it, and the tests,
the ahead-of-time gate and the bench run it. A functor in csrc/activations.cuh is optional: without
one the CUDA kernels refuse the activation and Triton serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

Kind = TypeVar("Kind", bound=type[nn.Module])
BSILU_ALPHA = 1.67  # SUGAR's B-SiLU, arXiv 2505.22074: (x + a) sigmoid(x) - a / 2


@dataclass(frozen=True)
class Activation:
    """One activation: `reference` is its formula in PyTorch, for any floating dtype.

    `kink`: its slope jumps at 0, so an input within rounding of 0 has no single right gradient.
    `modules`: the classes that compute it, where a module has the attributes `settings`; those of
    fusedmlp.activations, which are made of the rows, say it themselves by `@computes(name)`.
    """

    name: str
    reference: Callable[[Tensor], Tensor]
    kink: bool = False
    modules: tuple[type[nn.Module], ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    def is_set_in(self, module: nn.Module) -> bool:
        """Whether `module` has the attributes `settings`."""
        # No all(), whose generator costs more than the rest: this runs in every forward.
        for name, value in self.settings.items():  # noqa: SIM110
            if getattr(module, name, None) != value:
                return False
        return True


def bsilu(x: Tensor, alpha: float = BSILU_ALPHA) -> Tensor:
    """(x + alpha) sigmoid(x) - alpha / 2, rearranged: in 16 bits, too, it is 0 at 0."""
    s = x.sigmoid()
    return x * s + alpha * (s - 0.5)


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
        Activation("relu", F.relu, kink=True, modules=(nn.ReLU,)),
        Activation("relu_sq", lambda x: F.relu(x).square()),
        Activation("sigmoid", lambda x: x.sigmoid(), modules=(nn.Sigmoid,)),
        Activation("tanh", lambda x: x.tanh(), modules=(nn.Tanh,)),
        Activation("identity", lambda x: x, modules=(nn.Identity,)),
        Activation("gelu2", lambda x: F.gelu(x).square()),
        Activation("bsilu", bsilu, settings={"alpha": BSILU_ALPHA}),
        Activation("mish", F.mish, modules=(nn.Mish,)),
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
