"""A step of decoding: the row that hyper_attention gives, from a cache, without the host."""

import pytest
import torch
from hyper_checks import core_inputs, perturbed
from layer_checks import draw
from op_checks import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp import hyper_attention_step
from fusedmlp.kernels.arch import INTERPRETER
from fusedmlp.kernels.device import multiprocessors
from fusedmlp.ops import hyper_attention_step as op
from fusedmlp.ops.hyper_attention import NAMES
from fusedmlp.testing import assert_close_to, yardsticks

SMALL = {"B": 1, "H": 1, "T": 70, "L": 75, "dq": 5, "dv": 20}


def inputs_of(t, device="cpu", gone=(), **sizes):
    """A step's arguments for token t, of the whole sequence's; `gone` left out."""
    whole = core_inputs(**sizes)
    whole = {k: x.to(device) for k, x in whole.items() if k not in gone}
    own = {k: whole[k][:, :, t] for k in ("q", "c1", "c2") if k in whole}
    return {**whole, **own, "position": torch.tensor([t], device=device)}


def check(inputs, **options):
    """By the tolerance rule; what the cache holds past the token is NaN."""
    t = inputs["position"].item()
    past = {k: inputs[k].clone() for k in ("k", "v")}
    for x in past.values():
        x[:, :, t + 1 :] = float("nan")
    with torch.no_grad():
        out = hyper_attention_step(**{**inputs, **past}, **options)
    reference = lambda t: fusedmlp.reference.hyper_attention_step(**t, **options)  # noqa: E731
    assert_close_to(out, *yardsticks(reference, inputs)["out"])
    return out


@pytest.mark.parametrize("t", (0, 5, 12))
@pytest.mark.parametrize("kind, norm", (("glu", "out_scale"), ("relu", "l2"), ("glu", "none")))
def test_the_reference_is_a_row_of_the_forward(kind, norm, t):
    whole = core_inputs(T=13, L=17, kind=kind)
    row = fusedmlp.reference.hyper_attention(**whole, kind=kind, norm=norm)[:, :, t]
    step = inputs_of(t, T=13, L=17, kind=kind)
    out = hyper_attention_step(**step, kind=kind, norm=norm)
    torch.testing.assert_close(out, row)


@pytest.mark.parametrize("t", (0, 31, 32, 69))
def test_kernels_at_every_edge_of_a_part(t, device, on_triton):
    check(inputs_of(t, device, **SMALL, dtype=torch.float32))


CALLS = [
    ("relu", "l2", torch.float16, (), {"shortcut1": False}),
    ("glu", "none", torch.bfloat16, ("d1", "d2"), {"shortcut2": False}),
    ("glu", "l2", torch.float32, ("c1", "u1", "vt1", "d1"), {}),
    ("relu", "out_scale", torch.float32, ("c2", "u2", "vt2", "d2"), {}),
    ("glu", "out_scale", torch.bfloat16, (), {}),
]


@pytest.mark.parametrize("kind, norm, dtype, gone, options", CALLS, ids=str)
def test_kinds_norms_dtypes_and_switches(kind, norm, dtype, gone, options, device, on_triton):
    """Two heads, widths and ranks beyond one block."""
    sizes = {"B": 1, "H": 2, "T": 35, "L": 35, "dq": 18, "dv": 9, "r1": 17}
    inputs = inputs_of(34, device, gone, **sizes, kind=kind, dtype=dtype)
    check(inputs, kind=kind, norm=norm, **options)


