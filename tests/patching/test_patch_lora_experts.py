"""PEFT's adapters of stacked experts (target_parameters), inside moe_mlp: no weight W + s B A is
made, but where PEFT must make it."""

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from patch_lora import assert_alike, lines
from patch_models import KINDS, batch, build
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer
from transformers import MixtralConfig, MixtralForCausalLM

import fusedmlp
from fusedmlp.distributed import expert_parallel_plan
from fusedmlp.packing import ORDERS, halves
from fusedmlp.patching import form, lora_experts
from fusedmlp.patching.form import Form
from fusedmlp.testing.memory import kept_bytes

LORA = {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def adapted(patched=None, stacks=STACKS, **changes):
    model = mixtral()
    if patched == "before":
        fusedmlp.patch(model)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**LORA | changes, target_parameters=stacks)).eval()
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
    inside = ", ".join(f"{s.rpartition('.')[2]} 'default' of rank 3" for s in stacks[::-1])
    assert by_op["moe_mlp"].detail.endswith(f"; LoRA inside: {inside}")
    fusedmlp.unpatch(ours)
    assert not any("_activate_lora" in vars(m) for m in ours.modules())
    assert_alike(ours, plain, batch("llama"))


@contextlib.contextmanager
def merges(monkeypatch):
    """Which classes of PEFT's make a merged weight, each time that one does."""
    made = []
    with monkeypatch.context() as m:
        for kind in (layer._LoraFactorsProxy, layer._LoraParameterProxy):
            own = kind.forward
            note = lambda self, w, own=own: made.append(type(self).__name__) or own(self, w)  # noqa: E731
            m.setattr(kind, "forward", note)
        yield made


@pytest.mark.parametrize("stacks", (STACKS, STACKS[1:]), ids=("both", "down"))
def test_no_merged_weight_is_made(stacks, monkeypatch):
    """Patched before PEFT, only the one that a check of torch's parametrizations makes and drops;
    patched again, none."""
    after, before = adapted("after", stacks), adapted("before", stacks)
    for model, per_stack in ((after, 0), (before, 1), (adapted(stacks=stacks), 2)):
        model(**batch("llama"))  # a first call looks at the experts themselves
        with merges(monkeypatch) as made:
            model(**batch("llama")).loss.backward()
        assert len(made) == per_stack * len(stacks)
    assert len(fusedmlp.patch(before).patched) == 2
    with merges(monkeypatch) as made:
        before(**batch("llama")).loss.backward()
    assert not made


@pytest.mark.interpreter
@pytest.mark.parametrize("patched", ("before", "after"))
def test_no_merged_weight_is_saved(patched):
    """What a step keeps, of the model patched and not: the merged weights are the difference, with
    act(g) and what the library keeps between experts against products with A."""
    kept = []
    for model in (adapted(patched), adapted()):
        call = lambda m=model: m(**batch("llama")).loss  # noqa: E731
        with fusedmlp.backend("triton" if kept == [] else "auto"):
            kept.append(kept_bytes(call, model.parameters()))
    experts = adapted().base_model.model.model.layers[0].mlp.experts.get_base_layer()
    merged = sum(p.nbytes for p in experts.parameters())
    assert kept[0] + merged <= kept[1]


@pytest.mark.parametrize("how", ("checkpoint", "autocast", "bfloat16", "copy", "pickle", "compile"))
def test_as_any_patched_model(how, monkeypatch):
    ours, plain = adapted("after"), adapted()
    context, tolerance = contextlib.nullcontext, None
    if how == "checkpoint":
        for model in (ours, plain):
            model.gradient_checkpointing_enable()
            model.train()
    elif how == "autocast":
        context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        tolerance = 3e-2
    elif how == "bfloat16":
        ours, plain, tolerance = ours.bfloat16(), plain.bfloat16(), 3e-2
    elif how != "compile":
        ours = copy.deepcopy(ours) if how == "copy" else pickle.loads(pickle.dumps(ours))
    with context(), merges(monkeypatch) as made:
        if how == "compile":
            ours.compile(backend="eager", fullgraph=True)  # which PEFT's own way breaks
        assert_alike(ours, plain, batch("llama"), tolerance)
    assert len(made) in (4, 8)  # the unpatched model's own, at each forward


