"""A small one of every layer of `fusedmlp.layers`, with the options that change its parameters."""

from layer_checks import Stranger
from torch import nn

from fusedmlp import layers

D = 32
GATED = {"glu_variant": "swiglu"}


def all_of_ngpt():
    return layers.NGPT(D, paper=True, scalar_alpha=True, norm_eps=0.1)


def all_of_gmlp():
    return layers.GMLP(D, 16, 4, 1, nn.RMSNorm, canonical_gate=True, gate_activation=nn.PReLU,
                       drop_path=0.5)  # fmt: skip


def all_of_a_tree():
    return layers.FastFeedForward(D, 2, 16, mult=1, has_master_leaf=True, hardening_coef=1.0,
                                  load_balancing_alpha=1.0, return_aux=True, **GATED)  # fmt: skip


def all_of_topk():
    return layers.TopKMoE(D, 16, 4, 2, activation="swiglu_oai(limit=1.0)", packed="interleaved",
                          bias=True, shared_hidden=8, shared_score=True, score="sigmoid",
                          groups=2, topk_group=1, correction=True)  # fmt: skip


# The name up to a space is that of the layer.
MAKERS = {
    "GLU": lambda: layers.GLU(D, D),
    "Bilinear": lambda: layers.Bilinear(D, D),
    "ReGLU": lambda: layers.ReGLU(D, D),
    "SwiGLU": lambda: layers.SwiGLU(D, D),
    "GeGLU": lambda: layers.GeGLU(D, D),
    "MGLU": lambda: layers.MGLU(D, D),
    "BilinearMGLU": lambda: layers.BilinearMGLU(D, D),
    "ReMGLU": lambda: layers.ReMGLU(D, D),
    "SwiMGLU": lambda: layers.SwiMGLU(D, D, mask_mode="element", num_masks=2),
    "GeMGLU": lambda: layers.GeMGLU(D, D, bias=False),
    "MaskedGLU": lambda: layers.MaskedGLU(D, D, nn.Tanh()),
    "FeedForward": lambda: layers.FeedForward(D),
    "FeedForward gated": lambda: layers.FeedForward(D, 2, 0.5, pre_norm=True, **GATED),
    "FeedForward masked": lambda: layers.FeedForward(
        D, 2, glu_variant="mswiglu", mask_mode="element"
    ),
    "FeedForward unknown": lambda: layers.FeedForward(D, 2, activation=Stranger),
    "MLP": lambda: layers.MLP(D, residual=True),
    "MLP pre": lambda: layers.MLP(D, hidden_factor=1, pre_norm=True, act_fn=nn.PReLU),
    "GatingMechanism": lambda: layers.GatingMechanism(D, bottleneck_factor=0.5),
    "ResidualWrapper": lambda: layers.ResidualWrapper(layers.FeedForward(D, 1)),
    "NGPT": lambda: layers.NGPT(D),
    "NGPT all": all_of_ngpt,
    "L2Norm": lambda: layers.L2Norm(),
    "GMLP": lambda: layers.GMLP(D, 16, seq_len=4, depth=2),
    "GMLP all": all_of_gmlp,
    "PointwiseMLP": lambda: layers.PointwiseMLP(D, "swiglu", bias=True),
    "SwiGLUMLP": lambda: layers.SwiGLUMLP(D),
    "ReluSquaredMLP": lambda: layers.ReluSquaredMLP(D),
    "GELUMLP": lambda: layers.GELUMLP(D),
    "SiLUMLP": lambda: layers.SiLUMLP(D),
    "SwitchFFN": lambda: layers.SwitchFFN(D, 2, ff_kwargs={"mult": 1, **GATED}),
    "SwitchFFN masked": lambda: layers.SwitchFFN(
        D, 2, ff_kwargs={"mult": 1, "glu_variant": "mglu"}
    ),
    "FastFeedForward": lambda: layers.FastFeedForward(D, 1, mult=1),
    "FastFeedForward all": all_of_a_tree,
    "PathWeightedFFF": lambda: layers.PathWeightedFFF(D, 1, D),
    "Top1MoE": lambda: layers.Top1MoE(D, 16, 2, shared_hidden=8),
    "TopKMoE": lambda: layers.TopKMoE(D, 16, 4, 2),
    "TopKMoE all": all_of_topk,
    "BinaryLinear": lambda: layers.BinaryLinear(D, D, True, pad=True),
    "BinaryGatedMLP": lambda: layers.BinaryGatedMLP(D, 128, clip=0.2, pad=True),
}
