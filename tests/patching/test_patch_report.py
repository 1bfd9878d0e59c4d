"""patch-report, from a configuration alone, says line by line what patch() says of the loaded
model.

Models are saved and loaded by from_pretrained. Quantised ones are too where the package that does
it is installed (the extra test-quantised). Where it is not, transformers cannot load such a model:
stand-ins take the places of the projections that the package converts, which the table names.
"""

import json
import re
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
import transformers as hf
from patch_models import MODELS
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

import fusedmlp
from fusedmlp import cli

HALF, BRAIN = torch.float16, torch.bfloat16
TEXT = MODELS["llama"][2]
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
VISION = WIDE | {"image_size": 16, "patch_size": 4}
MOE = TEXT | {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 4}
DEEPSEEK = MOE | {
    "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 8,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
               "out_hidden_size": 64, "fullatt_block_indexes": [0]}  # fmt: skip
GEMMA_3 = {"text_config": MODELS["gemma3"][2], "vision_config": VISION, "mm_tokens_per_image": 4}


def known(name, **changes):
    cls, config, arguments, *_ = MODELS[name]
    return cls, config, arguments | changes


# name -> class, its configuration's, that one's arguments
CONFIGURATIONS = {
    "llama in bfloat16": known("llama", dtype=BRAIN),
    "llama in float64": known("llama", dtype=torch.float64),
    "gemma2 in float16": known("gemma2", dtype=HALF),
    "phi3, packed": known("phi3", dtype=BRAIN),
    "gpt2, transposed": known("gpt2"),
    "bert, spread": known("bert", dtype=HALF),
    "vit": known("vit"),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, WIDE | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig, BART | {"dtype": HALF}),
    "t5 in float16": (hf.T5ForConditionalGeneration, hf.T5Config, T5 | {"dtype": HALF}),
    "t5 in bfloat16": (hf.T5ForConditionalGeneration, hf.T5Config, T5 | {"dtype": BRAIN}),
    "t5, gated, in float16": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        T5 | {"dtype": HALF, "feed_forward_proj": "gated-gelu"},
    ),
    "switch in float16": known("switch", dtype=HALF),
    "llama4 in bfloat16": known("llama4", dtype=BRAIN),
    "mixtral": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        MOE | {"num_local_experts": 4, "dtype": BRAIN},
    ),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, MOE | {"mlp_only_layers": [0]}),
    "deepseek_v3 in float16": (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config,
        DEEPSEEK | {"dtype": HALF},
    ),
    "gpt_oss": (
        hf.GptOssForCausalLM,
        hf.GptOssConfig,
        MOE | {"num_local_experts": 4, "dtype": BRAIN},
    ),
    "llava": (
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig,
        {
            "text_config": {"model_type": "llama", **TEXT},
            "dtype": BRAIN,
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
    ),
    "gemma3 that sees": (
        hf.Gemma3ForConditionalGeneration,
        hf.Gemma3Config,
        GEMMA_3 | {"dtype": BRAIN},
    ),
    "qwen2.5 that sees": (
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig,
        {"text_config": TEXT, "vision_config": QWEN_VISION},
    ),
}


def report(folder, capsys):
    capsys.readouterr()
    cli.main(["patch-report", str(folder)])
    return capsys.readouterr().out.splitlines()


def said(model):
    return f"{type(model).__name__}: {fusedmlp.patch(model)}".splitlines()


def saved(name, folder, **changes):
    cls, config, arguments = CONFIGURATIONS[name]
    torch.manual_seed(0)
    cls._from_config(config(**arguments | changes)).save_pretrained(folder)
    return cls


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_of_a_checkpoint(name, tmp_path, capsys):
    cls = saved(name, tmp_path)
    expected = said(cls.from_pretrained(tmp_path))
    assert len(expected) > 1 and report(tmp_path, capsys) == expected


