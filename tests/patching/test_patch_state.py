"""A patched model's state is what it was: names, Parameters, storages, files; and unpatched."""

import copy
import gc
import weakref

import accelerate
import pytest
import safetensors.torch
import torch
from patch_models import KINDS, batch, build
from test_patch_topk import block
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fusedmlp
from fusedmlp.patching import moe as patching_moe
from fusedmlp.patching.stack import lie_together

NAMES = ("switch", "llama4")


def layout(model):
    """What savers look at, of each name: which storages are shared, how much of each is used."""
    owners = {}
    for name, t in model.state_dict(keep_vars=True).items():
        owners.setdefault(t.untyped_storage().data_ptr(), []).append(name)
    return {
        name: (owners[t.untyped_storage().data_ptr()], t.untyped_storage().nbytes(), t.stride(),
               t.storage_offset(), id(t), t.is_leaf)
        for name, t in model.state_dict(keep_vars=True).items()
    }  # fmt: skip


def experts(model):
    return list(model.encoder.block[1].layer[1].mlp.experts.values())


@pytest.mark.parametrize("name", NAMES)
def test_storages_are_what_they_were(name):
    model = build(name)
    before = layout(model)
    pointers = {k: p.data_ptr() for k, p in model.named_parameters()}
    values = {k: p.detach().clone() for k, p in model.named_parameters()}
    fusedmlp.patch(model)
    assert layout(model) == before
    fusedmlp.unpatch(model)
    assert layout(model) == before
    assert all(torch.equal(p, values[k]) for k, p in model.named_parameters())
    if name == "llama4":
        assert pointers == {k: p.data_ptr() for k, p in model.named_parameters()}
    for e in experts(model) if name == "switch" else []:
        assert e.wi.weight.untyped_storage().resizable()  # memory of torch's own again


@pytest.mark.parametrize("name", [*KINDS, "a router and its experts"])
def test_unpatched_modules_have_what_they_had(name):
    """Their classes, attributes and settings; no attribute of ours."""
    model = build(name, **KINDS[name]) if name in KINDS else block()
    had = [(type(m), dict(vars(m))) for m in model.modules()]
    assert fusedmlp.patch(model).patched
    assert [type(m) for m in model.modules()] != [kind for kind, _ in had]
    fusedmlp.unpatch(model)
    for m, (kind, own) in zip(model.modules(), had, strict=True):
        assert type(m) is kind
        assert vars(m).keys() == own.keys()
        assert all(vars(m)[k] is v for k, v in own.items())


@pytest.mark.parametrize("change", (lambda m: None, fusedmlp.patch,
                                    lambda m: (fusedmlp.patch(m), fusedmlp.unpatch(m))),
                         ids=("plain", "patched", "restored"))  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_savers(name, change, tmp_path):
    model, inputs = build(name).eval(), batch(name)
    expected = model(**inputs).logits
    change(model)

    def check(other):
        torch.testing.assert_close(other.eval()(**inputs).logits, expected)

    def fresh():
        other = build(name)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        change(other)
        return other

    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = fresh()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    check(other)
    safetensors.torch.save_model(model, tmp_path / "one.safetensors")
    other = fresh()
    safetensors.torch.load_model(other, tmp_path / "one.safetensors")
    check(other)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    saved = safetensors.torch.load_file(tmp_path / "accelerate" / "model.safetensors")
    assert len(saved) == len({t.data_ptr() for t in model.state_dict().values()})
    model.save_pretrained(tmp_path / "hf")
    check(type(model).from_pretrained(tmp_path / "hf", attn_implementation="eager"))
    check(copy.deepcopy(model))
    check(AveragedModel(model).module)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.free_memory()
    accelerator.prepare(model)
    accelerator.save_state(tmp_path / "whole")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(tmp_path / "whole")
    accelerator.free_memory()
    check(model)


def test_a_patched_switch_copies_no_expert(monkeypatch):
    """Its call reads the experts where they lie: in training, after a step and after a load."""
    seen = []
    call = patching_moe.moe_mlp
    monkeypatch.setattr(
        patching_moe, "moe_mlp",
        lambda x, routing, w, up, down, **options: (
            seen.append((w.data_ptr(), down.data_ptr())) or call(x, routing, w, up, down, **options)
        ),
    )  # fmt: skip
    model, inputs = build("switch"), batch("switch")
    fusedmlp.patch(model, only="encoder.*")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = experts(model)[0]
    expected = (first.wi.weight.data_ptr(), first.wo.weight.data_ptr())
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        model(**inputs)
    assert seen == [expected] * 3

    # Apart, they are stacked: here by functional_call, which leaves those of the model alone.
    others = {k: p.detach().clone() for k, p in model.named_parameters()}
    torch.func.functional_call(model, others, (), inputs)
    model(**inputs)
    assert seen[3] != expected == seen[4]


def test_experts_that_were_moved_give_their_memory_back():
    model, inputs = build("switch").eval(), batch("switch")
    fusedmlp.patch(model)
    block = model.encoder.block[1].layer[1].mlp
    whole = weakref.ref(block._together["wi"]._whole)
    model.double()
    model(**inputs)
    gc.collect()
    assert whole() is None
    pointer = experts(model)[0].wi.weight.data_ptr()
    fusedmlp.unpatch(model)
    assert experts(model)[0].wi.weight.data_ptr() == pointer
    assert "_together" not in vars(block)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("move", ("elsewhere", "turned", "as halves", "replaced"))
def test_one_that_is_moved_takes_the_memory_from_all(i, move):
    """Alike in another memory, or read otherwise where it lies."""
    weights = [nn.Parameter(torch.randn(2, 2)) for _ in range(3)]
    values = [w.detach().clone() for w in weights]
    together = lie_together(weights)
    whole = together.of(weights)
    assert torch.equal(whole, torch.stack(values)) and not whole.requires_grad
    w = weights[i]
    if move == "replaced":
        weights[i] = nn.Parameter(w.detach().clone())
    else:
        w.data = {
            "elsewhere": w.data.clone(), "turned": w.data.t(), "as halves": w.data.view(torch.half)
        }[move]  # fmt: skip
    assert together.of(weights) is None
    assert (together._whole is None) == (move != "replaced")


def test_a_write_between_forward_and_backward_raises():
    model, inputs = build("switch"), batch("switch")
    fusedmlp.patch(model)
    loss = model(**inputs).loss
    with torch.no_grad():
        experts(model)[1].wi.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_patching_on_meta_moves_nothing():
    with torch.device("meta"):
        model = build("switch")
    before = layout(model)
    fusedmlp.patch(model)
    assert layout(model) == before
    model.to_empty(device="cpu")
    model.load_state_dict(build("switch").state_dict())
    assert model.eval()(**batch("switch")).logits.isfinite().all()
