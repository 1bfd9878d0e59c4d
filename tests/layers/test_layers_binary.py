"""BinaryLinear and BinaryGatedMLP: quantisation-aware training, packing, whole models."""

import copy
import math
import re

import pytest
import torch
from layer_checks import Stranger
from torch import nn

from fusedmlp import (
    BinaryGatedMLP,
    BinaryLinear,
    backend,
    binary_linear,
    quantize_binary,
    quantize_model,
)
from fusedmlp.layers.binary import binarized
from fusedmlp.patching.quantize import nbytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def block(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return BinaryGatedMLP(128, 256, **options).to(dtype)


def assert_same_but_for_scales(packed, latent):
    """bfloat16 rounds a latent weight's scales, float16 ones, and so all of a group alike."""
    rounding = 2**-8 if latent.dtype == torch.bfloat16 else 0.0
    largest = latent.abs().max().item()
    torch.testing.assert_close(packed, latent, rtol=2 * rounding, atol=rounding * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", (True, False))
def test_packing_changes_no_number(dtype, training):
    layer, x = BinaryLinear(256, 24, bias=True).to(dtype).train(training), draw(3, 5, 256).to(dtype)
    latent, w = layer(x), layer.binarized()
    assert torch.equal(layer.pack().packed.dequantize(dtype), w)
    assert layer(x).dtype == dtype
    assert_same_but_for_scales(layer(x), latent)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_block_gives_the_same_result(dtype):
    mlp, x = block(dtype, bias=True).eval(), draw(5, 128).to(dtype)
    latent = mlp(x)
    assert_same_but_for_scales(mlp.pack()(x), latent)
    assert len(list(mlp.parameters())) == 3


def test_packed_block_on_the_kernels(device):
    mlp, x = block().to(device), draw(3, 128).to(device)
    latent = mlp(x)
    with backend("triton"):
        torch.testing.assert_close(mlp.pack()(x), latent, rtol=1e-5, atol=1e-5)


def test_padded_widths():
    torch.manual_seed(0)
    mlp, x = BinaryGatedMLP(96, 200, pad=True), draw(5, 96)
    latent = mlp(x)
    latent.sum().backward()
    assert mlp.down_proj.weight.grad.shape == (96, 200)
    torch.testing.assert_close(mlp.pack()(x), latent)  # by bytes, in another order of sums
    again = BinaryLinear.from_packed(mlp.gate_proj.packed)
    assert again.in_features == 96
    with backend("reference"):
        assert torch.equal(mlp(x), latent)
        assert torch.equal(again(x), mlp.gate_proj(x))


def test_gradient_is_straight_through():
    """scale * dw, and that of mean |v|: by hand."""
    v, dw = draw(2, 256, dtype=torch.float64).requires_grad_(), draw(2, 257)[:, :256].double()
    (grad,) = torch.autograd.grad(binarized(v), v, dw)
    groups = lambda t: t.unflatten(1, (-1, 128))  # noqa: E731
    scale = groups(v.detach()).abs().mean(2, keepdim=True)
    sign = torch.where(v.detach() >= 0, 1.0, -1.0).double()
    through_scale = (groups(dw) * groups(sign)).mean(2, keepdim=True) * groups(sign)
    expected = scale.half().double() * groups(dw) + through_scale
    torch.testing.assert_close(grad, expected.flatten(1), rtol=1e-6, atol=1e-9)
    (detached,) = torch.autograd.grad(binarized(v, detach_scale=True), v, dw)
    torch.testing.assert_close(detached, (scale.half().double() * groups(dw)).flatten(1))
    (clipped,) = torch.autograd.grad(binarized(v, 0.5, True), v, dw)
    assert torch.equal(clipped, detached * (v.detach().abs() <= 0.5))


def test_latent_weights_at_zero_and_at_the_clip():
    """sign(0) = 1 for zeros of both signs; a weight as large as the clip still has a gradient."""
    past = math.nextafter(0.5, 1)
    some = [0.0, -0.0, 1e-300, -1e-300, 0.5, -0.5, past, -past]
    v = torch.tensor([some + 120 * [0.0]], dtype=torch.float64, requires_grad=True)
    w = binarized(v, 0.5, True)
    assert w.sign()[0, :8].tolist() == [1, 1, 1, -1, 1, -1, 1, -1] and (w[0, 8:] > 0).all()
    (grad,) = torch.autograd.grad(w.sum(), v)
    assert grad[0, :8].ne(0).tolist() == 6 * [True] + 2 * [False]


@pytest.mark.filterwarnings("error")
def test_scales_beyond_float16():
    """Training says nothing of them; packing does."""
    layer, x = BinaryLinear(128, 4), draw(2, 128)
    layer.weight.data *= 1e-8
    assert not layer(x).any()
    with pytest.warns(UserWarning, match="underflows to 0 in float16"):
        layer.pack()
    layer = BinaryLinear(128, 4)
    layer.weight.data *= 1e8
    assert layer(x).isnan().all()
    with pytest.raises(ValueError, match="at most 65504"):
        layer.pack()


def test_training_learns_and_flips_signs():
    torch.manual_seed(0)
    target = quantize_binary(0.05 * draw(16, 128))
    layer, x = BinaryLinear(128, 16), draw(64, 128)
    y, before = binary_linear(x, target), layer.binarized().detach()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert ((layer.binarized() > 0) != (before > 0)).float().mean() > 0.1


def test_packed_layers_train_what_is_left():
    mlp, x = block(bias=True).pack(), draw(5, 128).requires_grad_()
    mlp(x).square().sum().backward()
    assert x.grad.any() and all(p.grad.any() for p in mlp.parameters())


def test_state_dict_of_packed_layers():
    mlp, other = block().pack(), BinaryGatedMLP(128, 256).pack()
    assert set(mlp.state_dict()) == {
        f"{n}_proj.packed.{t}" for n in ("gate", "up", "down") for t in ("qweight", "scales")
    }
    other.load_state_dict(mlp.state_dict())
    x = draw(2, 128)
    assert torch.equal(other(x), mlp(x)) and torch.equal(copy.deepcopy(mlp)(x), mlp(x))
    packed = mlp.gate_proj.packed
    assert torch.equal(BinaryLinear.from_packed(packed)(x), mlp.gate_proj(x))


def test_built_on_meta():
    with torch.device("meta"):
        mlp = BinaryGatedMLP(128, 256, bias=True)
    mlp.to_empty(device="cpu").init_weights_()
    assert all(p.isfinite().all() and p.std() > 0 for p in mlp.parameters())


@pytest.mark.parametrize("packed", (False, True), ids=("latent", "packed"))
def test_compiles_and_autocasts(packed):
    torch._dynamo.reset()
    mlp, x = block(), draw(4, 128)
    mlp = mlp.pack() if packed else mlp
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mlp(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16


def linears(up=(128, 256), down=(256, 128)):
    return nn.Linear(128, 256), nn.Linear(*up), nn.Linear(*down)


BAD = [
    (lambda: BinaryLinear(100, 4), ValueError, "BinaryLinear: in_features must be a multiple of 128, got 100"),
    (lambda: BinaryLinear(128, 0), ValueError, "BinaryLinear: out_features must be at least 1, got 0"),
    (lambda: BinaryLinear(128, 4, clip=0.0), ValueError, "BinaryLinear: clip must be None or positive, got 0.0"),
    (lambda: BinaryLinear(128, 4, clip="a"), ValueError, "BinaryLinear: clip must be None or positive, got 'a'"),
    (lambda: BinaryLinear.from_packed(quantize_binary(draw(4, 128)), draw(5)), ValueError, "BinaryLinear: bias must have shape (4,), got (5,)"),
    (lambda: BinaryLinear.from_packed(quantize_binary(draw(4, 128)), True), TypeError, "BinaryLinear: bias must be a Tensor, got bool"),
    (lambda: BinaryGatedMLP(128, 256, "swish"), ValueError, "BinaryGatedMLP: activation must be one of silu, gelu"),
    (lambda: BinaryGatedMLP.from_dense(*linears(), activation="swish"), ValueError, "BinaryGatedMLP: activation must be one of silu, gelu"),
    (lambda: BinaryGatedMLP.from_dense(*linears(down=(128, 128))), ValueError, "BinaryGatedMLP: weight of down must have shape (128, 256), got (128, 128)"),
    (lambda: BinaryGatedMLP.from_dense(*linears(up=(128, 128))), ValueError, "BinaryGatedMLP: weight of up must have shape (256, 128), got (128, 128)"),
    (lambda: BinaryGatedMLP.of(1, 2, 3), TypeError, "BinaryGatedMLP: gate must be a BinaryLinear, got int"),
    (lambda: BinaryLinear.from_linear(nn.ReLU()), TypeError, "BinaryLinear: linear must be a plain nn.Linear, got ReLU"),
    (lambda: BinaryLinear.from_packed(draw(4, 128)), TypeError, "BinaryLinear: w must be a BinaryWeight, got Tensor"),
    (lambda: BinaryLinear(128, 4).pack().pack(), RuntimeError, "BinaryLinear: pack() needs a latent weight, got a packed one"),
    (lambda: BinaryLinear(128, 4).pack().binarized(), RuntimeError, "binarized() needs a latent weight, got a packed one"),
    (lambda: BinaryLinear(128, 4).pack().reset_parameters(), RuntimeError, "a packed layer has no initial values"),
    (lambda: BinaryGatedMLP(128, 200), ValueError, "in_features must be a multiple of 128, got 200"),
    (lambda: BinaryGatedMLP.from_dense(*(nn.Linear(128, 128) for _ in range(3)), Stranger()), TypeError, "activation must be one with a kernel, got Stranger()"),
]  # fmt: skip


@pytest.mark.parametrize("make", (lambda: BinaryGatedMLP(128, 256), lambda: BinaryLinear(128, 4)))
def test_loading_says_what_to_pack(make):
    latent, packed = make(), make().pack()
    names = ("gate_proj", "up_proj", "down_proj")
    names = names if isinstance(latent, BinaryGatedMLP) else ("BinaryLinear",)
    with pytest.raises(RuntimeError) as raised:
        latent.load_state_dict(packed.state_dict())
    for name in names:
        assert (
            f"{name}: the state_dict has a packed weight and the layer a latent one: pack"
            in str(raised.value)
        )
    with pytest.raises(RuntimeError) as raised:
        packed.load_state_dict(make().state_dict())
    assert str(raised.value).count("load into a layer that is not packed, then pack by") == len(
        names
    )
    make().load_state_dict(latent.state_dict())
    make().pack().load_state_dict(packed.state_dict())


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_layers(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_packed_all_or_none():
    mlp = block()
    mlp.up_proj.pack()
    with pytest.raises(RuntimeError, match="projections must be packed all or none, got 1 of 3"):
        mlp(draw(1, 128))
    mlp = block()
    with torch.no_grad():
        mlp.up_proj.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="w must be finite, got 1 NaN or infinite"):
        mlp.pack()
    assert mlp.gate_proj.packed is None


def model(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=64, num_attention_heads=2, num_key_value_heads=2, **{**sizes, **options}
    )
    return LlamaForCausalLM(config).eval()


def of_strangers():
    llama = model()
    for layer in llama.model.layers:
        layer.mlp.act_fn = Stranger()
    return llama


def test_a_llama_is_quantised_in_place():
    llama, tokens = model(), torch.arange(12).view(2, 6)
    rounded = copy.deepcopy(llama)
    for layer in rounded.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            linear.weight.data = quantize_binary(linear.weight).dequantize(torch.float32)
    before = nbytes(llama)
    report = quantize_model(llama)
    weights = 2 * 3 * 128 * 256
    assert report.before == 4 * weights and report.after == weights * 18 // 128
    assert report.model_before == before and report.model_after == nbytes(llama)
    assert report.model_before - report.model_after == report.before - report.after
    assert [layer.name for layer in report.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert str(report).startswith("2 MLPs in q1_0: 0.75 MiB -> 0.03 MiB (28.4 times smaller);")
    torch.testing.assert_close(llama(tokens).logits, rounded(tokens).logits)
    assert llama.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 9)


def test_bytes_of_qwen3_8b():
    """288 MiB a layer in 16 bits, 20.25 in one."""
    dense = 3 * 4096 * 12288 * 2
    assert dense == 288 * 2**20 and dense // 16 * 18 // 16 == 20.25 * 2**20


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: quantize_model(model(), "q4_0"), ValueError, "format must be one of q1_0, got 'q4_0'"),
        (lambda: quantize_model(nn.Linear(4, 4)), ValueError, "got none in Linear"),
        (lambda: quantize_model(model(intermediate_size=200)), ValueError, "model.layers.0.mlp (LlamaMLP): left, down_proj must have rows of a multiple of 128, got 200"),
        (lambda: quantize_model(of_strangers()), ValueError, "model.layers.0.mlp (LlamaMLP): left, neither factor of its product is an activation"),
        (lambda: quantize_model("llama"), TypeError, "model must be an nn.Module, got str"),
        (lambda: quantize_model(model().model.layers[0].mlp), ValueError, "model must hold its gated MLPs"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised(make, error, message):
    with pytest.raises(error, match=f"(?s)^quantize_model: .*{re.escape(message)}"):
        make()


def test_nothing_is_changed_unless_all_can_be():
    llama = model()
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="w must be finite"):
        quantize_model(llama)
    assert not any(isinstance(module, BinaryGatedMLP) for module in llama.modules())
