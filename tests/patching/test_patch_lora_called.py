"""LoRA layers of PEFT that a patched block has to call, and when: it switches by itself."""

import pytest
import torch
from patch_called import Quantised
from patch_lora import (
    LORA,
    PLAIN,
    adapted,
    assert_alike,
    assert_fused,
    assert_partly,
    lines,
    pair,
)
from patch_models import batch
from peft import LoraConfig
from torch import nn

import fusedmlp
from fusedmlp.patching.swap import Patched


@pytest.mark.parametrize("name", ("llama", "gpt2", "bert"))
def test_dropout_at_work_is_called_and_eval_is_fused(name):
    """Whichever it was in at patch()."""
    ours, plain = adapted(name, lora_dropout=0.5), adapted(name, lora_dropout=0.5)
    op = "mlp" if name in PLAIN else "gated_mlp"
    for model in (ours, plain):
        model.train()
    for training in (True, False, True):
        for model in (ours, plain):
            model.train(training)
        if training and op == "mlp":
            left = lines(ours)
            assert len(left) == 2 and not any(e.op for e in left)
            for entry in left:
                assert "lora_dropout 0.5 is at work" in entry.detail
                assert entry.detail.endswith("nothing to fuse with, as long as that is so")
        elif training:
            assert_partly(ours, "whose lora_dropout 0.5 is at work")
        else:
            assert_fused(ours, op)
        assert sum(isinstance(m, Patched) for m in ours.modules()) == 2
        results = []
        for model in (ours, plain):
            torch.manual_seed(3)
            results.append(model(**batch(name)).logits)
        torch.testing.assert_close(*results)


def test_a_plain_block_of_others_that_is_called_is_left():
    """What nobody's state will change is no reason to patch."""
    model = nn.Sequential(Quantised(nn.Linear(8, 12)), nn.GELU(), nn.Linear(12, 8))
    assert not fusedmlp.patch(model).patched
    assert not isinstance(model, Patched)


@pytest.mark.parametrize("path", ("c_fc", "c_proj"))
def test_a_plain_block_waits_for_no_base_that_is_called(path):
    """Its first projection will be called whatever its adapter's state is, and so may its last be:
    nothing of the block is fused where the first is called now."""
    model = adapted("gpt2", lora_dropout=0.5).train()
    block = model.base_model.model.transformer.h[0].mlp
    layer = getattr(block, path)
    layer.base_layer = Quantised(layer.base_layer)
    assert not isinstance(block, Patched) and fusedmlp.patch(model)
    assert not isinstance(block, Patched)
    first, second = lines(model)
    assert first.op is second.op is None
    assert not first.detail.endswith("as long as that is so")
    assert second.detail.endswith("as long as that is so")


def quantised(path):
    """A model whose projection `path` of the first block is of no class that is read, under LoRA's
    own layer, as PEFT's is around bitsandbytes'."""

    def make(patched):
        model = adapted(patched=patched)
        layer = model.get_submodule(f"base_model.model.model.layers.0.mlp.{path}")
        layer.base_layer = Quantised(layer.base_layer)
        return model

    return make


@pytest.mark.parametrize("path", ("gate_proj", "down_proj"))
def test_a_quantised_base_is_called(path):
    make = quantised(path)
    ours, plain = make("after"), make(None)
    first, second = lines(ours)
    why = f"{path} is a peft.tuners.lora.layer.Linear whose base is a patch_called.Quantised"
    assert first.partly and why in first.detail and not second.partly
    assert_alike(ours, plain, batch("llama"))


def test_what_is_called():
    inputs = batch("llama")
    ours, plain = pair(use_dora=True)
    assert_partly(ours, "is a DoraLinearVariant, not W + s B A")
    assert_alike(ours, plain, inputs)
    ours, plain = pair(r=257, target_modules=["up_proj"])
    assert_partly(ours, "whose rank 257 is not from 1 to 256")
    assert_alike(ours, plain, inputs)
    # PEFT parametrises a Linear's own weight for the length of a call.
    ours, plain = pair(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    assert_partly(ours, "up_proj is a peft.tuners.lora.layer.ParamWrapper")
    assert_alike(ours, plain, inputs)
    ours, plain = pair(target_modules=["gate_proj"], modules_to_save=["up_proj"])
    assert_partly(ours, "up_proj is a peft.utils.other.ModulesToSaveWrapper")
    assert_alike(ours, plain, inputs)
    ours, plain = pair()
    for model in (ours, plain):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA))
        model.base_model.set_adapter(["default", "other"])
    assert_partly(ours, "with 2 adapters active at once (default, other)")
    assert_alike(ours, plain, inputs)
    for model in (ours, plain):
        model.set_adapter("default")
    assert_fused(ours)
    names = {"adapter_names": ["other", "__base__"]}
    torch.testing.assert_close(ours(**inputs | names).logits, plain(**inputs | names).logits)


def test_a_hook_on_any_part_runs():
    ours, inputs = adapted(patched="after"), batch("llama")
    for part in ("", ".base_layer", ".lora_A.default", ".lora_B.default", ".lora_dropout.default"):
        seen = []
        module = ours.get_submodule(f"base_model.model.model.layers.0.mlp.up_proj{part}")
        hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        ours(**inputs)
        assert seen and lines(ours)[0].partly and not lines(ours)[1].partly
        hook.remove()
    assert_fused(ours)
