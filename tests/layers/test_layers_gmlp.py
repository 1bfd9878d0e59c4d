"""gMLP against plain PyTorch: blocks, the gate along the sequence, options, counts, messages."""

import functools

import pytest
import torch
import torch.nn.functional as F
from layer_checks import (
    DTYPES,
    assert_initialises_from_meta,
    assert_matches,
    assert_round_trips,
    draw,
    randomise_,
)
from torch import nn

import fusedmlp
from fusedmlp.layers import GMLP
from fusedmlp.layers.gmlp import GMLPBlock, SpatialGatingUnit

N, D, FF = 6, 8, 12


def block(p, prefix, x, canonical=False, gate_activation=lambda g: g):
    u, v = F.linear(x, p[f"{prefix}proj_in.weight"], p[f"{prefix}proj_in.bias"]).chunk(2, -1)
    sgu = f"{prefix}sgu."
    normed = F.layer_norm(v, v.shape[-1:], p[f"{sgu}norm.weight"], p[f"{sgu}norm.bias"])
    along = F.linear(normed.mT, p[f"{sgu}proj.weight"], p[f"{sgu}proj.bias"]).mT
    gate = gate_activation(along)
    v = gate if canonical else v * gate
    return F.linear(F.gelu(u) * v, p[f"{prefix}proj_out.weight"], p[f"{prefix}proj_out.bias"])


def gmlp(depth, **options):
    def formula(p, x):
        for i in range(depth):
            norm = p[f"blocks.{i}.0.weight"], p[f"blocks.{i}.0.bias"]
            x = x + block(p, f"blocks.{i}.1.", F.layer_norm(x, x.shape[-1:], *norm), **options)
        return x

    return formula


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_formula(dtype):
    layer = randomise_(GMLP(D, FF, N, depth=2)).to(dtype)
    assert_matches(layer, gmlp(2), draw(3, N, D, dtype=dtype))


@pytest.mark.parametrize("canonical", (False, True))
def test_options_match_formula(canonical):
    layer = GMLP(D, FF, N, depth=2, canonical_gate=canonical, gate_activation=nn.Tanh)
    formula = gmlp(2, canonical=canonical, gate_activation=torch.tanh)
    assert_matches(randomise_(layer), formula, draw(3, N, D))


@pytest.mark.parametrize("canonical", (False, True))
def test_runs_on_each_backend(canonical, each_backend, device):
    layer = randomise_(GMLPBlock(D, FF, N, canonical_gate=canonical)).to(device)
    formula = functools.partial(block, prefix="", canonical=canonical)
    assert_matches(layer, lambda p, x: formula(p, x=x), draw(3, N, D, device=device))


def test_gelu_and_product_are_one_fused_call(device):
    with fusedmlp.backend("triton"):
        y = GMLPBlock(D, FF, N).to(device)(draw(3, N, D, device=device))
    names, queue = [], [y.grad_fn]
    while queue:
        node = queue.pop()
        names.append(node.name())
        queue += [parent for parent, _ in node.next_functions if parent is not None]
    assert any("GatedActFunction" in name for name in names)
    assert not any("Gelu" in name for name in names)


def test_tokens_do_not_mix_at_the_start():
    x = draw(2, N, D)
    other = x.clone()
    other[:, 3] = -other[:, 3]
    fresh = GMLP(D, FF, N, depth=2)
    moved = (fresh(other) - fresh(x)).abs().sum(-1) > 0
    assert moved[:, 3].all() and moved.sum() == 2
    trained = randomise_(GMLP(D, FF, N, depth=2))
    assert ((trained(other) - trained(x)).abs().sum(-1) > 0).all()


def test_initial_gate():
    sgu = SpatialGatingUnit(FF, N)
    assert not sgu.proj.weight.any() and sgu.proj.bias.eq(1).all()
    x = draw(2, N, FF)
    assert torch.equal(sgu(x=x), x)
    assert torch.equal(SpatialGatingUnit(FF, N, canonical_gate=True)(x), torch.ones_like(x))


