"""The mathematics of the library in plain PyTorch: what every kernel is judged by.
One file a family.

Any floating dtype, any device, any leading dimensions; gradients are autograd's own.
"""

from .dense import Packed, gated_act, gated_linear, gated_mlp, halves, linear_act, mlp

__all__ = ["Packed", "gated_act", "gated_linear", "gated_mlp", "halves", "linear_act", "mlp"]
