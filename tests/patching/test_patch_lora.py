"""patch() on PEFT's LoRA layers: one fused call, and all that PEFT does with them as before."""

import copy

import pytest
import torch
from patch_called import Quantised
from patch_lora import (
    FAMILIES,
    LORA,
    adapted,
    assert_alike,
    assert_fused,
    assert_partly,
    lines,
    pair,
)
from patch_models import batch, build
from peft import LoraConfig, PeftModel, get_peft_model
from test_patch_called import Saved
from torch import nn

import fusedmlp
from fusedmlp.patching.swap import Patched

PLAIN = ("gpt_neox", "gpt2", "bert")


@pytest.mark.parametrize("patched", ("before", "after"))
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, patched):
    ours, plain = pair(name, patched)
    keys = list(plain.state_dict())
    assert_fused(ours, "mlp" if name in PLAIN else "gated_mlp")
    assert all("LoRA inside: " in entry.detail for entry in lines(ours))
    assert_alike(ours, plain, batch(name))
    assert list(ours.state_dict()) == keys
    fusedmlp.unpatch(ours)
    assert_alike(ours, plain, batch(name))


def test_a_block_with_dropout_between_as_t5_has_it():
    """The dropout of a gated T5 is at work in training: its layers are called there."""
    import transformers as hf

    config = hf.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=99,
        feed_forward_proj="gated-gelu", dropout_rate=0.5, decoder_start_token_id=0,
    )  # fmt: skip
    models = []
    for patched in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(hf.T5ForConditionalGeneration(config), LoraConfig(**LORA)).eval()
        if patched:
            assert not fusedmlp.patch(model).partly
        models.append(model)
    ids = batch("llama")["input_ids"]
    inputs = {"input_ids": ids, "labels": ids}
    assert_alike(*models, inputs)
    logits = []
    for model in models:
        model.train()
        torch.manual_seed(3)
        logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits)
    assert_partly(models[0], "is a peft.tuners.lora.layer.Linear")


@pytest.mark.parametrize(
    "changes", ({"use_rslora": True}, {"lora_alpha": 1},
                {"lora_bias": True, "target_modules": ["gate_proj", "down_proj"]},
                {"target_modules": ["up_proj"]}, {"modules_to_save": ["lm_head"]},
                {"rank_pattern": {"gate_proj": 7}, "alpha_pattern": {"up_proj": 3}}),
    ids=("rslora", "alpha", "bias", "up alone", "modules_to_save", "ranks and scales apart"),
)  # fmt: skip
def test_what_is_fused(changes):
    ours, plain = pair(**changes)
    assert_fused(ours)
    assert_alike(ours, plain, batch("llama"))


def test_peft_does_as_before(tmp_path):
    """Disabled, merged, both, another adapter, of two a sum, saved and loaded, merged for good."""
    models = ours, plain = pair()
    inputs = batch("llama")
    with ours.disable_adapter(), plain.disable_adapter():
        assert_fused(ours)
        assert not any("LoRA" in entry.detail for entry in lines(ours))
        assert_alike(ours, plain, inputs)
    for method in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        getattr(ours, method)(), getattr(plain, method)()
        assert_fused(ours)
        assert_alike(ours, plain, inputs)
    with ours.disable_adapter(), plain.disable_adapter():
        assert_partly(ours, "that is merged and disabled, which its next call unmerges")
        assert_alike(ours, plain, inputs)
        assert_fused(ours)
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA | {"r": 3}))
        model.set_adapter("other")
    assert_fused(ours)
    assert all("'other' of rank 3" in entry.detail for entry in lines(ours))
    assert_alike(ours, plain, inputs)
    ours.save_pretrained(tmp_path)
    for name, active in (("both", "rank 7"), ("default", "rank 4")):
        for model in models:
            if name == "both":
                model.add_weighted_adapter(["default", "other"], [0.5, 2.0], name, "cat")
            model.set_adapter(name)
        assert_fused(ours)
        assert all(f"{name!r} of {active}" in entry.detail for entry in lines(ours))
        assert_alike(ours, plain, inputs)
    base = build("llama").eval()
    fusedmlp.patch(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "other").eval()
    assert_fused(loaded)
    plain.set_adapter("other")
    torch.testing.assert_close(loaded(**inputs).logits, plain(**inputs).logits)
    merged = ours.merge_and_unload()
    assert_fused(merged)
    plain.set_adapter("default")
    torch.testing.assert_close(merged(**inputs).logits, plain(**inputs).logits)


