"""HyperGLU's calls: which path they take and say they take, published keywords, empty and bad
input."""

import pytest
import torch
from hyper_checks import config, perturbed
from layer_checks import draw

import fusedmlp
from fusedmlp.hyperglu import HyperGLU
from fusedmlp.ops import hyper_attention as op

DOUBLE = {"dtype": torch.float64}


def test_fused_runs_the_kernels_or_raises(device, monkeypatch):
    layer = perturbed(dtype=torch.float32, std=0.1, impl_default="fused", use_op2=False)
    layer = layer.to(device)
    x = draw(1, 5, 24, device=device)
    calls, original = [], op.fwd
    monkeypatch.setattr(op, "fwd", lambda *a: calls.append(a) or original(*a))
    with fusedmlp.backend("triton"), torch.no_grad():
        y, cache = layer.prefill(x)
        assert len(calls) == 1
        assert "(HyperGLU): fused, hyper_attention by triton" in fusedmlp.explain(layer)
    with fusedmlp.backend("reference"):
        torch.testing.assert_close(y, layer(x, impl="dense"), rtol=1e-4, atol=1e-4)
        message = "must not be 'fused' where no kernel runs: .*; 'chunked' runs in PyTorch"
        for call in (
            lambda: layer(x),
            lambda: layer.prefill(x),
            lambda: layer.step(x[:, 0], cache),
            lambda: perturbed(dtype=torch.float32).to(device)(x, impl="fused"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
        assert cache.length.item() == 5
        assert "(HyperGLU): none: HyperGLU: impl_default, or impl" in fusedmlp.explain(layer)
        y = layer(torch.cat((x, x[:, :1]), 1), impl="dense")[:, -1]
    with fusedmlp.backend("triton"):
        torch.testing.assert_close(layer.step(x[:, 0], cache)[0], y, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
def test_on_the_cpu_fused_raises_by_itself():
    layer = perturbed(dtype=torch.float32, impl_default="fused")
    with pytest.raises(RuntimeError, match="on cpu tensors with backend 'auto'"):
        layer(draw(1, 5, 24))


def test_each_path_says_so(device):
    def told(**options):
        return fusedmlp.explain(perturbed(dtype=torch.float32, **options).to(device))

    line = "the layer (HyperGLU): "
    for backend in ("reference", "triton"):
        with fusedmlp.backend(backend):
            assert f"{line}dense, in PyTorch: impl_default='dense'" in told(impl_default="dense")
            rare = f"{line}chunked, in PyTorch: no kernel has aligner_kind='identity'"
            assert rare in told(aligner_kind="identity")
    with fusedmlp.backend("reference"):
        assert f"{line}chunked, in PyTorch: no kernel runs on {device} tensors" in told()
    with fusedmlp.backend("triton"):
        assert f"{line}fused, hyper_attention by triton" in told()
        wide = fusedmlp.explain(perturbed())
        assert f"{line}none: hyper_attention: q must be bfloat16" in wide


def test_what_the_kernels_do_not_serve_goes_in_blocks(device):
    layer = perturbed(dtype=torch.float32, aligner_kind="identity").to(device)
    x = draw(1, 5, 24, device=device)
    with fusedmlp.backend("triton"):
        y = layer(x)
    with fusedmlp.backend("reference"):
        torch.testing.assert_close(y, layer(x))


@torch.no_grad()
def test_published_keywords():
    """impl and chunk_T of one call, in place of the configuration's."""
    layer, x = perturbed(), draw(1, 19, 24, **DOUBLE)
    seen = []
    made = fusedmlp.hyperglu.layer.chunked_attention
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda *a, **k: seen.append(k["chunk"]) or made(*a, **k)  # noqa: E731
        patch.setattr(fusedmlp.hyperglu.layer, "chunked_attention", spy)
        results = [
            layer(x),
            layer(x, impl=None, chunk_T=None, attention_mask=None),
            layer(x, chunk_T=5),
            layer(x, chunk_T=1),
            layer(x, impl="dense"),
            perturbed(impl_default="dense")(x, impl="chunked", chunk_T=7),
        ]
    assert seen == [8, 8, 5, 1, None, 7]
    for y in results[1:]:
        torch.testing.assert_close(y, results[0])
    for options, error, message in (
        ({"impl": "naive"}, ValueError, "impl must be one of dense, chunked, fused, got 'naive'"),
        ({"chunk_T": 0}, ValueError, "chunk_T must be at least 1, got 0"),
        ({"chunk_T": 2.0}, TypeError, "chunk_T must be int or None, got 2.0"),
        ({"chunk_T": True}, TypeError, "chunk_T must be int or None, got True"),
    ):
        with pytest.raises(error, match=f"^HyperGLU: {message}"):
            layer(x, **options)
    with pytest.raises(ValueError, match="impl must not be 'fused' with aligner_kind='identity'"):
        perturbed(aligner_kind="identity")(x, impl="fused")


def test_published_attributes():
    layer = perturbed()
    assert layer.cfg is layer.config
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.reset_parameters()
    changed = {name for name, t in layer.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"op.mix.U", "op.mix.Vt", "op2.mix.U", "op2.mix.Vt"}
    HyperGLU(config(use_op1=False, use_op2=False)).reset_parameters()


@pytest.mark.parametrize("options", ({}, {"use_kv_conv": False}, {"conv_kernel_size": 1}), ids=str)
@torch.no_grad()
def test_no_tokens(options):
    layer = perturbed(**options)
    x = draw(2, 9, 24, **DOUBLE)
    y = layer(x[:, :0])
    assert y.shape == (2, 0, 24)
    y, cache = layer.prefill(x[:, :0])
    assert y.shape == (2, 0, 24) and not cache.length.any()
    torch.testing.assert_close(layer.step(x[:, 0], cache)[0], layer(x)[:, 0])
    assert layer(x[:0]).shape == (0, 9, 24)


X = torch.zeros(1, 9, 24)
BAD = [
    ({"x": torch.zeros(1, 41, 24)}, ValueError, "T must be at most block_size = 40, got 41"),
    ({"x": torch.zeros(9, 24)}, ValueError, r"x must be \(B, T, 24\), got \(9, 24\)"),
    ({"x": torch.zeros(1, 9, 25)}, ValueError, r"x must .* 24, got shape \(1, 9, 25\)"),
    ({"x": X.bfloat16()}, TypeError, "x must be torch.float32, got torch.bfloat16"),
    ({"x": X.int()}, TypeError, "x must be torch.float32, got torch.int32"),
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"attention_mask": torch.ones(9)}, ValueError,
     r"attention_mask must be \(1, 9\), got \(9,\)"),
    ({"attention_mask": [1] * 9}, TypeError, "attention_mask must be a tensor or None, got list"),
    ({"attention_mask": torch.ones(1, 9, device="meta")}, ValueError,
     "attention_mask must be on x's device cpu, got meta"),
]  # fmt: skip


@pytest.mark.parametrize("given, error, message", BAD, ids=lambda b: str(b)[:40])
@pytest.mark.parametrize("call", ("forward", "prefill"))
def test_bad_input(call, given, error, message):
    layer = perturbed(dtype=torch.float32)
    with pytest.raises(error, match=f"^HyperGLU: {message}"):
        getattr(layer, call)(**{"x": X, **given})


def test_bad_config():
    with pytest.raises(TypeError, match="^HyperGLU: config must be a HyperGLUConfig, got 3"):
        HyperGLU(3)


def test_bad_steps_leave_the_cache_as_it_was():
    layer = perturbed()
    x = draw(2, 3, 24, **DOUBLE)
    _, cache = layer.prefill(x[:, :2])
    before = [t.clone() for t in (cache.x, cache.k, cache.v, cache.length)]
    others = {
        "k": perturbed(qk_rank=48),
        "v": perturbed(vo_rank=40),
        "x": perturbed(conv_kernel_size=3),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"^HyperGLU: cache.{name} must have shape \(2, "):
            other.step(x[:, 2], cache)
    with pytest.raises(TypeError, match="cache must hold torch.float32"):
        perturbed(dtype=torch.float32).step(x[:, 2].float(), cache)
    for token, error, message in (
        (draw(3, 24, **DOUBLE), ValueError, r"x must be \(2, 24\) or \(2, 1, 24\).* \(3, 24\)"),
        (x, ValueError, r"x must be \(2, 24\) or \(2, 1, 24\).* got \(2, 3, 24\)"),
        (x[:, 2, :3], ValueError, r"x must have last dimension 24, got shape \(2, 3\)"),
        (x[:, 2].float(), TypeError, "x must be torch.float64, got torch.float32"),
        (None, TypeError, "x must be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=f"^HyperGLU: {message}"):
            layer.step(token, cache)
    with pytest.raises(TypeError, match="^HyperGLU: cache must be a HyperGLUCache, got NoneType"):
        layer.step(x[:, 2], None)
    after = (cache.x, cache.k, cache.v, cache.length)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
