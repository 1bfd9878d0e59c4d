"""Hub layers as `kernelize` of the package `kernels` puts them in: outputs and gradients of the
model's own forward, for every class that a layer serves and every activation; one clear error for
the rest."""

import copy
from types import MethodType

import pytest
import torch
import transformers as hf
from patch_models import MODELS, batch, build
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.activations import ACT2FN
from transformers.models.bitnet.modeling_bitnet import BitNetMLP

import fusedmlp
import kernels
from fusedmlp.hub import __main__ as hub, layers

NAMES = [name for name, _ in hub.stateless()]
# model -> the classes in it that a layer serves
SERVED = {
    "llama": {"LlamaMLP"}, "mistral": {"MistralMLP"}, "qwen2": {"Qwen2MLP"}, "qwen3": {"Qwen3MLP"},
    "gemma": {"GemmaMLP"}, "gemma2": {"Gemma2MLP"}, "gemma3": {"Gemma3MLP"}, "phi3": {"Phi3MLP"},
    "olmo": {"OlmoMLP"}, "gpt_neox": {"GPTNeoXMLP"}, "gpt2": {"GPT2MLP"}, "vit": {"ViTMLP"},
    "switch": {"SwitchTransformersDenseActDense"}, "llama4": {"Llama4TextMLP", "Llama4TextMoe"},
    "bert": set(),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub.write(folder)
    return folder


@pytest.fixture
def adopt(folder, monkeypatch):
    """Kernelizes a model: classes by their name -> layer of the folder."""

    def adopt(model, classes, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE):
        mapping = {}
        for module in model.modules():
            kind = type(module)
            if (layer := classes.get(kind.__name__)) is not None:
                monkeypatch.setattr(kind, "kernel_layer_name", kind.__name__, raising=False)
                repository = kernels.LocalLayerRepository(folder, layer_name=layer)
                mapping[kind.__name__] = {"cpu": repository}
        assert mapping.keys() == classes.keys()
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
        adopted = [m for m in model.modules() if type(m).__name__ in classes]
        assert all("forward" in vars(m) for m in adopted)
        return adopted

    return adopt


def test_every_model_says_what_is_served():
    assert SERVED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", [name for name, classes in SERVED.items() if classes])
def test_a_kernelized_model_computes_what_it_did(name, adopt):
    model, inputs = build(name), batch(name)
    ours = copy.deepcopy(model)
    layer = lambda kind: kind if kind in NAMES else "FusedMLP"  # noqa: E731
    adopt(ours, {kind: layer(kind) for kind in SERVED[name]})
    results = []
    for of in (ours, model):
        out = of(**inputs)
        gradients = torch.autograd.grad(out.loss, list(of.parameters()), allow_unused=True)
        results.append((out.logits, *gradients))
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def llama(**options):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, initializer_range=0.3, **options,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


TOKENS = torch.arange(3, 17).view(2, 7)
STRANGERS = {"prelu", "xielu"}


@pytest.mark.parametrize("activation", sorted({*ACT2FN} - STRANGERS))
@pytest.mark.parametrize("layer", ["FusedMLP", "FusedGeGLUMLP"])
def test_every_activation_is_the_models_own(activation, layer, adopt):
    """Under an older name of the layer too, whatever that says."""
    model = llama(hidden_act=activation)
    expected = model(TOKENS).logits
    adopt(model, {"LlamaMLP": layer})
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["prelu", "rrelu"])
def test_an_activation_without_a_kernel_is_an_error(activation, adopt):
    model = llama()
    act_fn = ACT2FN["prelu"] if activation == "prelu" else nn.RReLU()
    (mlp,) = adopt(model, {"LlamaMLP": "FusedMLP"})
    mlp.act_fn = act_fn
    message = (
        r"hub: LlamaMLP must compute down.*, got: .*; leave its class out of the kernel mapping"
    )
    with pytest.raises(ValueError, match=message):
        model(TOKENS)


def test_a_changed_activation_is_followed(adopt):
    model = llama()
    (mlp,) = adopt(model, {"LlamaMLP": "FusedMLP"})
    x = torch.randn(4, 32)
    for act_fn in (mlp.act_fn, ACT2FN["gelu"], nn.LeakyReLU(0.25), torch.tanh):
        del mlp.act_fn
        mlp.act_fn = act_fn
        torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), rtol=1e-4, atol=1e-4)
    mlp.act_fn = slope = nn.LeakyReLU(0.5)
    first = mlp(x)
    slope.negative_slope = 0.75
    torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(mlp(x), first)


