"""Every public name of `fusedmlp`, in one place: functions, layers, activations.

Ops are those of the rows in `backends.op`.
"""

from typing import TYPE_CHECKING

from torch.nn import GELU, ReLU, Sigmoid, SiLU

from . import activations, layers
from .activations import *  # noqa: F403
from .backends.choice import backend
from .backends.op import OPS, public_ops
from .dry.warm import Warmup, warmup
from .explaining import explain
from .hyperglu import HyperGLU, HyperGLUConfig, HyperMLP
from .invariance import batch_invariant
from .layers import *  # noqa: F403
from .layers.parts.freezing import freeze_masks
from .ops.top1_route import jitter, load_balancing_loss, router_z_loss
from .ops.topk_route import update_router_bias
from .patching import patch, patched, register_patch, unpatch
from .patching.one_bit_lora import one_bit_lora
from .patching.quantize import quantize_model
from .patching.report import QuantizationReport
from .reference import Routing, RoutingStats
from .reference.lora import Adapter, Lora
from .weights.binary import BinaryWeight, quantize_binary
from .weights.gguf import read_gguf
from .weights.masks import PackedMasks

if TYPE_CHECKING:
    from .typed_ops import *  # noqa: F403

globals().update({name: OPS[name].function for name in public_ops()})

__all__ = [
    "GELU",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Adapter",
    "Lora",
    "Routing",
    "RoutingStats",
    "PackedMasks",
    "BinaryWeight",
    "HyperGLU",
    "HyperGLUConfig",
    "HyperMLP",
    "QuantizationReport",
    "Warmup",
    "backend",
    "batch_invariant",
    "explain",
    "freeze_masks",
    "jitter",
    "load_balancing_loss",
    "one_bit_lora",
    "patch",
    "patched",
    "register_patch",
    "quantize_binary",
    "quantize_model",
    "read_gguf",
    "router_z_loss",
    "unpatch",
    "update_router_bias",
    "warmup",
]
__all__ += activations.__all__
__all__ += layers.__all__
__all__.extend(public_ops())
