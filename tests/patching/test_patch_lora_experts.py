"""PEFT's adapters of stacked experts (target_parameters): moe_mlp on the weights to which PEFT adds
them for the length of a call."""

import pytest
import torch
from patch_lora import assert_alike, lines
from patch_models import KINDS, batch, build
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

import fusedmlp
from fusedmlp.patching import form

LORA = {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def adapted(patched=None, stacks=STACKS):
    model = mixtral()
    if patched == "before":
        fusedmlp.patch(model)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**LORA, target_parameters=stacks)).eval()
    if patched == "after":
        fusedmlp.patch(model)
    return model


@pytest.mark.parametrize("stacks", (STACKS, STACKS[1:]), ids=("both", "down"))
@pytest.mark.parametrize("patched", ("before", "after"))
def test_a_model(patched, stacks):
    """Logits and gradients of A and B, and what the report says."""
    ours, plain = adapted(patched, stacks), adapted(stacks=stacks)
    assert_alike(ours, plain, batch("llama"))
    by_op = {entry.op: entry for entry in lines(ours)}
    assert by_op.keys() == {"moe_mlp", "topk_route"}
    added = ", ".join(f"'default' of rank 3 to {s.rpartition('.')[2]}" for s in stacks[::-1])
    assert by_op["moe_mlp"].detail.endswith(f"; PEFT adds LoRA {added} before each call")
    fusedmlp.unpatch(ours)
    assert_alike(ours, plain, batch("llama"))


def test_it_does_as_before(tmp_path):
    ours, plain = adapted("after"), adapted()
    inputs = batch("llama")
    with ours.disable_adapter(), plain.disable_adapter():
        assert not any("PEFT" in entry.detail for entry in lines(ours))
        assert_alike(ours, plain, inputs)
    for model in (ours, plain):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA | {"r": 2}, target_parameters=STACKS))
        model.set_adapter("other")
    assert_alike(ours, plain, inputs)
    ours.save_pretrained(tmp_path)
    base = mixtral()
    fusedmlp.patch(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "other").eval()
    torch.testing.assert_close(loaded(**inputs).logits, plain(**inputs).logits)
    for method in ("merge_adapter", "unmerge_adapter"):
        getattr(ours, method)(), getattr(plain, method)()
        assert_alike(ours, plain, inputs)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, plain(**inputs).logits)
    assert len(fusedmlp.patch(merged).patched) == 2


def test_experts_are_looked_at_once(monkeypatch):
    """PEFT gives them another class at each call; after the first, what they are is known."""
    ours, looked = adapted("after"), []
    own = form._form_of
    monkeypatch.setattr(form, "_form_of", lambda module: looked.append(module) or own(module))
    for _ in range(2):
        ours(**batch("llama"))
    assert len(looked) == 1


def test_by_the_table_of_transformers():
    """Without patch(): their form is looked for while PEFT has its class around them."""
    ours, plain = adapted(), adapted()
    ours.base_model.model.set_experts_implementation("fusedmlp")
    assert_alike(ours, plain, batch("llama"))


@pytest.mark.parametrize(
    "name, own, why",
    (("llama4", {"target_parameters": ["experts.gate_up_proj"]}, "PEFT's ParamWrapper stands"),
     ("switch", {"target_modules": ["wi", "wo"]}, "an expert's wi is no plain Linear")),
)  # fmt: skip
def test_blocks_with_a_plan_of_their_own_are_left(name, own, why):
    """Patched before PEFT, their call raises: it would pass by the adapters."""
    models = []
    for when in ("after", "before", None):
        model = build(name, **KINDS[name]).eval()
        if when == "before":
            fusedmlp.patch(model)
        torch.manual_seed(1)
        models.append(get_peft_model(model, LoraConfig(**LORA | own)).eval())
    ours, before, plain = models
    left = [entry for entry in fusedmlp.patch(ours).left if "router" not in entry.name]
    assert left and all(entry.detail.startswith(why) for entry in left)
    assert_alike(ours, plain, batch(name))
    with pytest.raises(TypeError, match="which the fused call would pass by"):
        before(**batch(name))
