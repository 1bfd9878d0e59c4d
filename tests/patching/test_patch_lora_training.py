"""Fine-tuning a patched model with PEFT's LoRA layers, inside what trainers put around it."""

import copy
import functools

import pytest
import torch
from patch_lora import LORA, adapted, both, pair
from patch_models import batch, build
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

import fusedmlp
from fusedmlp.testing import assert_close_to

STEPS = 50


def curve(model):
    """Losses of AdamW over the same two batches again and again."""
    inputs = [batch("llama", seed=seed) for seed in (0, 1)]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    losses = []
    for step in range(STEPS):
        loss = model(**inputs[step % 2]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_a_training_curve_is_pefts(name):
    """In float64, where float noise is 1e-16 and the least other formula would show; and in float32
    it is off by no more than the rule allows beside PEFT's own."""
    exact = curve(adapted(name, dtype=torch.float64))
    torch.testing.assert_close(curve(adapted(name, "after", torch.float64)), exact)
    assert exact[-1] < 0.9 * exact[0]
    ours, plain = both(pair(name), curve)
    assert_close_to(ours, exact, plain)


def results(model, inputs, run=None):
    """Loss, logits and gradients."""
    out = (model if run is None else run)(**inputs)
    out.loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def judged(ours, plain, exact):
    assert ours.keys() == plain.keys() == exact.keys()
    for key, t in ours.items():
        assert_close_to(t, exact[key], plain[key], name=key)


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_autocast(name):
    exact = results(adapted(name, dtype=torch.float64), batch(name))
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = both(pair(name), functools.partial(results, inputs=batch(name)))
    judged(ours, plain, exact)


def test_float32_adapters_on_a_bfloat16_base():
    """PEFT multiplies them in float32; the fused call in x's dtype, and says so."""
    base = build("llama").bfloat16().eval()
    plain = get_peft_model(base, LoraConfig(**LORA)).eval()
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    up = ours.base_model.model.model.layers[0].mlp.up_proj
    assert (up.base_layer.weight.dtype, up.lora_A.default.weight.dtype) == (
        torch.bfloat16, torch.float32,
    )  # fmt: skip
    report = fusedmlp.patch(ours)
    assert all("(float32, multiplied in x's dtype)" in e.detail for e in report.patched)
    y, expected, true = (model(**batch("llama")).logits for model in (ours, plain, exact))
    assert_close_to(y, true, expected)


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing(reentrant):
    ours, plain = pair()
    for model in (ours, plain):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mine, theirs = both((ours, plain), functools.partial(results, inputs=batch("llama")))
    assert mine.keys() == theirs.keys()
    for key, t in mine.items():
        torch.testing.assert_close(t, theirs[key], msg=lambda m, k=key: f"{k}: {m}")


def test_recompute_saves_x_alone():
    ours, plain = adapted(), adapted()
    assert all("saves x alone" in e.detail for e in fusedmlp.patch(ours, recompute=True).patched)
    mine, theirs = both((ours, plain), functools.partial(results, inputs=batch("llama")))
    for key, t in mine.items():
        torch.testing.assert_close(t, theirs[key], msg=lambda m, k=key: f"{k}: {m}")


def test_compiled_without_another_graph():
    graphs, found = [], []
    for patched in ("after", None):
        torch._dynamo.reset()
        model = adapted(patched=patched)
        counter = CompileCounterWithBackend("aot_eager")
        found.append(results(model, batch("llama"), torch.compile(model, backend=counter)))
        graphs.append(counter.frame_count)
    assert graphs[0] <= graphs[1]
    for key, t in found[0].items():
        torch.testing.assert_close(t, found[1][key], msg=lambda m, k=key: f"{k}: {m}")
