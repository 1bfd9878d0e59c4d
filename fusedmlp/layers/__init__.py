"""nn.Modules over the public functions: parameters, checks at construction, one call in forward.

Every layer runs in float32, bfloat16 and float16, returns x's dtype, compiles with fullgraph=True,
and may be built on the meta device: `layer.to_empty(device=...)`, then `layer.init_weights_()`.
"""

from .feedforward import FeedForward
from .glu import GLU, Bilinear, GeGLU, ReGLU, SwiGLU
from .pointwise import PointwiseMLP
from .transformer import GELUMLP, ReluSquaredMLP, SiLUMLP, SwiGLUMLP

__all__ = [
    "GELUMLP",
    "GLU",
    "Bilinear",
    "FeedForward",
    "GeGLU",
    "PointwiseMLP",
    "ReGLU",
    "ReluSquaredMLP",
    "SiLUMLP",
    "SwiGLU",
    "SwiGLUMLP",
]
