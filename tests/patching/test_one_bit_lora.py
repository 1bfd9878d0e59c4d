"""PEFT's adapters on one-bit models: A and B train, bits and scales stay."""

import contextlib
import copy
import pickle

import pytest
import torch
from patch_lora import assert_alike
from patch_models import batch, build
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import one_bit_lora
from fusedmlp.layers import BinaryGatedMLP, BinaryLinear, binary

PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "target_modules": PROJECTIONS, "init_lora_weights": False}


def one_bit():
    model = build("llama", hidden_size=128, intermediate_size=256, mlp_bias=False).eval()
    fusedmlp.patch(model, quantize="q1_0")
    return model


def adapted(**changes):
    model = one_bit()
    torch.manual_seed(1)
    return get_peft_model(model, one_bit_lora(LoraConfig(**LORA | changes))).eval()


def dense(model):
    """The same model with each one-bit layer as an nn.Linear, under PEFT's own LoRA."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, BinaryGatedMLP):
            for path in PROJECTIONS:
                lora = getattr(layer, path)
                bits = lora.base_layer.packed
                linear = nn.Linear(bits.shape[1], bits.shape[0], bias=False)
                linear.weight = nn.Parameter(bits.dequantize(torch.float32), requires_grad=False)
                lora.base_layer, lora.__class__ = linear, Linear
            call = lambda x, m=layer: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))  # noqa: E731
            layer.forward = call
    return plain


def test_it_is_pefts_on_the_same_weights(each_backend):
    """Logits and the gradients of A and B, of a model whose weights are those bits as floats."""
    model = adapted()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 3 and all(".lora_" in name for name in trained)
    assert_alike(model, dense(model), batch("llama"))


def test_a_step_leaves_the_bits():
    model = adapted(init_lora_weights=True)
    bits = {n: t.clone() for n, t in model.named_buffers() if "packed" in n}
    assert len(bits) == 2 * 3 * 2
    base, inputs = one_bit(), batch("llama")
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)  # B is 0
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(t, bits[n]) for n, t in model.named_buffers() if n in bits)


def test_peft_does_as_it_does(tmp_path):
    model, inputs = adapted(), batch("llama")
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, one_bit()(**inputs).logits)
    model.save_pretrained(tmp_path)
    config = one_bit_lora(PeftConfig.from_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(one_bit(), tmp_path, config=config).eval()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"must stay beside its one-bit layer, got merge\(\)"):
            merge()
    unloaded = model.unload()
    torch.testing.assert_close(unloaded(**inputs).logits, one_bit()(**inputs).logits)


def add(model):
    torch.manual_seed(2)
    same = LORA | {"target_modules": ["up_proj", "down_proj"]}
    model.add_adapter("other", one_bit_lora(LoraConfig(**same)))
    model.base_model.set_adapter(["default", "other"])


HOOK = lambda *_: None  # noqa: E731
# What stands in the way of one call: the report's reason, and what brings it about and ends it.
IN_THE_WAY = {
    "whose lora_dropout 0.5 is at work": (lambda m: m.train(), lambda m: m.eval()),
    "with 2 adapters active at once (default, other)": (add, lambda m: m.set_adapter("other")),
    "that has hooks": (lambda m: hook(m, "up_proj"), None),
    "is around a BinaryLinear that has hooks": (lambda m: hook(m, "up_proj.base_layer"), None),
    "gate_proj has hooks": (lambda m: hook(m, "gate_proj"), None),
}


def hook(model, path):
    for layer in model.modules():
        if isinstance(layer, BinaryGatedMLP):
            layer.get_submodule(path).register_forward_hook(HOOK)


def calls_of(model, inputs):
    """Which functions of the package a model's one-bit blocks call."""
    called = []
    with pytest.MonkeyPatch.context() as m:
        for name in ("binary_gated_mlp", "gated_act", "gated_mlp"):
            own = getattr(binary, name)
            note = lambda *a, name=name, own=own, **k: called.append(name) or own(*a, **k)  # noqa: E731
            m.setattr(binary, name, note)
        model(**inputs)
    return called


