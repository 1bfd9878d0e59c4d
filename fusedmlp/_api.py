"""Every public name of `fusedmlp`, in one place."""

from ._backend import backend
from ._explain import explain
from .ops.gated_act import gated_act
from .ops.gated_linear import gated_linear
from .ops.gated_mlp import gated_mlp
from .ops.linear_act import linear_act
from .ops.mlp import mlp

__all__ = [
    "backend",
    "explain",
    "gated_act",
    "gated_linear",
    "gated_mlp",
    "linear_act",
    "mlp",
]
