"""HyperGLU token by token is the forward: prefill, steps, what is refused."""

import pytest
import torch
from hyper_checks import perturbed
from layer_checks import draw

from fusedmlp.hyperglu.cache import empty_cache


@pytest.mark.parametrize("options", [{}, {"attn_kind": "relu"}, {"use_op1": False},
                                     {"use_rope": True, "rope_kind": "rotary"}, {"bias": True},
                                     {"use_rope": True}, {"use_kv_conv": False},
                                     {"aligner_kind": "identity", "use_op1": False,
                                      "use_op2": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize("prompt", (0, 1, 2, 11))
def test_decoding_is_the_forward(options, prompt):
    layer = perturbed(**options)
    x = draw(2, 15, 24, dtype=torch.float64)
    y = layer(x)
    if prompt:
        first, cache = layer.prefill(x[:, :prompt])
        torch.testing.assert_close(first, y[:, :prompt])
    else:
        cache = layer.init_cache(2)
    shapes = [t.shape for t in (cache.x, cache.k, cache.v)]
    for t in range(prompt, 15):
        token = x[:, t] if t % 2 else x[:, t : t + 1]
        out, cache = layer.step(token, cache)
        assert out.shape == token.shape
        torch.testing.assert_close(out.view(2, 24), y[:, t])
    assert shapes == [t.shape for t in (cache.x, cache.k, cache.v)]
    assert cache.length.item() == 15


def test_prefill_with_a_mask():
    layer = perturbed()
    x, mask = draw(2, 9, 24, dtype=torch.float64), torch.ones(2, 9)
    mask[0, :3] = 0
    y = layer(x, mask)
    _, cache = layer.prefill(x[:, :8], mask[:, :8])
    torch.testing.assert_close(layer.step(x[:, 8], cache)[0], y[:, 8])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_decoding_under_autocast(dtype):
    """A cache in the autocast dtype; float64 stays, as autocast has it."""
    layer, x = perturbed(dtype=dtype, std=0.1), draw(2, 5, 24, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        _, cache = layer.prefill(x[:, :4])
        out, _ = layer.step(x[:, 4], cache)
    assert cache.k.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    torch.testing.assert_close(out, y[:, 4], rtol=0.1, atol=0.1)
    if dtype == torch.float32:
        with pytest.raises(TypeError, match="cache must hold torch.float32"):
            layer.step(x[:, 4], cache)


def test_decoding_refuses():
    with pytest.raises(ValueError, match="decoding needs .* op1_do_masking"):
        perturbed(op1_do_masking=False).init_cache(1)
    layer = perturbed(block_size=3)
    _, cache = layer.prefill(draw(2, 3, 24, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="the cache is full: it holds block_size = 3 tokens"):
        layer.step(draw(2, 24, dtype=torch.float64), cache)
    with pytest.raises(ValueError, match="batch must be an int"):
        layer.init_cache(-1)


def test_a_cache_lies_where_it_is_asked_for():
    cache = empty_cache(perturbed().config, 2, torch.float32, "meta")
    assert {t.device.type for t in (cache.x, cache.k, cache.v, cache.length)} == {"meta"}
    assert perturbed().init_cache(0, device="meta").k.shape[0] == 0
    assert perturbed().init_cache(2, device="meta").k.is_meta
    with torch.device("meta"):
        layer = perturbed()
    assert layer.init_cache(2).k.is_meta


@pytest.mark.parametrize("name", ("x", "k", "v", "length"))
def test_a_cache_elsewhere_is_refused(name):
    layer = perturbed()
    cache = layer.init_cache(2)
    setattr(cache, name, getattr(cache, name).to("meta"))
    with pytest.raises(ValueError, match=f"cache.{name} must be on x's device cpu, got meta"):
        layer.step(draw(2, 24, dtype=torch.float64), cache)