def test_classes_that_compute_something_else():
    """A norm before the last projection is taken, as the class has it. Multipliers, which the names
    of the projections do not show either, and what is no MLP are refused."""
    x = torch.randn(4, 32)
    normed = BitNetMLP(hf.BitNetConfig(hidden_size=32, intermediate_size=48))
    torch.testing.assert_close(layers.FusedMLP.forward(normed, x), normed(x), rtol=1e-4, atol=1e-5)

    class Scaled(type(llama().model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x).mul(0.5).clamp(-1, 1)

    scaled = Scaled(llama().config)
    for stranger in (scaled, nn.Linear(32, 32), llama().model.layers[0], nn.LayerNorm(32)):
        with pytest.raises(ValueError, match=f"hub: {type(stranger).__name__} must compute"):
            layers.FusedMLP.forward(stranger, x)


@pytest.mark.parametrize("name", ["bert", "switch", "opt"])
def test_what_patch_alone_runs_is_refused(name):
    if name == "opt":
        config = hf.OPTConfig(
            hidden_size=64, word_embed_proj_dim=64, ffn_dim=48, num_attention_heads=2,
            num_hidden_layers=1, vocab_size=9,
        )  # fmt: skip
        model = hf.OPTForCausalLM(config)
    else:
        model = build(name)
    holders = {
        "bert": "BertLayer",
        "switch": "SwitchTransformersSparseMLP",
        "opt": "OPTDecoderLayer",
    }
    (block, *_) = [m for m in model.modules() if type(m).__name__ == holders[name]]
    with pytest.raises(ValueError, match=r"which fusedmlp.patch\(model\) alone runs"):
        layers.FusedMLP.forward(block, torch.randn(1, 4, 64))


def test_two_experts_a_token_are_refused():
    model = build("llama4", num_experts_per_tok=2)
    (block, *_) = [m for m in model.modules() if type(m).__name__ == "Llama4TextMoe"]
    with pytest.raises(ValueError, match="Llama4TextMoe must .*, got: it takes 2 experts a token"):
        layers.Llama4TextMoe.forward(block, torch.randn(4, 64))


def test_hooks_and_adapters_are_not_passed_by(adopt):
    model = llama()
    (mlp,) = adopt(model, {"LlamaMLP": "FusedMLP"})
    x = torch.randn(4, 32)
    hook = mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), rtol=1e-4, atol=1e-4)
    hook.remove()
    hook = mlp.act_fn.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(ValueError, match="got: act_fn has hooks, which a fused call would pass by"):
        mlp(x)
    hook.remove()
    torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), rtol=1e-4, atol=1e-4)


def test_activations_that_kernelize_replaced_too(monkeypatch):
    """transformers registers SiLU and its like: kernelize puts a forward on these instances."""
    model = llama()
    x, mlp = torch.randn(4, 32), model.model.layers[0].mlp
    expected = mlp(x)
    monkeypatch.setattr(type(mlp.act_fn), "kernel_layer_name", "SiLU", raising=False)
    kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    assert "forward" in vars(mlp.act_fn)
    torch.testing.assert_close(layers.FusedMLP.forward(mlp, x), expected, rtol=1e-4, atol=1e-4)
    with fusedmlp.patched(model) as report:
        assert [entry.op for entry in report.patched] == ["gated_mlp"]
    monkeypatch.delattr(type(mlp.act_fn), "kernel_layer_name")
    with pytest.raises(ValueError, match="got: act_fn has a forward of its own"):
        layers.FusedMLP.forward(mlp, x)


def test_a_class_that_lost_its_forward_is_told_so(monkeypatch):
    mlp = llama().model.layers[0].mlp
    monkeypatch.setattr(type(mlp), "forward", layers.FusedMLP.forward)
    with pytest.raises(ValueError, match="not one of its own: let kernelize put it there"):
        mlp(torch.randn(4, 32))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_has_no_state_of_its_own(name):
    layer = getattr(layers, name)
    assert layer.__bases__ == (nn.Module,) and layer.__init__ is nn.Module.__init__
    own = {k for k in vars(layer) if not (k.startswith("__") and k.endswith("__"))}
    assert own - {"_abc_impl"} == {"forward", "has_backward", "can_torch_compile"}
    assert layer.has_backward is True and layer.can_torch_compile is True


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "llama4"])
def test_a_layer_keeps_its_promise_to_compile(name):
    """One graph, of a block that no call has seen before."""
    model = build(name).eval()
    block = [m for m in model.modules() if type(m).__name__ in SERVED[name]][-1]
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    expected = block(x)
    layer = getattr(layers, type(block).__name__, layers.FusedMLP)
    block.forward = MethodType(layer.forward, block)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    got = torch.compile(block, backend=counter, fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
