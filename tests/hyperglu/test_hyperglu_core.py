"""HyperGLU's core in PyTorch: the reference and the chunked path against loops; positions."""

import itertools
import math

import pytest
import torch
from hyper_checks import by_loops, core_inputs
from layer_checks import draw
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp.hyperglu.chunked import chunked_attention
from fusedmlp.hyperglu.parts import CausalConv
from fusedmlp.hyperglu.rope import rope

KINDS = ("glu", "relu")


class Widths(TorchDispatchMode):
    """How many elements the gates have."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.relu.default:
            self.elements += out.numel()
        return out


def without(inputs, mixing, diag):
    """`inputs` without a mixing's diagonal, or without the mixing."""
    gone = () if mixing and diag else ("d",) if mixing else ("c", "u", "vt", "d")
    return lambda n: {**inputs, **{f"{name}{n}": None for name in gone}}


@pytest.mark.parametrize("aligner", ("offset", "identity"))
@pytest.mark.parametrize("mixing, masks, less", [
    (True, True, True), (False, True, True), (False, False, True), (True, False, False),
])  # fmt: skip
def test_blocks_look_no_further_than_they_must(mixing, masks, less, aligner):
    """Without mixings or with masked ones, a block needs no column behind its last row."""
    inputs = core_inputs(B=1, T=8, L=8, kind="glu")
    if not mixing:
        inputs |= dict.fromkeys(f"{name}{n}" for name in ("c", "u", "vt", "d") for n in (1, 2))
    shared = {"kind": "glu", "norm": "none", "aligner": aligner, "eps": 1e-12, "causal": True,
              "mask1": masks, "mask2": masks, "shortcut1": True, "shortcut2": True}  # fmt: skip
    seen = []
    for chunk in (2, 8):
        with Widths() as widths:
            chunked_attention(**inputs, **shared, chunk=chunk)
        seen.append(widths.elements)
    assert (seen[0] < seen[1]) == less


@pytest.mark.parametrize("aligner", ("offset", "identity"))
@pytest.mark.parametrize("norm", ("out_scale", "l2", "none"))
@pytest.mark.parametrize("kind", KINDS)
def test_core_is_its_loops(kind, norm, aligner):
    """Reference and chunked path against loops over rows and slots, at T < L."""
    plain = core_inputs(B=1, T=4, L=7, kind=kind)
    shared = {"kind": kind, "norm": norm, "aligner": aligner, "eps": 1e-12}
    for causal, mask1, mask2 in itertools.product((True, False), repeat=3):
        for mixing, diag, shortcut in ((1, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1)):
            for n in (1, 2):
                inputs = without(plain, mixing, diag)(n)
                options = {**shared, "causal": causal, "mask1": mask1, "mask2": mask2,
                           f"shortcut{n}": bool(shortcut), f"shortcut{3 - n}": True}  # fmt: skip
                expected = by_loops(**inputs, **options)
                for out in (
                    fusedmlp.reference.hyper_attention(**inputs, **options),
                    chunked_attention(**inputs, chunk=2, **options),
                    chunked_attention(**inputs, chunk=None, **options),
                ):
                    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("aligner", ("offset", "identity"))
@pytest.mark.parametrize("kind", KINDS)
def test_reference_passes_gradcheck(kind, aligner):
    inputs = core_inputs(B=1, H=1, T=4, L=6, kind=kind)
    leaves = [t.requires_grad_() for t in inputs.values()]
    options = {"kind": kind, "aligner": aligner, "norm": "l2" if kind == "glu" else "out_scale"}
    assert torch.autograd.gradcheck(
        lambda *t: fusedmlp.reference.hyper_attention(*t, **options), leaves
    )


@pytest.mark.parametrize("chunk", (1, 4, 7, None))
def test_chunked_gradients_are_the_references(chunk):
    inputs = core_inputs(T=13, L=20)
    leaves = [t.requires_grad_() for t in inputs.values()]
    options = {"kind": "glu", "norm": "out_scale", "aligner": "offset", "causal": True,
               "shortcut1": True, "shortcut2": True, "mask1": True, "mask2": True,
               "eps": 1e-12}  # fmt: skip
    exact = fusedmlp.reference.hyper_attention(*leaves, **options)
    ours = chunked_attention(*leaves, chunk=chunk, **options)
    torch.testing.assert_close(ours, exact)
    dy = torch.randn_like(exact)
    expected = torch.autograd.grad(exact, leaves, dy)
    for name, a, b in zip(inputs, torch.autograd.grad(ours, leaves, dy), expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_a_convolution_of_the_past_alone_has_no_rows():
    """One of K taps has K - 1 rows of the past in front."""
    for K in (1, 2, 4):
        assert CausalConv(6, K)(torch.zeros(3, K - 1, 6)).shape == (3, 0, 6)


def test_rope():
    q = draw(1, 6, 8, dtype=torch.float64)
    turned = rope(q, 100.0, "rotary")
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    same = rope(q[:, :1].expand(1, 6, 8), 100.0, "rotary")
    scores = (same @ same.mT)[0]
    torch.testing.assert_close(scores[2, 1], scores[4, 3])  # a function of the distance
    with torch.device("meta"):  # the default, which is not asked
        published = rope(q, 100.0, "official")
    for t, i in itertools.product(range(6), range(4)):
        a, b = (2 * i) % 4, (2 * i + 1) % 4
        fa, fb = (t * 100.0 ** (-2 * f / 8) for f in (a, b))
        even, odd = q[0, t, 2 * i].item(), q[0, t, 2 * i + 1].item()
        expected = (even * math.cos(fa) - odd * math.sin(fa),
                    odd * math.cos(fb) + even * math.sin(fb))  # fmt: skip
        assert published[0, t, 2 * i : 2 * i + 2].tolist() == pytest.approx(expected)
    assert not torch.allclose(published.norm(dim=-1), q.norm(dim=-1))
