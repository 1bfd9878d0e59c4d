"""nn.Modules over the public functions: parameters, checks at construction, one call in forward.

Every layer runs in float32, bfloat16 and float16, returns x's dtype, compiles with fullgraph=True,
and may be built on the meta device: `layer.to_empty(device=...)`, then `layer.init_weights_()`.
"""

from .binary import BinaryGatedMLP, BinaryLinear
from .feedforward import FeedForward
from .fff import FastFeedForward, PathWeightedFFF
from .gating import GatingMechanism
from .glu import GLU, Bilinear, GeGLU, ReGLU, SwiGLU
from .gmlp import GMLP
from .masked_glu import MGLU, BilinearMGLU, GeMGLU, MaskedGLU, ReMGLU, SwiMGLU
from .mlp import MLP
from .moe import Top1MoE, TopKMoE
from .ngpt import NGPT, L2Norm
from .pointwise import PointwiseMLP
from .residual import ResidualWrapper
from .switch import SwitchFFN
from .transformer import GELUMLP, ReluSquaredMLP, SiLUMLP, SwiGLUMLP

__all__ = [
    "GELUMLP",
    "GLU",
    "Bilinear",
    "BinaryGatedMLP",
    "BinaryLinear",
    "BilinearMGLU",
    "FastFeedForward",
    "GMLP",
    "MGLU",
    "MLP",
    "NGPT",
    "FeedForward",
    "GatingMechanism",
    "GeGLU",
    "GeMGLU",
    "L2Norm",
    "MaskedGLU",
    "PathWeightedFFF",
    "PointwiseMLP",
    "ReGLU",
    "ReMGLU",
    "ReluSquaredMLP",
    "ResidualWrapper",
    "SiLUMLP",
    "SwiGLU",
    "SwiGLUMLP",
    "SwiMGLU",
    "SwitchFFN",
    "Top1MoE",
    "TopKMoE",
]
