"""Every public name of `fusedmlp`, in one place: functions, layers, activations."""

from torch.nn import GELU, ReLU, Sigmoid, SiLU

from . import activations, layers
from .activations import *  # noqa: F403
from .backends.choice import backend
from .explaining import explain
from .hyperglu import HyperGLU, HyperGLUConfig, HyperMLP
from .layers import *  # noqa: F403
from .ops.binary_gated_linear import binary_gated_linear
from .ops.binary_gated_mlp import binary_gated_mlp
from .ops.binary_linear import binary_linear
from .ops.gated_act import gated_act
from .ops.gated_linear import gated_linear
from .ops.gated_mlp import gated_mlp
from .ops.hyper_attention import hyper_attention
from .ops.hyper_attention_step import hyper_attention_step
from .ops.linear_act import linear_act
from .ops.masked_gated_linear import masked_gated_linear
from .ops.masked_gated_mlp import masked_gated_mlp
from .ops.mlp import mlp
from .ops.moe_linear import moe_linear
from .ops.moe_mlp import moe_mlp
from .ops.top1_route import jitter, load_balancing_loss, route_to, router_z_loss, top1_route
from .patching import patch, patched, register_patch, unpatch
from .patching.quantize import quantize_model
from .patching.report import QuantizationReport
from .reference import Routing
from .weights.binary import BinaryWeight, quantize_binary
from .weights.gguf import read_gguf
from .weights.masks import PackedMasks, pack_masks

__all__ = [
    "GELU",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Routing",
    "PackedMasks",
    "BinaryWeight",
    "HyperGLU",
    "HyperGLUConfig",
    "HyperMLP",
    "QuantizationReport",
    "backend",
    "binary_gated_linear",
    "binary_gated_mlp",
    "binary_linear",
    "explain",
    "gated_act",
    "gated_linear",
    "gated_mlp",
    "hyper_attention",
    "hyper_attention_step",
    "jitter",
    "linear_act",
    "load_balancing_loss",
    "masked_gated_linear",
    "masked_gated_mlp",
    "mlp",
    "moe_linear",
    "moe_mlp",
    "pack_masks",
    "patch",
    "patched",
    "register_patch",
    "quantize_binary",
    "quantize_model",
    "read_gguf",
    "route_to",
    "router_z_loss",
    "top1_route",
    "unpatch",
]
__all__ += activations.__all__
__all__ += layers.__all__