@pytest.mark.parametrize("norm, count", [(nn.LayerNorm, 218_112), (nn.RMSNorm, 216_832)])
def test_counts(norm, count):
    layer = GMLP(64, 256, 64, 4, norm_layer=norm)
    assert sum(p.numel() for p in layer.parameters()) == count
    same = GMLP(dim=64, seq_len=64, depth=4, norm_layer=norm)
    assert sum(p.numel() for p in same.parameters()) == count


def test_structure():
    layer = GMLP(D, FF, N, depth=2)
    assert len(layer.blocks) == 2
    assert [type(m) for m in layer.blocks[0]] == [nn.LayerNorm, GMLPBlock]
    assert [k for k in layer.state_dict() if k.startswith("blocks.1.1.")] == [
        f"blocks.1.1.{name}.{kind}"
        for name in ("proj_in", "sgu.norm", "sgu.proj", "proj_out")
        for kind in ("weight", "bias")
    ]


def test_drop_path():
    layer = randomise_(GMLP(D, FF, N, depth=1, drop_path=0.25))
    x = draw(2000, N, D)
    branch = layer.eval()(x) - x
    torch.manual_seed(0)
    taken = layer.train()(x) - x
    kept = taken.flatten(1).abs().sum(1) > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(taken[kept], branch[kept] / 0.75, atol=1e-4, rtol=1e-4)
    plain = randomise_(GMLP(D, FF, N, depth=1))
    assert torch.equal(plain(x), layer.eval()(x))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dim": 0}, ValueError, "GMLP: dim must be at least 1, got 0"),
        ({"dim_ff": 0}, ValueError, "GMLP: dim_ff must be at least 1, got 0"),
        ({"seq_len": None}, TypeError, "GMLP: seq_len must be an int, got None"),
        ({"depth": None}, TypeError, "GMLP: depth must be an int, got None"),
        ({"drop_path": 1.0}, ValueError, r"GMLP: drop_path must be in \[0.0,1.0\), got 1.0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GMLP(**{"dim": D, "seq_len": N, "depth": 1, **arguments})


@pytest.mark.parametrize("shape", [(2, N + 1, D), (2, N, D + 1), (N, D), (2, 2, N, D)])
def test_bad_shapes(shape):
    layer = GMLP(D, FF, N, depth=1)
    with pytest.raises(ValueError, match=r"GMLP: x must be \(B, 6, 8\).* got") as error:
        layer(draw(*shape))
    assert str(shape) in str(error.value)


MAKERS = {
    "default": functools.partial(GMLP, 16, 64, 16, 2),
    "options": functools.partial(
        GMLP,
        16,
        64,
        16,
        1,
        nn.RMSNorm,
        canonical_gate=True,
        gate_activation=nn.PReLU,
        drop_path=0.5,
    ),
    "unit": functools.partial(SpatialGatingUnit, 16, 16),
    "block": functools.partial(GMLPBlock, 16, 64, 16),
}


@pytest.mark.parametrize("name", MAKERS)
def test_round_trips(name):
    assert_round_trips(randomise_(MAKERS[name]()), MAKERS[name](), draw(3, 16, 16))


@pytest.mark.parametrize("name", MAKERS)
def test_initialises_from_meta(name):
    assert_initialises_from_meta(MAKERS[name])


def test_autocast():
    layer = randomise_(GMLP(16, 64, 16, 2))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(draw(3, 16, 16))
    y.sum().backward()
    assert y.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_empty_batch():
    assert GMLP(D, FF, N, depth=1)(draw(0, N, D)).shape == (0, N, D)


def test_documented_example():
    from fusedmlp.layers.gmlp import GMLP

    gmlp = GMLP(
        dim=256,
        seq_len=64,
        depth=6,
    )
    x = draw(2, 64, 256)
    assert gmlp(x).shape == x.shape
    assert gmlp.blocks[0][1].proj_out.in_features == 1024


@pytest.mark.parametrize("bias", ({}, {"bias": True}, {"bias": False}), ids=str)
def test_biases_of_the_projections(bias):
    for layer in (GMLPBlock(D, FF, N, **bias), GMLP(D, FF, N, 2, **bias)):
        names = {name for name, _ in layer.named_parameters()}
        for weight in [name for name in names if name.endswith(("in.weight", "out.weight"))]:
            assert (weight.replace("weight", "bias") in names) == bias.get("bias", True), weight