@pytest.mark.parametrize("reason", IN_THE_WAY)
def test_one_call_where_nothing_stands_in_the_way(reason):
    """The report, explain() and the call agree, then and once it is out of the way."""
    begin, end = IN_THE_WAY[reason]
    model = adapted(target_modules=["up_proj", "down_proj"], lora_dropout=0.5)
    mlp, inputs = model.base_model.model.model.layers[0].mlp, batch("llama")
    steps = [(None, "binary_gated_mlp"), (begin, "gated_act"), (end, "binary_gated_mlp")]
    for step, op in steps[: 3 if end else 2]:
        if step is not None:
            step(model)
        first, second = fusedmlp.patch(model).patched
        assert first.op == second.op == op and first.partly == (op == "gated_act")
        assert calls_of(model, inputs) == [op] * 2
        if first.partly:
            begins = "activation 'silu'; up_proj, down_proj adapted, so projections are called, as "
            assert first.detail.startswith(begins) and first.detail.endswith(reason)
            assert f"adapted ['up_proj', 'down_proj'], {'gate' if 'gate' in reason else 'up'}" in (
                fusedmlp.explain(mlp)
            )
        else:
            assert first.detail == "activation 'silu'; LoRA inside: up_proj, down_proj"
            assert "adapters inside: ['up_proj', 'down_proj']" in fusedmlp.explain(mlp)
    assert fusedmlp.quantize_model(model).layers == ()


@pytest.mark.interpreter
def test_batch_invariance_calls_projections(on_triton):
    """The kernels promise nothing with adapters."""
    model, x = adapted(), torch.randn(3, 128)
    mlp = model.base_model.model.model.layers[0].mlp
    y = mlp(x)
    with fusedmlp.batch_invariant():
        torch.testing.assert_close(mlp(x), y)
        assert "batch_invariant() is on" in mlp.path()


@pytest.mark.parametrize("how", ("bfloat16", "autocast", "lora_bias", "recompute", "disabled"))
def test_as_called(how):
    """One call gives what its projections give one by one, and the same gradients."""
    model = adapted(lora_bias=how == "lora_bias")
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.recompute = how == "recompute"
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    if how == "lora_bias":
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(p)
    results = []
    for called in (False, True):
        if called:
            mlp.up_proj.register_forward_hook(HOOK)
        own = x.clone().requires_grad_()
        off = model.disable_adapter() if how == "disabled" else contextlib.nullcontext()
        with off, torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            y = mlp(own)
        y.float().square().sum().backward()
        trained = {n: p.grad for n, p in mlp.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "dx": own.grad, **trained})
        model.zero_grad()
    ours, expected = results
    assert ours.keys() == expected.keys() and ours["y"].dtype == (
        torch.float32 if how not in ("bfloat16", "autocast") else torch.bfloat16
    )
    tolerance = 3e-2 if ours["y"].dtype == torch.bfloat16 else 1e-5
    for key, t in ours.items():
        error, size = (t.double() - expected[key].double()).norm(), expected[key].double().norm()
        assert error <= tolerance * size, key


def test_a_layer_alone_and_one_that_is_not_packed():
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for make in (lambda m: m, BinaryLinear.pack):
        torch.manual_seed(0)
        layer = make(BinaryLinear(128, 64))
        model = nn.ModuleDict({"norm": nn.LayerNorm(128), "layer": layer})
        y = layer(x)
        config = one_bit_lora(LoraConfig(**LORA | {"target_modules": ["layer"]}))
        lora = get_peft_model(model, config).base_model.model["layer"]
        a, b = lora.lora_A.default.weight, lora.lora_B.default.weight
        torch.testing.assert_close(lora(x), y + lora.scaling["default"] * x @ a.T @ b.T)
        assert all(p.requires_grad == (p is a or p is b) for p in lora.parameters())
    assert layer.qweight is layer.packed.qweight
    assert not hasattr(BinaryLinear(128, 64), "qweight")


def test_a_model_and_its_configuration_are_pickled():
    """As PEFT's are: torch.save(model), and processes that are spawned."""
    model, inputs = adapted(), batch("llama")
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    config = one_bit_lora(LoraConfig(**LORA))
    assert pickle.loads(pickle.dumps(config))._custom_modules == config._custom_modules


def test_errors():
    with pytest.raises(TypeError, match="config must be a peft.LoraConfig, got dict"):
        one_bit_lora({})
    for first in ("pissa", "olora", "orthogonal"):
        with pytest.raises(ValueError, match=f"init_lora_weights must be True, .* got '{first}'"):
            one_bit_lora(LoraConfig(init_lora_weights=first))
    with pytest.raises(ValueError, match="unsupported variant"):
        adapted(use_dora=True)
