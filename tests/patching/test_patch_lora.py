"""patch() on PEFT's LoRA layers: one fused call, and all that PEFT does with them as before."""

import contextlib

import pytest
import torch
from patch_models import batch, build
from peft import LoraConfig, PeftModel, get_peft_model
from test_patch_called import Saved

import fusedmlp

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "gpt2")
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def adapted(name="llama", patched=None, **changes):
    """The same model every time, patched before or after get_peft_model, or not at all."""
    torch.manual_seed(0)
    model = build(name).eval()
    if patched == "before":
        fusedmlp.patch(model)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**LORA | changes)).eval()
    if patched == "after":
        fusedmlp.patch(model)
    return model


def pair(name="llama", patched="after", **changes):
    return adapted(name, patched, **changes), adapted(name, **changes)


def lines(model):
    return fusedmlp.patch(model).entries


def assert_fused(model, op="gated_mlp"):
    assert {(e.op, e.partly) for e in lines(model)} == {(op, False)}


def assert_partly(model, reason):
    entries = lines(model)
    assert entries and all(e.partly and reason in e.detail for e in entries)


def assert_alike(ours, plain, inputs):
    torch.testing.assert_close(ours(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("patched", ("before", "after"))
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, patched):
    ours, plain = pair(name, patched)
    inputs = batch(name)
    assert_fused(ours, "mlp" if name.startswith("gpt") else "gated_mlp")
    assert all("LoRA inside: " in entry.detail for entry in lines(ours))
    assert_alike(ours, plain, inputs)
    for model in (ours, plain):
        model(**inputs).loss.backward()
    trained = dict(plain.named_parameters())
    for key, p in ours.named_parameters():
        assert (p.grad is None) == (trained[key].grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, trained[key].grad, msg=lambda m, k=key: f"{k}: {m}")
    assert ours.state_dict().keys() == plain.state_dict().keys()
    fusedmlp.unpatch(ours)
    assert_alike(ours, plain, inputs)


@pytest.mark.parametrize(
    "changes", ({"use_rslora": True},
                {"lora_bias": True, "target_modules": ["gate_proj", "down_proj"]},
                {"target_modules": ["up_proj"]}, {"modules_to_save": ["lm_head"]}),
    ids=("rslora", "bias", "up alone", "modules_to_save"),
)  # fmt: skip
def test_what_is_fused(changes):
    ours, plain = pair(**changes)
    assert_fused(ours)
    assert_alike(ours, plain, batch("llama"))


def test_a_training_curve():
    inputs, curves = batch("llama"), []
    for model in pair():
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
        curves.append([])
        for _ in range(50):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.detach())
    ours, plain = map(torch.stack, curves)
    assert plain[-1] < 0.9 * plain[0]
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_peft_does_as_before(tmp_path):
    """Disabled, merged, both, another adapter, saved and loaded: each call reads the state."""
    ours, plain = pair()
    inputs = batch("llama")
    with ours.disable_adapter(), plain.disable_adapter():
        assert_fused(ours)
        assert_alike(ours, plain, inputs)
    for method in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        getattr(ours, method)(), getattr(plain, method)()
        assert_fused(ours)
        assert_alike(ours, plain, inputs)
    with ours.disable_adapter(), plain.disable_adapter():
        assert_partly(ours, "that is merged and disabled, which its next call unmerges")
        assert_alike(ours, plain, inputs)
        assert_fused(ours)
    for model in (ours, plain):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA | {"r": 3}))
        model.set_adapter("other")
    assert_fused(ours)
    assert all("'other' of rank 3" in entry.detail for entry in lines(ours))
    assert_alike(ours, plain, inputs)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = build("llama").eval()
    fusedmlp.patch(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "other").eval()
    assert_fused(loaded)
    assert_alike(loaded, plain, inputs)


def test_what_is_called():
    inputs = batch("llama")
    ours, plain = pair(lora_dropout=0.5)
    assert_fused(ours)
    ours.train(), plain.train()
    assert_partly(ours, "whose lora_dropout 0.5 is at work")
    results = []
    for model in (ours, plain):
        torch.manual_seed(3)
        results.append(model(**inputs).logits)
    torch.testing.assert_close(*results)
    ours, plain = pair(use_dora=True)
    assert_partly(ours, "is a DoraLinearVariant, not W + s B A")
    assert_alike(ours, plain, inputs)
    ours, plain = pair()
    for model in (ours, plain):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA))
        model.base_model.set_adapter(["default", "other"])
    assert_partly(ours, "with 2 adapters active at once (default, other)")
    assert_alike(ours, plain, inputs)
    names = {"adapter_names": ["other", "__base__"]}
    assert_alike(ours, plain, inputs | names)


def test_a_hook_on_any_part_runs():
    for part in ("", ".base_layer", ".lora_A.default", ".lora_B.default", ".lora_dropout.default"):
        ours, seen = adapted(patched="after"), []
        module = ours.get_submodule(f"base_model.model.model.layers.0.mlp.up_proj{part}")
        module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        ours(**batch("llama"))
        assert seen and lines(ours)[0].partly and not lines(ours)[1].partly


@pytest.mark.parametrize("way", ("autocast", "checkpointing", "compile"))
def test_with(way):
    ours, plain = pair()
    inputs, around = batch("llama"), contextlib.nullcontext()
    if way == "autocast":
        around = torch.autocast("cpu", torch.bfloat16)
    if way == "checkpointing":
        for model in (ours, plain):
            model.train()
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
    run = torch.compile(ours, backend="aot_eager") if way == "compile" else ours
    with around:
        losses = [run(**inputs).loss, plain(**inputs).loss]
    for loss in losses:
        loss.backward()
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if way == "autocast" else {}
    torch.testing.assert_close(*losses, **tolerance)
    trained = dict(plain.named_parameters())
    for key, p in ours.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, trained[key].grad, **tolerance)


def test_float32_adapters_on_a_bfloat16_base():
    """PEFT multiplies them in float32; the fused call in x's dtype, and says so."""
    torch.manual_seed(0)
    models = [build("llama").bfloat16().eval() for _ in range(2)]
    for k, model in enumerate(models):
        torch.manual_seed(1)
        models[k] = get_peft_model(model, LoraConfig(**LORA)).eval()
    models[1].load_state_dict(models[0].state_dict())
    assert models[0].base_model.model.model.layers[0].mlp.up_proj.lora_A.default.weight.dtype == (
        torch.float32
    )
    report = fusedmlp.patch(models[0])
    assert all("(float32, multiplied in x's dtype)" in e.detail for e in report.patched)
    y, expected = (model(**batch("llama")).logits.float() for model in models)
    assert (y - expected).norm() < 0.03 * expected.norm()


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