def test_batches_strides_and_leading_dimensions(device, on_triton):
    """Two sequences as caches of tokens first; without a batch the same bits."""
    inputs = inputs_of(20, device, B=2, H=1, T=33, L=40, dtype=torch.float32)
    for name in ("k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["u1"] = inputs["u1"].mT.contiguous().mT
    out = check(inputs)
    one = {k: t[1] if k in ("q", "k", "v", "c1", "c2") else t for k, t in inputs.items()}
    with torch.no_grad():
        assert torch.equal(hyper_attention_step(**one), hyper_attention_step(**inputs)[1])
    torch.testing.assert_close(out[1], hyper_attention_step(**one))


def test_zeros_large_values_and_nan(device, on_triton):
    inputs = inputs_of(8, device, **{**SMALL, "T": 9}, dtype=torch.float32)
    assert not check({**inputs, "q": torch.zeros_like(inputs["q"])}).any()
    check({**inputs, **{k: 90 * inputs[k].sign() for k in "qk"}})
    check(inputs, eps=10.0)
    for bad in (float("nan"), float("inf")):
        k = inputs["k"].clone()
        k[:, :, 3] = bad
        assert not hyper_attention_step(**{**inputs, "k": k}).isfinite().all()


def test_runs_are_bit_equal_and_empty_ones_empty(device, on_triton):
    inputs = inputs_of(69, device, **SMALL, dtype=torch.bfloat16)
    assert torch.equal(hyper_attention_step(**inputs), hyper_attention_step(**inputs))
    none = {k: t[:0] if k in ("q", "k", "v", "c1", "c2") else t for k, t in inputs.items()}
    assert hyper_attention_step(**none).shape == (0, 1, 20)


def test_a_part_left_out_is_seen(device, on_triton, monkeypatch):
    """A step that sees one token fewer fails the rule."""
    inputs = inputs_of(32, device, **SMALL, dtype=torch.float32)
    step = op.step
    monkeypatch.setattr(op, "step", lambda q, k, v, p, *a: step(q, k, v, p - 1, *a))
    with pytest.raises(AssertionError, match="max error"):
        check(inputs)


@pytest.mark.interpreter
def test_parts_are_several_here():
    """Or these tests would not show how their shares are summed."""
    from fusedmlp.kernels.hyper.hyper_attention_step import _plan
    from fusedmlp.kernels.pick import hyper_tile

    inputs = inputs_of(69, **SMALL, dtype=torch.float32)
    assert multiprocessors(inputs["q"].device) == 3 and INTERPRETER
    tile = hyper_tile("hyper_attention_step", inputs["q"])
    plan, chunk, parts = _plan(inputs["q"], inputs["v"], tile, (3, 2), (True, True), True)
    assert (chunk, parts, plan.parts) == (32, 3, 4)


class NoHost(TorchDispatchMode):
    """Fails where a value would go to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "the host reads the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", ({}, {"attn_kind": "relu", "use_rope": True}), ids=str)
def test_a_layers_step_on_the_kernels(options, device, on_triton):
    """Equal to the full forward, by the kernels, without a look at the device."""
    layer = perturbed(dtype=torch.float32, std=0.1, **options).to(device)
    x = draw(2, 12, 24, device=device)
    with torch.no_grad(), fusedmlp.backend("reference"):
        expected = layer(x)
        _, cache = layer.prefill(x[:, :10])
    calls = []
    step = op.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "step", lambda *a: calls.append(a) or step(*a))
        for t in (10, 11):
            with NoHost():
                y, cache = layer.step(x[:, t], cache)
            torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_a_cache_of_another_dtype_is_refused():
    layer = perturbed(dtype=torch.float32)
    cache = layer.init_cache(1, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="cache must hold torch.float32, .* got torch.bfloat16"):
        layer.step(draw(1, 24), cache)
    with torch.autocast("cpu", torch.bfloat16):
        cache = layer.init_cache(1)
        y, _ = layer.step(draw(1, 24), cache)
    assert y.dtype == cache.k.dtype == torch.bfloat16


def test_compiles_to_one_graph(device, each_backend):
    inputs = inputs_of(4, device, **{**SMALL, "T": 6}, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(hyper_attention_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), hyper_attention_step(**inputs))
        with torch.autocast(device, torch.bfloat16):
            assert hyper_attention_step(**inputs).dtype == torch.bfloat16


@pytest.mark.interpreter
def test_opcheck():
    inputs = inputs_of(4, **{**SMALL, "T": 6}, dtype=torch.float32)
    tensors = [inputs[name] for name in NAMES]
    arguments = (*tensors[:3], inputs["position"], *tensors[3:], True, True, True, 1e-12)
    opcheck(op.step, arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_gradient_of_the_kernels(device, on_triton):
    inputs = inputs_of(4, device, **{**SMALL, "T": 6}, dtype=torch.float32)
    inputs["u1"] = inputs["u1"].requires_grad_()
    with pytest.raises(RuntimeError, match="hyper_attention_step: the kernels have no gradient"):
        hyper_attention_step(**inputs)
    with fusedmlp.backend("reference"):
        hyper_attention_step(**inputs).sum().backward()
    assert inputs["u1"].grad.any()


GOOD = inputs_of(2, B=1, H=2, T=3, L=4, dtype=torch.float32)
BAD = [
    ("q", torch.ones(3), ValueError, r"q must be \(\.\.\., Q, dq\), got \(3,\)"),
    ("q", torch.ones(1, 3, 3), ValueError, r"k must be \(1, 3\) \+ \(N, 3\), got \(1, 4, 3, 3\)"),
    ("q", [1.0], TypeError, "q must be a Tensor, got list"),
    ("k", torch.ones(1, 4, 3, 2), ValueError, r"k must be \(1, 4\) \+ \(N, 3\)"),
    ("v", torch.ones(1, 2, 2, 4), ValueError, r"v must be \(1, 2, 3\) \+ \(dv,\)"),
    ("v", torch.ones(1, 2, 3, 4).double(), TypeError, "v must have q's dtype"),
    ("position", 2, TypeError, "position must be an int64 Tensor, got int"),
    ("position", torch.tensor([2.0]), TypeError, "position must be an int64 Tensor, got torch.fl"),
    ("position", torch.tensor([2]).to("meta"), ValueError, "position must be on q's device cpu"),
    ("position", torch.tensor(2), ValueError, r"position must have shape \(1,\), got \(\)"),
    ("c1", torch.ones(1, 4, 9), ValueError, r"c1 must have shape \(1, 4, 3\)"),
    ("u2", None, ValueError, "u2 and vt2 must be tensors with c2"),
    ("u1", torch.ones(4, 2, 3), ValueError, r"u1 must be \(4, L, r\) with L >= N = 3"),
    ("kind", "gelu", ValueError, "kind must be 'glu' or 'relu', got 'gelu'"),
]


@pytest.mark.parametrize("name, value, error, message", BAD, ids=lambda b: str(b)[:30])
def test_one_clear_error(name, value, error, message, each_backend):
    with pytest.raises(error, match=message) as caught:
        hyper_attention_step(**{**GOOD, name: value})
    assert str(caught.value).startswith("hyper_attention_step: ")


@pytest.mark.gpu
def test_one_cuda_graph_serves_every_step():
    layer = perturbed(dtype=torch.bfloat16, std=0.1).cuda()
    x = draw(2, 12, 24, dtype=torch.bfloat16, device="cuda")
    token, cache = x[:, 0].clone(), layer.init_cache(2)
    for _ in range(2):
        layer.step(token, layer.init_cache(2))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = layer.step(token, cache)
    for t in (cache.x, cache.k, cache.v, cache.length):
        t.zero_()
    plain = layer.init_cache(2)
    for t in range(12):
        token.copy_(x[:, t])
        graph.replay()
        assert torch.equal(y, layer.step(x[:, t], plain)[0])
    assert cache.length.item() == 12
