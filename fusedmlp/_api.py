"""Every public name of `fusedmlp`, in one place: functions, layers, activations."""

from torch.nn import GELU, ReLU, Sigmoid, SiLU

from . import activations, layers
from ._backend import backend
from ._explain import explain
from .activations import *  # noqa: F403
from .layers import *  # noqa: F403
from .ops.gated_act import gated_act
from .ops.gated_linear import gated_linear
from .ops.gated_mlp import gated_mlp
from .ops.linear_act import linear_act
from .ops.mlp import mlp

__all__ = [
    "GELU",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "backend",
    "explain",
    "gated_act",
    "gated_linear",
    "gated_mlp",
    "linear_act",
    "mlp",
]
__all__ += activations.__all__
__all__ += layers.__all__
