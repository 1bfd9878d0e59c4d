"""A checkpoint's model without its weights: what a quantiser leaves, and what stays float32."""

import json
from types import SimpleNamespace

import pytest
import torch
from patch_models import build
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations import hub_kernels

from fusedmlp.patching.checkpoint import _converted, _in_place_of, _quantization, empty_model

PARTS = [f"mlp.{n}_proj" for n in ("gate", "up", "down")] + [f"self_attn.{n}_proj" for n in "qkvo"]
ALL = {f"model.layers.{i}.{part}" for i in (0, 1) for part in PARTS} | {"lm_head"}
SKIPS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "exclude")
# A quantiser's settings, and whether a projection stays.
SETTINGS = [
    ({}, lambda name: name == "lm_head"),
    *(({key: ["model.layers.1.mlp", "q_proj"]}, lambda name: "1.mlp" in name or "q_proj" in name)
      for key in SKIPS),
    ({"ignore": ["re:.*0.*down_proj", "o_proj"]},
     lambda name: "0.mlp.down" in name or "o_proj" in name),
    ({"modules_in_block_to_quantize": [["mlp.gate_proj"], ["mlp.up_proj"]]},
     lambda name: "gate" not in name and "up" not in name),
    ({"dequantize": True}, lambda name: True),
]  # fmt: skip


def of_llama(folder, **settings):
    config = build("llama").config
    config.architectures = ["LlamaForCausalLM"]
    for name, value in settings.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return empty_model(folder)


@pytest.mark.parametrize("row", range(len(SETTINGS)))
def test_what_a_quantiser_leaves(row, tmp_path):
    settings, stays = SETTINGS[row]
    model = of_llama(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, **settings})
    linear = {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear"}
    assert set(linear) == ALL
    assert {n for n, m in linear.items() if isinstance(m, nn.Linear)} == set(filter(stays, ALL))
    down = linear["model.layers.1.mlp.down_proj"]
    assert (down.in_features, down.out_features) == (96, 64)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_quantised_model_of_conv1d(tmp_path):
    """Which GPTQ converts and AWQ does not."""
    config = build("gpt2").config
    config.architectures = ["GPT2LMHeadModel"]
    found = {}
    for method in ("gptq", "awq"):
        config.quantization_config = {"quant_method": method, "bits": 4}
        config.save_pretrained(tmp_path)
        found[method] = empty_model(tmp_path).transformer.h[1].mlp.c_fc
    fc = found["gptq"]
    assert (type(fc).__name__, type(fc).__module__) == ("Linear", "gptq")
    assert (fc.in_features, fc.out_features) == (64, 256)
    assert type(found["awq"]).__name__ == "Conv1D"


def test_parts_that_stay_float32(tmp_path, monkeypatch):
    """By transformers' plan of dtypes, which it searches anywhere in a parameter's name."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["mlp", "v_pro"])
    model = of_llama(tmp_path, dtype=torch.bfloat16)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    names = [n for n, _ in model.named_parameters()]
    assert kept == {n for n in names if ".mlp." in n or ".v_proj." in n} != set(names)


def test_a_model_that_asks_for_a_kernel_as_it_is_built(tmp_path, monkeypatch):
    """By a function that its module has imported by name. It is told that there is none."""
    of_llama(tmp_path)  # saves its configuration
    fetched, fetch = [], lambda name, **_: fetched.append(name)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", fetch, raising=False)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    get_kernel, built = hub_kernels.get_kernel, LlamaForCausalLM.__init__

    def building(self, config):
        get_kernel("some/kernel", version=1)
        built(self, config)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", building)
    with pytest.raises(FileNotFoundError, match="no kernel is fetched for a report, .*some/kernel"):
        empty_model(tmp_path)
    assert not fetched and hub_kernels.get_kernel_hub is fetch
    get_kernel("some/kernel", version=1)
    assert fetched == ["some/kernel"]


@pytest.mark.parametrize("model_type", ("llama", "blip_text_model"))
def test_code_beside_a_configuration_is_neither_run_nor_asked_for(
    model_type, tmp_path, monkeypatch
):
    """Whether AutoModel knows the type, and takes its own class, or not."""
    asked = []
    monkeypatch.setattr("builtins.input", asked.append)
    settings = {"model_type": model_type, "auto_map": {"AutoModel": "mine.Model"}}
    settings |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                 "num_attention_heads": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('code beside a configuration was run')")
    if model_type == "llama":
        assert type(empty_model(tmp_path)).__name__ == "LlamaModel"
    else:
        with pytest.raises(ValueError, match="contains custom code"):
            empty_model(tmp_path)
    assert not asked


def test_nothing_takes_the_place_of_what_is_not_there(monkeypatch):
    monkeypatch.delattr(hub_kernels, "get_kernel_hub", raising=False)
    with _in_place_of("get_kernel_hub", lambda: None):
        assert not hasattr(hub_kernels, "get_kernel_hub")
    assert not hasattr(hub_kernels, "get_kernel_hub")


def test_settings_of_the_text_model_alone():
    settings = SimpleNamespace(to_dict=lambda: {"quant_method": "gptq"})
    text = SimpleNamespace(quantization_config=settings)
    config = SimpleNamespace(get_text_config=lambda decoder: text if decoder else None)
    assert _quantization(config) == {"quant_method": "gptq"}
    assert _quantization(SimpleNamespace(get_text_config=lambda decoder: None)) == {}
    assert _quantization(SimpleNamespace()) == {}


@pytest.mark.parametrize("here", (None, "cuda"))
def test_a_quantiser_is_asked_as_for_weights_on_one_device(here, monkeypatch):
    asked = []

    class Asked(Exception):
        pass

    def validate(**given):
        asked.append(given)
        raise Asked

    monkeypatch.setattr("transformers.utils.import_utils.get_current_accelerator", lambda: here)
    with pytest.raises(Asked):
        _converted(None, SimpleNamespace(validate_environment=validate))
    assert asked == [{"device_map": here and {"": here}, "weights_only": True}]
