"""FLOPs to the last one, and every number of a config at its least, below it and at no number."""

import dataclasses
import re

import pytest
from hyper_checks import config
from layer_checks import draw
from torch import nn

from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig


@pytest.mark.parametrize("options", (
    {}, {"use_op1": False}, {"use_op2": False}, {"use_qk_gate": False, "use_vo_gate": False},
    {"use_kv_conv": False}, {"conv_kernel_size": 1}, {"attn_kind": "relu"}, {"bias": True},
    {"aligner_kind": "identity"}, {"aligner_kind": "identity", "do_masking": False},
), ids=str)  # fmt: skip
@pytest.mark.parametrize("batch, T", [(1, 1), (3, 2), (2, 7)])
def test_flops_are_counted_one_by_one(batch, T, options):
    """Each weight once a token, and what one visible pair costs, pair by pair; to the last one."""
    layer = HyperGLU(config(**options))
    c = layer.config
    modules = [m for m in layer.modules() if isinstance(m, nn.Linear | nn.Conv1d)]
    weights = sum(m.weight.numel() for m in modules)
    mixed = [op.mix.U.shape for op in (layer.op, layer.op2) if op is not None]
    # Scores, values, and two products with the rank of each mixing, which each head has.
    pair = c.qk_width + c.vo_width + sum(2 * heads * rank for heads, _, rank in mixed)
    sees_all = c.aligner_kind == "identity" and not c.do_masking
    visible = [(t, s) for t in range(T) for s in range(T) if sees_all or s <= t]
    assert layer.flops(batch, T) == 2 * batch * (T * weights + len(visible) * pair)


# The least and, where there is one, the first value below it that is refused.
EXTREMES = {
    "n_embd": (8, 0), "n_head": (1, 0), "block_size": (1, 0), "n_layer": (1, 0), "qk_rank": (4, 0),
    "vo_rank": (2, 0), "op1_rank": (1, 0), "op2_rank": (1, 0), "chunk_T": (1, 0),
    "conv_kernel_size": (1, 0), "norm_eps": (1e-45, 0.0), "rope_base": (1e-3, 0.0),
    "op1_init_std": (0, -1e-9), "op2_init_std": (0.0, -1e-9),
}  # fmt: skip


def test_every_number_of_a_config_is_in_the_walk():
    hints = {f.name: f.type for f in dataclasses.fields(HyperGLUConfig)}
    assert {name for name, kind in hints.items() if re.search("int|float", kind)} == set(EXTREMES)


@pytest.mark.parametrize("kind", ("glu", "relu"))
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_of_a_config(name, kind):
    least, below = EXTREMES[name]
    options = {"attn_kind": kind, "use_rope": name == "rope_base", "op1_use_diag": True}
    layer = HyperGLU(config(**options, **{name: least}))
    T = min(5, layer.config.block_size)
    x = draw(2, T, layer.config.n_embd).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and all(p.isfinite().all() for p in layer.parameters())
    for bad in (below, float("nan"), float("inf"), -float("inf")):
        with pytest.raises((TypeError, ValueError), match=f"HyperGLUConfig: {name} must be"):
            config(**options, **{name: bad})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_embd": 64, "n_head": 3}, "2 n_head = 6, got n_embd // 4 = 16: give qk_rank"),
        ({"n_embd": 64, "n_head": 3, "qk_rank": 16}, "2 n_head = 6, got 16"),
        ({"n_embd": 64, "n_head": 3, "qk_rank": 12}, "n_head = 3, got n_embd = 64: give vo_rank"),
    ],
)
def test_a_derived_width_is_shown_with_its_formula(options, message):
    with pytest.raises(ValueError, match=f"must be a positive multiple of {message}$"):
        HyperGLUConfig(**options)
