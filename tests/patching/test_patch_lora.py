"""patch() on PEFT's LoRA layers: one fused call, and all that PEFT does with them as before."""

import copy
from types import SimpleNamespace

import pytest
import torch
from patch_lora import (
    FAMILIES,
    LORA,
    PLAIN,
    adapted,
    assert_alike,
    assert_fused,
    assert_partly,
    lines,
    pair,
)
from patch_models import batch, build
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layers
from test_patch_called import Saved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fusedmlp
from fusedmlp.distributed import TensorParallelMLP
from fusedmlp.patching import lora as patching_lora

HOME = peft_layers.__name__


@pytest.mark.parametrize("patched", ("before", "after"))
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, patched):
    ours, plain = pair(name, patched)
    keys = list(plain.state_dict())
    assert_fused(ours, "mlp" if name in PLAIN else "gated_mlp")
    for entry in lines(ours):
        assert "LoRA inside: " in entry.detail
        assert "LoRA inside: " in ours.get_submodule(entry.name).extra_repr()
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


def test_a_tensor_parallel_plan_refuses_adapters():
    block = adapted(patched="after").base_model.model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"gate_proj of LlamaMLP must be .*lora\.layer\.Lin"):
        TensorParallelMLP()._apply(block, None)


def test_batch_invariant(each_backend):
    """The promise holds with adapters, merged or not. A block that is not all fused is refused."""
    ours, plain = adapted(), adapted()
    fusedmlp.patch(ours, batch_invariant=True)
    inputs = batch("llama")
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
    """The table of docs/guides/lora.md: bytes beyond x, and FLOPs, of PEFT's block, of one whose
    projections are called, and of one that is fused whole."""
    T, D, H, r = 16, 64, 96, 4
    ours = adapted(target_modules=["gate_proj", "up_proj", "down_proj"], r=r)
    block = ours.base_model.model.model.layers[0].mlp
    x = torch.randn(T, D).requires_grad_()
    flops = 12 * T * D * H + 3 * 3 * 2 * T * r * (D + H)
    hook = block.gate_proj.register_forward_hook(lambda *_: None)
    with fusedmlp.backend("triton"):
        for hidden in (4, 3, 2):
            if hidden == 3:
                assert fusedmlp.patch(block).partly
            if hidden == 2:
                hook.remove()
                assert not fusedmlp.patch(block).partly
            nbytes, y = Saved(block).of(lambda: block(x))
            assert nbytes == 4 * T * (D + hidden * H + 3 * r)
            with FlopCounterMode(display=False) as counted:
                block(x).sum().backward()
            assert counted.get_total_flops() == flops


KINDS = [
    kind
    for kind in vars(peft_layers).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == HOME
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_base_is_read_of_a_linear_alone(kind):
    """And not where it is one of the other layers in PEFT's file."""
    layer = kind.__new__(kind)
    vars(layer)["base_layer"] = base = nn.Linear(2, 2)
    assert patching_lora.base_of(layer) is (base if kind is peft_layers.Linear else layer)


@pytest.mark.parametrize(
    "state, names",
    [
        ({}, ["a"]),
        ({"_active_adapter": "a"}, ["a"]),
        ({"_active_adapter": "c"}, []),
        ({"lora_A": {"a": 1, "b": 2}}, ["a", "b"]),
        ({"lora_A": {}}, []),
        ({"_disable_adapters": True}, []),
        ({"merged_adapters": ["b"]}, []),
    ],
)
def test_which_adapters_are_active(state, names):
    """Those that the layer has, while none is merged or off."""
    own = {"_disable_adapters": False, "merged_adapters": [], "_active_adapter": ["a", "b"]}
    layer = SimpleNamespace(**{**own, "lora_A": {"a": 1}, **state})
    assert patching_lora.active(layer) == names