CONFIGURATIONS = (
    {"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"r": 1},
    {"r": 64, "use_rslora": True}, {"rank_pattern": {".*gate_up_proj": 2}},
    {"init_lora_weights": True}, {"inference_mode": True},
)  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("patched", ("before", "after"))
def test_configurations(patched, changes):
    ours, plain = adapted(patched, **changes), adapted(**changes)
    assert_alike(ours, plain, batch("llama"))


@pytest.mark.parametrize("patched", ("before", "after"))
def test_experts_that_train_too(patched):
    ours, plain = adapted(patched), adapted()
    for model in (ours, plain):
        model.base_model.model.model.layers[0].mlp.experts.get_base_layer().requires_grad_(True)
    assert_alike(ours, plain, batch("llama"))


def test_an_adapter_is_deleted():
    ours, plain = adapted("after"), adapted()
    for model in (ours, plain):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA | {"r": 2}, target_parameters=STACKS))
        model.delete_adapter("default")
        model.set_adapter("other")
    assert_alike(ours, plain, batch("llama"))


def test_what_peft_adds_as_before():
    """Several adapters at once; the report says why, and the rest of the wrappers is read."""
    ours, plain = adapted("after"), adapted()
    for model in (ours, plain):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA | {"r": 2}, target_parameters=STACKS))
        model.base_model.set_adapter(["default", "other"])
    (entry,) = [entry for entry in lines(ours) if entry.op == "moe_mlp"]
    assert "; PEFT adds LoRA 'default' of rank 3 and 'other' of rank 2 to down_proj" in entry.detail
    assert "2 adapters are active at once (default, other)" in entry.detail
    assert_alike(ours, plain, batch("llama"))
    for model in (ours, plain):
        model.set_adapter("other")
        wrapper = model.base_model.model.model.layers[0].mlp.experts
        wrapper.merge()
        assert len(wrapper.merged_adapters) == 1 and not wrapper.base_layer.merged_adapters
    (entry,) = [entry for entry in lines(ours) if entry.op == "moe_mlp"]
    assert entry.detail.endswith("; LoRA inside: gate_up_proj 'other' of rank 2")
    assert_alike(ours, plain, batch("llama"))


def test_a_forward_that_reads_no_adapters_is_an_error(monkeypatch):
    """The class's forward replaced after patch() runs in the place of ours."""
    ours = adapted("after")
    experts = ours.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    monkeypatch.setattr(experts._own_class, "forward", lambda self, x, *_: x)
    with pytest.raises(TypeError, match="MixtralExperts: its forward must be that of patch"):
        ours(**batch("llama"))


def test_patched_for_a_while():
    """What was attached inside is PEFT's own afterwards; what was before stays."""
    model = adapted()
    for outer in (False, True):
        if outer:
            fusedmlp.patch(model)
        with fusedmlp.patched(model):
            assert sum("_activate_lora" in vars(m) for m in model.modules()) == 2
        assert sum("_activate_lora" in vars(m) for m in model.modules()) == 2 * outer


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
    ours, looked = adapted("before"), []
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


OWN = {
    "llama4": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "switch": {"target_modules": ["wi", "wo"]},
}


def block_of_its_own(name, patched=None):
    model = build(name, **KINDS[name]).eval()
    if patched == "before":
        fusedmlp.patch(model)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**LORA | OWN[name])).eval()
    if patched == "after":
        fusedmlp.patch(model)
    return model


def experts_entry(model):
    kinds = ("Llama4TextMoe", "SwitchTransformersSparseMLP")
    return next(e for e in fusedmlp.patch(model).entries if e.kind in kinds)


