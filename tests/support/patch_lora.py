"""Models with PEFT's LoRA layers, the same every time, and what a report says of them."""

import torch
from patch_models import build
from peft import LoraConfig, get_peft_model

import fusedmlp

# Families whose blocks PEFT's "all-linear" adapts: gated, packed, plain, Conv1D, spread.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "phi3", "olmo", "gpt_neox", "gpt2", "bert")
PLAIN = ("gpt_neox", "gpt2", "bert")
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def adapted(name="llama", patched=None, dtype=torch.float32, **changes):
    """Patched before or after get_peft_model, or not at all."""
    torch.manual_seed(0)
    model = build(name).to(dtype).eval()
    options = {"dtype_check": dtype is not torch.float64}
    if patched == "before":
        fusedmlp.patch(model, **options)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**LORA | changes)).to(dtype).eval()
    if patched == "after":
        fusedmlp.patch(model, **options)
    return model


def pair(name="llama", patched="after", dtype=torch.float32, **changes):
    return adapted(name, patched, dtype, **changes), adapted(name, dtype=dtype, **changes)


def both(models, act):
    return [act(model) for model in models]


def lines(model):
    """But for BERT's head, which is tied to its embeddings."""
    return [e for e in fusedmlp.patch(model).entries if "tied: " not in e.detail]


def assert_fused(model, op="gated_mlp"):
    assert {(e.op, e.partly) for e in lines(model)} == {(op, False)}


def assert_partly(model, reason):
    entries = lines(model)
    assert entries and all(e.partly and reason in e.detail for e in entries)


def assert_alike(ours, plain, inputs, tolerance=None):
    """Their logits, and the gradients of everything that is trained. tolerance: of each tensor's
    norm, in the place of torch's of each element."""
    results = []
    for model in (ours, plain):
        model.zero_grad()
        out = model(**inputs)
        if out.loss.requires_grad:
            out.loss.backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": out.logits.detach(), **grads})
    assert results[0].keys() == results[1].keys()
    for key, mine in results[0].items():
        if tolerance is not None:
            error = (mine.double() - results[1][key].double()).norm()
            assert error <= tolerance * results[1][key].double().norm(), key
            continue
        torch.testing.assert_close(mine, results[1][key], msg=lambda m, k=key: f"{k}: {m}")
