"""nn.Modules over the public functions: parameters, checks at construction, one call in forward.

Every layer runs in float32, bfloat16 and float16, returns x's dtype, compiles with fullgraph=True,
and may be built on the meta device: `layer.to_empty(device=...)`, then `layer.init_weights_()`.
"""

from .feedforward import FeedForward
from .fff import FastFeedForward, PathWeightedFFF
from .glu import GLU, Bilinear, GeGLU, ReGLU, SwiGLU
from .moe import Top1MoE
from .pointwise import PointwiseMLP
from .switch import SwitchFFN
from .transformer import GELUMLP, ReluSquaredMLP, SiLUMLP, SwiGLUMLP

__all__ = [
    "GELUMLP",
    "GLU",
    "Bilinear",
    "FastFeedForward",
    "FeedForward",
    "GeGLU",
    "PathWeightedFFF",
    "PointwiseMLP",
    "ReGLU",
    "ReluSquaredMLP",
    "SiLUMLP",
    "SwiGLU",
    "SwiGLUMLP",
    "SwitchFFN",
    "Top1MoE",
]