@pytest.mark.parametrize("patched", ("before", "after"))
@pytest.mark.parametrize("name", OWN)
def test_blocks_with_a_plan_of_their_own(name, patched, monkeypatch):
    """Switched off and on, merged and not, and taken off again."""
    ours, plain = block_of_its_own(name, patched), block_of_its_own(name)
    inputs = batch(name)
    with merges(monkeypatch) as made:
        assert_alike(ours, plain, inputs)
    assert name == "switch" or set(made) == {"_LoraFactorsProxy"} and len(made) == 4  # plain's
    for method in ("disable_adapter_layers", "enable_adapter_layers", "merge_adapter",
                   "disable_adapter_layers", "enable_adapter_layers"):  # fmt: skip
        for model in (ours, plain):
            getattr(model if hasattr(model, method) else model.base_model, method)()
        assert_alike(ours, plain, inputs)
    for model in (ours, plain):
        model.merge_adapter()
    assert_alike(ours.unload(), plain.unload(), inputs)


@pytest.mark.parametrize("patched", ("before", "after"))
def test_what_llama4_says(patched):
    """Fused with its adapters; by its own forward where one must be added by PEFT."""
    ours, plain = block_of_its_own("llama4", patched), block_of_its_own("llama4")
    entry = experts_entry(ours)
    assert entry.op == "moe_mlp" and entry.detail.endswith(
        "; LoRA inside: down_proj 'default' of rank 3, gate_up_proj 'default' of rank 3"
    )
    for model in (ours, plain):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA | OWN["llama4"]))
        model.base_model.set_adapter(["default", "other"])
    entry = experts_entry(ours)
    assert entry.op is None and "2 adapters are active at once" in entry.detail
    assert entry.detail.endswith("so its own forward is called")
    assert_alike(ours, plain, batch("llama4"))
    fusedmlp.unpatch(ours)
    assert_alike(ours, plain, batch("llama4"))


def test_what_switch_says():
    """Its experts one by one, with adapters inside, if patched after PEFT; its own forward else."""
    before, after = block_of_its_own("switch", "before"), block_of_its_own("switch", "after")
    entry = experts_entry(before)
    assert entry.op is None and "experts.expert_0.wi has an adapter of PEFT's" in entry.detail
    assert "wi is no plain Linear" in experts_entry(after).detail
    fusedmlp.unpatch(before)
    for model in (before, after):
        one_by_one = [e for e in fusedmlp.patch(model).patched if "expert_" in e.name]
        assert one_by_one and all("LoRA inside" in e.detail and e.op == "mlp" for e in one_by_one)


def test_adapters_are_not_spread_over_ranks():
    ours = block_of_its_own("llama4", "after")
    (name, style), *_ = expert_parallel_plan(ours).items()
    with pytest.raises(
        ValueError, match="Llama4TextMoe must be without adapters, got PEFT's Param"
    ):
        style._apply(ours.get_submodule(name), None)


def low(turned, out, in_):
    """Factors of a stacked weight as it is stored, and what they add to it as (E, out, in)."""
    rows, columns = (in_, out) if turned else (out, in_)
    found = lora_experts.Factors(torch.randn(2, rows, 3), torch.randn(2, 3, columns), 0.5)
    added = found.scale * found.lhs @ found.rhs
    return found, added.mT if turned else added


@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("packed", (None, *ORDERS))
@pytest.mark.parametrize("first, down", [*itertools.product((True, False), repeat=2)])
def test_adapters_of_every_form(first, down, packed, turned):
    """On either weight, or both: what they add is what PEFT adds, and no more is adapted."""
    (gate_up, added), (last, added_down) = low(turned, 8, 5), low(turned, 5, 4)
    laid = Form("gate_up_proj", "silu", packed, turned, False)
    found = lora_experts.lora_of(gate_up if first else None, last if down else None, laid)
    expected = [None, None, added_down if down else None]
    if first:
        expected[:2] = halves(added, packed, 1) if packed else (added, None)
    for adapter, sum_ in zip(found or [None] * 3, expected, strict=True):
        assert (adapter is None) == (sum_ is None)
        if adapter is not None:
            torch.testing.assert_close(adapter.scale * adapter.b @ adapter.a, sum_)
            assert adapter.a.is_contiguous() and adapter.b.stride(-1) == 1