def test_nothing_of_a_state_dict_changes():
    ours, plain = pair()
    state = copy.deepcopy(plain.state_dict())
    assert_alike(ours, plain, batch("llama"))
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(t, state[key]) for key, t in ours.state_dict().items())
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in plain.named_parameters() if p.requires_grad
    ]


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
    ours, plain = pair()
    for model in (ours, plain):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA))
        model.base_model.set_adapter(["default", "other"])
    assert_partly(ours, "with 2 adapters active at once (default, other)")
    assert_alike(ours, plain, inputs)
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


def test_a_base_is_looked_at_as_a_projection_is():
    """Its dtype and its ties at patch(), its width in the report, whatever the adapters are."""
    for changes in ({}, {"use_dora": True}):
        model = adapted(**changes).double()
        assert all("its dtypes are torch.float64" in e.detail for e in fusedmlp.patch(model).left)
        assert not fusedmlp.patch(model).patched
    model = adapted()
    mlps = [layer.mlp for layer in model.base_model.model.model.layers]
    mlps[1].up_proj.base_layer.weight = mlps[0].up_proj.base_layer.weight
    report = fusedmlp.patch(model)
    assert len(report.left) == 2 and "tied: up_proj.weight also is" in report.left[0].detail
    base = build("llama", intermediate_size=97, num_hidden_layers=1)
    model = get_peft_model(base, LoraConfig(**LORA)).eval()
    (entry,) = fusedmlp.patch(model).patched
    assert any("width 97 of down_proj.base_layer.weight" in slow for slow in entry.slow)
    block = model.base_model.model.model.layers[0].mlp
    names = [name for name, _ in block._plan.matrices(block)]
    assert names == [f"{p}_proj.base_layer.weight" for p in ("gate", "up", "down")]


def test_one_bit_takes_no_block_with_adapters():
    base = build("llama", hidden_size=128, intermediate_size=128)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj is a peft\.tuners\.lora\.layer\.Linear"):
        fusedmlp.patch(model, quantize="q1_0")


def test_batch_invariant(each_backend):
    """The reference keeps the promise with adapters; the kernels refuse them, and take what is
    merged. A block that is not all fused is refused on both."""
    ours, plain = adapted(), adapted()
    report = fusedmlp.patch(ours, batch_invariant=True)
    assert all(e.detail.endswith("by the reference alone, which kernels refuse")
               for e in report.patched)  # fmt: skip
    inputs = batch("llama")
    if each_backend == "triton":
        with pytest.raises(RuntimeError, match="gated_mlp: lora must be None inside batch_inv"):
            ours(**inputs)
    else:
        assert_alike(ours, plain, inputs)
        block = ours.base_model.model.model.layers[0].mlp
        x = torch.randn(33, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(block(x)[5:6], block(x[5:6]))
    ours.merge_adapter()
    block = ours.base_model.model.model.layers[0].mlp
    assert "LoRA" not in repr(block)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), plain.base_model.model.model.layers[0].mlp(x))
    dropping = adapted(lora_dropout=0.5)
    fusedmlp.patch(dropping, batch_invariant=True)
    with pytest.raises(TypeError, match=r"gated_mlp must be fused, got gated_act, .*0\.5 is"):
        dropping.train()(**inputs)


@pytest.mark.interpreter
def test_what_it_saves():
    """2 T x H values less than the unpatched block, as a block without adapters."""
    T, H = 16, 96
    ours = adapted(target_modules=["gate_proj", "up_proj", "down_proj"])
    block = ours.base_model.model.model.layers[0].mlp
    x = torch.randn(T, 64).requires_grad_()
    with fusedmlp.backend("triton"):
        before, expected = Saved(block).of(lambda: block(x))
        assert not fusedmlp.patch(block).partly
        after, y = Saved(block).of(lambda: block(x))
    torch.testing.assert_close(y, expected)
    assert before - after >= 4 * 2 * T * H
