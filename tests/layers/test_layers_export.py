"""Shapes that change: torch.export with a dynamic number of tokens, and the number of compilations
over many."""

import pytest
import torch
from layer_checks import draw, one, randomise_
from layer_makers import MAKERS, D
from torch._dynamo.testing import CompileCounter

from fusedmlp import layers
from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig

WALK = {
    **{name: make for name, make in MAKERS.items() if name.split()[0] != "GMLP"},
    "Top1MoE capacity": lambda: layers.Top1MoE(D, 16, 2, capacity_factor=0.75),
    "Top1MoE sigmoid": lambda: layers.Top1MoE(D, 16, 2, score="sigmoid", scaled="input"),
    "TopKMoE capacity": lambda: layers.TopKMoE(D, 16, 4, 2, capacity_factor=0.75),
    "SwitchFFN no limit": lambda: layers.SwitchFFN(D, 2, None, ff_kwargs={"mult": 1}),
    "SwitchFFN masked no limit": lambda: layers.SwitchFFN(
        D, 2, None, ff_kwargs={"mult": 1, "glu_variant": "mglu"}
    ),
    "packed": lambda: layers.BinaryGatedMLP(D, 128, pad=True).pack(),
}


@pytest.mark.parametrize("name", WALK)
def test_exports_with_a_dynamic_number_of_tokens(name):
    layer = WALK[name]()
    if any(True for _ in layer.parameters()):
        randomise_(layer)
    layer.eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(layer, (draw(6, D),), dynamic_shapes=({0: tokens},)).module()
    for count in (2, 9, 64):
        x = draw(count, D)
        torch.testing.assert_close(one(program(x)), one(layer(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "impl, chunk, most", [("dense", 8, 1), ("chunked", 64, 1), ("chunked", 8, 2)]
)
def test_hyperglu_compiles_once_for_all_lengths(impl, chunk, most):
    """In chunks once for each number of them, and once more for what the first length fixes."""
    torch._dynamo.reset()
    count = CompileCounter()
    config = HyperGLUConfig(n_embd=16, n_head=2, block_size=64, op1_rank=2, op2_rank=2,
                            impl_default=impl, chunk_T=chunk)  # fmt: skip
    layer = HyperGLU(config).eval()
    compiled = torch.compile(layer, backend=count, dynamic=True, fullgraph=True)
    for T in (10, 11, 13, 15):  # two blocks of 8, or one
        x = draw(2, T, 16)
        torch.testing.assert_close(compiled(x), layer(x))
    assert count.frame_count <= most


def test_a_capacity_is_counted_from_a_dynamic_number_of_tokens():
    torch._dynamo.reset()
    count = CompileCounter()
    moe = layers.Top1MoE(D, 16, 2, capacity_factor=0.75).eval()
    compiled = torch.compile(moe, backend=count, dynamic=True, fullgraph=True)
    for T in (5, 8, 12, 33):
        torch.testing.assert_close(compiled(draw(T, D)), moe(draw(T, D)))
        _, routing = moe(draw(T, D), return_routing=True)
        kept = routing.offsets.diff()[:-1]
        assert kept.max() <= max(1, int(T / 2 * 0.75))
    assert count.frame_count == 1
