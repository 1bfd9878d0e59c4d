"""One-bit models of transformers through save_pretrained and from_pretrained, bit for bit."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
import transformers as hf
from patch_blocks import LlamaLike
from safetensors import safe_open
from torch import nn

import fusedmlp
from fusedmlp import cli, quantize_model
from fusedmlp.layers import BinaryGatedMLP
from fusedmlp.patching.pretrained import OneBitConfig, OneBitQuantizer

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128, "decoder_sparse_step": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "moe_intermediate_size": 128, "n_shared_experts": 1, "n_group": 1,
    "num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16,
}  # fmt: skip
LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
# class -> arguments of its configuration, and what is quantised
MODELS = {
    "Llama": ({"mlp_bias": True}, LAYERS),
    "Mistral": ({}, LAYERS),
    "Qwen3": ({"tie_word_embeddings": True}, LAYERS),
    "Gemma2": ({}, LAYERS),
    "Cohere2": ({}, LAYERS),
    "Qwen2Moe": (EXPERTS, [LAYERS[0], f"{LAYERS[1]}.shared_expert"]),
    "DeepseekV3": (DEEPSEEK, [LAYERS[0], f"{LAYERS[1]}.shared_experts"]),
}
TOKENS = torch.arange(3, 15).view(2, 6)


def build(name="Llama", **options):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**SIZES, **options)
    return getattr(hf, f"{name}ForCausalLM")(config).eval()


def quantised(name="Llama", **options):
    model = build(name, **options)
    quantize_model(model)
    return model


def vision_and_language():
    """Its checkpoints have other names than its modules."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = hf.LlamaConfig(**SIZES)
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**vision), text_config=text)
    return hf.LlavaForConditionalGeneration(config).eval()


def assert_same(model, expected):
    """Every tensor, and its dtype."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for key, t in theirs.items():
        assert ours[key].dtype == t.dtype and torch.equal(ours[key], t), key


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back(name, tmp_path):
    options, blocks = MODELS[name]
    model = build(name, **options)
    assert [layer.name for layer in quantize_model(model).layers] == blocks
    model.save_pretrained(tmp_path)
    again, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(again, model)
    assert type(again) is type(model) and not again.training
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
    again.save_pretrained(tmp_path / "again")
    texts = [(folder / "config.json").read_text() for folder in (tmp_path, tmp_path / "again")]
    assert texts[0] == texts[1]
    assert_same(type(model).from_pretrained(tmp_path / "again"), model)


def test_a_model_whose_checkpoints_have_other_names_comes_back(tmp_path):
    model = vision_and_language()
    names = [layer.name for layer in quantize_model(model).layers]
    assert names == [f"model.language_model.layers.{i}.mlp" for i in range(2)]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any(key.startswith("language_model.model.layers.0.mlp") for key in file.keys())  # noqa: SIM118
    loaded = hf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same(loaded, model)
    for i, whole in enumerate((model, loaded)):  # what they hold can be saved alone
        whole.model.language_model.save_pretrained(tmp_path / f"text{i}")
        again = hf.AutoModel.from_pretrained(tmp_path / f"text{i}")
        assert_same(again, model.model.language_model)
        with safe_open(tmp_path / f"text{i}" / "model.safetensors", "pt") as file:
            assert not any("packed" in key for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ({"max_shard_size": "40KB"}, {}),
        ({"max_shard_size": "40KB"}, {"device_map": "auto"}),
        ({"variant": "q1"}, {"variant": "q1"}),
        ({}, {"device_map": "auto"}),
        ({}, {"device_map": "cpu", "dtype": torch.float32}),
    ],
)
def test_shards_variants_and_device_maps(saving, loading, tmp_path):
    model = quantised(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, **saving)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "max_shard_size" not in saving
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **loading)
    assert_same(again, model)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_layers_offloaded_to_disk(tmp_path):
    model = quantised()
    model.save_pretrained(tmp_path / "all")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    again = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "all", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    again.save_pretrained(tmp_path / "again")
    assert_same(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
def test_scales_keep_their_dtype_whatever_the_others_have(dtype, tmp_path):
    model = quantised().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = model if dtype == "auto" else copy.deepcopy(model).to(dtype)
    assert_same(again, expected)
    assert again.model.layers[0].mlp.gate_proj.packed.scales.dtype == torch.float16


def test_a_part_of_the_layers(tmp_path):
    model = build()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert [layer.name for layer in quantize_model(model).layers] == LAYERS[1:]
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [isinstance(m.mlp, BinaryGatedMLP) for m in again.model.layers] == [False, True]
    assert_same(again, model)
    # The other layer is quantised later, and the mark follows.
    quantize_model(again)
    again.save_pretrained(tmp_path / "both")
    assert_same(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "both"), again)


def test_with_another_head_or_without(tmp_path):
    model = quantised()
    model.save_pretrained(tmp_path / "head")
    assert_same(hf.AutoModel.from_pretrained(tmp_path / "head"), model.model)
    model.model.save_pretrained(tmp_path / "base")
    for folder in ("head", "base"):
        classifier = hf.LlamaForSequenceClassification.from_pretrained(tmp_path / folder)
        assert_same(classifier.model, model.model)


@pytest.mark.parametrize("prefix", ("above", "zoo"))
@pytest.mark.parametrize("saved, loaded", [(True, False), (False, True), (True, True)])
def test_tensors_are_known_by_the_shorter_name(prefix, saved, loaded):
    """Whether the file or the model has the prefix of a model inside another, whatever it is."""

    def named(inside):
        return f"{prefix}.mlp" if inside else "mlp"

    mlp, model = LlamaLike(), nn.Module()
    model.base_model_prefix = prefix
    model.register_module(*((prefix, nn.ModuleDict({"mlp": mlp})) if loaded else ("mlp", mlp)))
    quantizer = OneBitQuantizer(OneBitConfig([named(saved)]))
    quantizer._process_model_before_weight_loading(model)
    shared = named(saved and loaded)
    assert quantizer._projections == [f"{shared}.{part}_proj" for part in ("gate", "up", "down")]
    assert isinstance(model.get_submodule(named(loaded)), BinaryGatedMLP)


def test_a_patched_model_is_saved_as_it_is(tmp_path):
    model = build()
    report = fusedmlp.patch(model, quantize="q1_0")
    assert len(report.patched) == 2
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(again, model)
    assert [e.op for e in fusedmlp.patch(again).patched] == ["binary_gated_mlp"] * 2


def test_the_mark_in_the_configuration(tmp_path):
    model = quantised()
    mark = {"quant_method": "fusedmlp", "format": "q1_0", "modules": LAYERS}
    assert json.loads(model.config.to_json_string())["quantization_config"] == mark
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == mark
    assert hf.AutoConfig.from_pretrained(tmp_path).quantization_config == mark
    assert_same(copy.deepcopy(model), model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        w, scale = (
            file.get_tensor(f"{LAYERS[0]}.gate_proj.{n}") for n in ("weight", "weight_scale")
        )
    assert (w.shape, w.dtype) == ((256, 4), torch.int32)
    assert (scale.shape, scale.dtype) == ((256, 1), torch.float16)


def test_the_report_of_a_folder_is_that_of_the_loaded_model(tmp_path, capsys):
    quantised().save_pretrained(tmp_path)
    assert cli.main(["patch-report", str(tmp_path)]) == 0
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert capsys.readouterr().out == f"LlamaForCausalLM: {fusedmlp.patch(loaded)}\n"


def test_a_model_that_is_no_pretrained_one_holds_it(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()

    pair = Pair()
    assert [layer.name for layer in quantize_model(pair).layers] == [f"inner.{n}" for n in LAYERS]
    pair.inner.save_pretrained(tmp_path)
    assert_same(hf.AutoModelForCausalLM.from_pretrained(tmp_path), pair.inner)


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("refused")
import fusedmlp  # transformers is there already
print(type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp).__name__)
"""