@pytest.mark.parametrize(
    "kernel",
    (
        "evil/kernel",
        "evil/kernel@main:attention",
        {"text_config": "evil/kernel"},
        {"vision_config": "evil/kernel"},
    ),
)
def test_of_a_configuration_that_names_a_kernel(kernel, tmp_path, capsys, monkeypatch):
    """A report fetches none, where the package that would is installed."""
    fetched = []

    def get_kernel(name, **_):
        fetched.append(name)
        raise OSError("no network")

    cls = saved("gemma3 that sees", tmp_path)
    expected = said(cls.from_pretrained(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attn_implementation": kernel}))
    monkeypatch.setattr(hf.integrations.hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hf.integrations.hub_kernels, "get_kernel", get_kernel)
    assert len(expected) > 1 and report(tmp_path, capsys) == expected and not fetched
    with pytest.raises(ValueError, match="no network"):
        cls._from_config(hf.AutoConfig.from_pretrained(tmp_path))
    assert fetched == ["evil/kernel"]


BITS_4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
# name -> configuration, quantization_config, package, the projections of MLPs that it converts
PACKAGES = {
    "bitsandbytes, 4 bits": ("llama in bfloat16", BITS_4, "bitsandbytes", r"model\..*"),
    "bitsandbytes, 8 bits": (
        "llama in bfloat16",
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes",
        r"model\..*",
    ),
    "bitsandbytes, a list": (
        "llama in bfloat16",
        BITS_4 | {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp.down_proj"]},
        "bitsandbytes",
        r"model\.layers\.(1\..*|0\.mlp\.(gate|up)_proj)",
    ),
    "bitsandbytes, gpt2": ("gpt2, transposed", BITS_4, "bitsandbytes", r"transformer\..*"),
    "bitsandbytes, experts": ("qwen3_moe", BITS_4, "bitsandbytes", r"model\..*"),
    "torchao": (
        "llama in bfloat16",
        {
            "quant_method": "torchao",
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
            "quant_type": {
                "default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
            },
        },
        "torchao",
        r"model\.layers\.0\..*",
    ),
    "compressed-tensors": (
        "llama in bfloat16",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*layers\\.1.*"],
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
        },
        "compressed_tensors",
        r"model\.layers\.0\..*",
    ),
    "gptq": ("llama in bfloat16", {"quant_method": "gptq", "bits": 4}, "gptqmodel", r"model\..*"),
    "gptq, a list": (
        "llama in bfloat16",
        {
            "quant_method": "gptq",
            "bits": 4,
            "modules_in_block_to_quantize": [
                ["self_attn.q_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
            ],
        },
        "gptqmodel",
        r".*mlp\.(gate|up)_proj",
    ),
    "awq": (
        "llama in bfloat16",
        {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["model.layers.1.mlp"]},
        "gptqmodel",
        r"model\.layers\.0\..*",
    ),
    "awq, gpt2": ("gpt2, transposed", {"quant_method": "awq", "bits": 4}, "gptqmodel", "nothing"),
}


def stood_in(model, method, pattern):
    """Projections as a package's own would be: of another class, and not to be read."""
    kind = type("Linear", (nn.Module,), {"__module__": method})
    for name, module in list(model.named_modules()):
        projects = isinstance(module, nn.Linear | hf.pytorch_utils.Conv1D)
        if projects and re.fullmatch(pattern, name):
            place = kind()
            place.in_features = place.out_features = 0
            model.set_submodule(name, place)
    return model


def configured(folder, settings):
    config = hf.AutoConfig.from_pretrained(folder)
    config.quantization_config = settings
    config.save_pretrained(folder)


def quantised(cls, folder, settings):
    """Quantised as it is loaded, saved, and loaded again."""
    by = AutoQuantizationConfig.from_dict(dict(settings))
    cls.from_pretrained(folder, quantization_config=by).save_pretrained(folder)
    return cls.from_pretrained(folder)


@pytest.mark.parametrize("name", PACKAGES)
def test_of_a_checkpoint_that_a_package_quantised(name, tmp_path, capsys):
    configuration, settings, package, pattern = PACKAGES[name]
    cls = saved(configuration, tmp_path)
    if not find_spec(package):
        model = stood_in(cls.from_pretrained(tmp_path), settings["quant_method"], pattern)
        configured(tmp_path, settings)
    elif package == "compressed_tensors":  # without weights of its own, which it does not make
        configured(tmp_path, settings)
        model = cls.from_pretrained(tmp_path)
    else:
        model = quantised(cls, tmp_path, settings)
    expected = said(model)
    assert len(expected) > 1 and report(tmp_path, capsys) == expected


BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16]}
# name -> configuration, quantization_config
OWN = {
    "fp8": ("llama in bfloat16", BLOCKS),
    "fp8, a list": (
        "llama in bfloat16",
        BLOCKS
        | {
            "modules_to_not_convert": [
                "lm_head",
                "model.layers.1.mlp",
                "model.layers.0.mlp.down_proj",
            ]
        },
    ),
    "fp8, experts": ("qwen3_moe", BLOCKS),
    "fp8, what sees": (
        "gemma3 that sees",
        BLOCKS | {"modules_to_not_convert": ["lm_head", "model.vision_tower"]},
    ),
    "fp8, put back": ("llama in bfloat16", BLOCKS | {"dequantize": True}),
}


@pytest.fixture
def a_gpu_for_fp8(monkeypatch):
    """Without one, transformers puts such weights back into bfloat16 as it loads them."""
    kind = hf.quantizers.auto.FineGrainedFP8HfQuantizer
    monkeypatch.setattr(kind, "validate_environment", lambda *_, **__: None)


@pytest.mark.parametrize("name", OWN)
def test_of_a_checkpoint_that_transformers_quantised(name, tmp_path, capsys, a_gpu_for_fp8):
    configuration, settings = OWN[name]
    expected = said(quantised(saved(configuration, tmp_path), tmp_path, settings))
    assert len(expected) > 1 and report(tmp_path, capsys) == expected


def test_of_settings_in_the_configuration_of_the_text(tmp_path, capsys, a_gpu_for_fp8):
    """Where transformers looks next."""
    cls = saved("gemma3 that sees", tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    config.text_config.quantization_config = BLOCKS
    config.save_pretrained(tmp_path)
    expected = said(cls.from_pretrained(tmp_path))
    assert "2 patched (2 in part)" in expected[0] and report(tmp_path, capsys) == expected


@pytest.mark.parametrize("method", ("bitnet", "nosuch"))
def test_of_a_checkpoint_without_its_weights(method, tmp_path, capsys):
    """transformers makes no such weights, and loads as it is what nobody knows."""
    cls = saved("llama in bfloat16", tmp_path)
    configured(tmp_path, {"quant_method": method, "modules_to_not_convert": ["lm_head"]})
    expected = said(cls.from_pretrained(tmp_path, ignore_mismatched_sizes=True))
    assert ("in part" in expected[0]) == (method == "bitnet")
    assert report(tmp_path, capsys) == expected


def test_of_experts_in_mxfp4(tmp_path, capsys):
    """Only a GPU's kernels, which are fetched, take them: the modules alone are put in here."""
    from transformers.integrations.mxfp4 import replace_with_mxfp4_linear

    cls = saved("gpt_oss", tmp_path)
    configured(
        tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1.mlp"]}
    )
    model = cls.from_pretrained(tmp_path, quantization_config=hf.Mxfp4Config(dequantize=True))
    with mock.patch("transformers.integrations.hub_kernels.get_kernel"):
        by = hf.Mxfp4Config(modules_to_not_convert=["model.layers.1.mlp"])
        replace_with_mxfp4_linear(model, by, by.modules_to_not_convert)
    expected = said(model)
    known = (
        "what transformers.integrations.mxfp4.Mxfp4GptOssExperts makes of its weights is not known"
    )
    assert f"model.layers.0.mlp.experts (Mxfp4GptOssExperts): left, {known}" in expected
    assert report(tmp_path, capsys) == expected
