"""The mathematics of the library in plain PyTorch: what every kernel is judged by.
One file a family.

Any floating dtype, any device, any leading dimensions; gradients are autograd's own.
"""

from .binary import (
    binary_gated_linear,
    binary_gated_mlp,
    binary_linear,
    dequantize_binary,
    unpack_signs,
)
from .dense import gated_act, gated_linear, gated_mlp, linear_act, mlp
from .hyper import hyper_attention, hyper_attention_step
from .masked import masked_gated_linear, masked_gated_mlp, pack_masks, unpack_masks
from .moe import (
    Routing,
    load_balancing_loss,
    moe_linear,
    moe_mlp,
    route_to,
    router_z_loss,
    top1_route,
    tree_path,
)

__all__ = [
    "Routing",
    "binary_gated_linear",
    "binary_gated_mlp",
    "binary_linear",
    "dequantize_binary",
    "gated_act",
    "gated_linear",
    "gated_mlp",
    "hyper_attention",
    "hyper_attention_step",
    "linear_act",
    "load_balancing_loss",
    "masked_gated_linear",
    "masked_gated_mlp",
    "mlp",
    "moe_linear",
    "moe_mlp",
    "pack_masks",
    "route_to",
    "router_z_loss",
    "top1_route",
    "tree_path",
    "unpack_masks",
    "unpack_signs",
]