def test_without_fusedmlp_it_is_an_error_that_names_it(tmp_path):
    folders = {"whole": {}, "sharded": {"max_shard_size": "40KB"}}
    for folder, options in folders.items():
        quantised().save_pretrained(tmp_path / folder, **options)
    run = [sys.executable, "-c", WITHOUT, *(str(tmp_path / folder) for folder in folders)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout.split() == ["refused", "refused", "BinaryGatedMLP"], done.stderr
    assert "Unknown quantization type, got fusedmlp" in done.stderr
    assert "gate_proj.weight" in done.stderr and "MISMATCH" in done.stderr


def changed(folder, mark, **options):
    """The model in `folder` with another mark, and with other sizes."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= mark
    file.write_text(json.dumps(config | options))
    return hf.LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"format": "q2_0"}, "quantization_config.format must be one of q1_0, got 'q2_0'; a newer"),
        ({"modules": ["decoder.mlp"]}, "LlamaForCausalLM has no decoder.mlp; load it by the class"),
        ({"modules": ["model.norm"]}, "has model.norm in one bit, and model.norm is no MLP"),
    ],
)
def test_a_wrong_mark_is_an_error(mark, message, tmp_path):
    quantised().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^fusedmlp: .*{message}"):
        changed(tmp_path, mark)


def test_an_mlp_that_cannot_be_in_one_bit_any_more(tmp_path):
    quantised().save_pretrained(tmp_path)
    message = r"1.mlp in one bit, and model.layers.1.mlp \(LlamaMLP\): left, .* multiple of 128"
    with pytest.raises(ValueError, match=message):
        changed(tmp_path, {"modules": LAYERS[1:]}, intermediate_size=200)


def test_from_pretrained_does_not_quantise(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fusedmlp does require the model to be pre-quantized"):
        hf.LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config={"quant_method": "fusedmlp"}
        )


def test_a_model_of_another_quantiser_is_refused():
    model = build()
    model.hf_quantizer = type("BnbHfQuantizer", (), {})()
    with pytest.raises(ValueError, match="^quantize_model: model must come from no .* BnbHfQ"):
        quantize_model(model)


def trainer(model, folder):
    return hf.Trainer(model, hf.TrainingArguments(folder, use_cpu=True, report_to="none"))


def test_fine_tuning_takes_adapters(tmp_path):
    """As documented: transformers' Trainer refuses the model alone, and takes it with adapters,
    which get gradients through the one-bit blocks."""
    quantised().save_pretrained(tmp_path)
    for model in (quantised(), hf.AutoModelForCausalLM.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
            trainer(model, tmp_path)
        lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora)
        trainer(adapted, tmp_path)
        adapted(TOKENS, labels=TOKENS).loss.backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert len(trained) == 4 and all(p.grad.abs().sum() > 0 for p in trained)
