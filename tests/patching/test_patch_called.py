"""A block whose projections must be called: the product is fused all the same."""

import re

import pytest
import torch
from patch_blocks import MLP, GatedMLP, Model, Packed, Residual
from patch_called import CALLED, gathered
from patch_models import batch, build
from peft import LoraConfig, get_peft_model
from torch import nn

import fusedmlp
from fusedmlp.patching.swap import Patched

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
# block -> (how it is made, a projection of it, what is fused where that one is called)
BLOCKS = {
    "gate": (GatedMLP, "w1", "gated_act"),
    "up": (GatedMLP, "w3", "gated_act"),
    "down": (GatedMLP, "w2", "gated_linear"),
    "packed": (Packed, "gate_up", "gated_act"),
    "packed, down": (Packed, "down", "gated_linear"),
    "plain": (MLP, "0", None),
    "plain, down": (MLP, "2", "linear_act"),
    "spread": (Residual, "output", "linear_act"),
}
PAIRS = [(kind, block) for kind in CALLED for block in BLOCKS]


def results(model):
    x = X.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    if all(p.numel() for p in model.parameters()):  # ZeRO-3 gathers again in backward
        y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=lambda m, n=name: f"{n}: {m}")


def made(block):
    torch.manual_seed(0)
    return Model(block()).eval()


@pytest.mark.parametrize("kind, block", PAIRS, ids=[f"{k} in {b}" for k, b in PAIRS])
def test_before_patch(kind, block):
    (change, why), (make, path, op) = CALLED[kind], BLOCKS[block]
    change(model := made(make), f"blocks.0.{path}")
    expected = results(model)
    report = fusedmlp.patch(model)
    if kind == "an adapter" and block == "plain":
        assert not report.patched  # its parts are taken for projections
    else:
        (entry,) = [e for e in report.entries if e.name == "blocks.0"]
        assert entry.op == op and re.search(f"{path} {why}|{path} has .*{why}", entry.detail)
        assert entry.partly == (op is not None) and entry in report.left
    assert_same(results(model), expected)


@pytest.mark.parametrize("kind, block", PAIRS, ids=[f"{k} in {b}" for k, b in PAIRS])
def test_after_patch(kind, block):
    """It switches by itself, and says so; unpatched, it is what it was."""
    (change, why), (make, path, op) = CALLED[kind], BLOCKS[block]
    change(plain := made(make), f"blocks.0.{path}")
    expected = results(plain)
    model = made(make)
    (before,) = fusedmlp.patch(model).patched
    assert not before.partly
    torch.manual_seed(0)
    change(model, f"blocks.0.{path}")
    if kind != "ZeRO-3":
        model.load_state_dict(plain.state_dict())
    assert_same(results(model), expected)
    (entry,) = fusedmlp.patch(model).entries
    assert (entry.name, entry.kind, entry.op) == ("blocks.0", make.__name__, op)
    assert re.search(why, entry.detail)
    assert (op or "nothing fused") in repr(model.blocks[0])
    fusedmlp.unpatch(model)
    assert_same(results(model), expected)


def test_of_each_activation():
    for act in (nn.GELU(), nn.GELU("tanh"), nn.ReLU(), torch.sigmoid, nn.Identity()):
        model = Model(GatedMLP(act))
        expected = results(model)
        model.blocks[0].w1.register_forward_hook(lambda *_: None)
        assert fusedmlp.patch(model).partly
        assert_same(results(model), expected)


class Saved:
    """Bytes of what a forward saves for backward, parameters apart, each memory once."""

    def __init__(self, model):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes = {}

    def pack(self, t):
        if (storage := t.untyped_storage()).data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return t

    def of(self, run):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t):
            y = run()
        return sum(self.sizes.values()), y


# Products, and what moves no data.
_NO_PASS = ("mm", "view", "detach", "t.default", "expand", "empty", "split", "select", "slice",
            "as_strided")  # fmt: skip


class Passes(torch.utils._python_dispatch.TorchDispatchMode):
    """How often operators other than products read or write a tensor of `count` elements."""

    def __init__(self, count):
        super().__init__()
        self.count, self.total = count, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(word in str(func) for word in _NO_PASS):
            every = torch.utils._pytree.tree_leaves((args, kwargs, out))
            seen = [t for t in every if isinstance(t, torch.Tensor)]
            self.total += sum(t.numel() // self.count for t in seen)
        return out


@pytest.mark.interpreter
def test_what_it_saves():
    """With hooks on all LoRA projections: T x H values less, and 3 passes for 5, 5 for 9."""
    T, H = 16, 96
    base = build("llama", num_hidden_layers=1)
    config = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"])
    block = get_peft_model(base, config).base_model.model.model.layers[0].mlp
    for projection in (block.gate_proj, block.up_proj, block.down_proj):
        projection.register_forward_hook(lambda *_: None)
    x = torch.randn(T, 64).requires_grad_()
    found = []
    with fusedmlp.backend("triton"):
        for _ in range(2):
            nbytes, _ = Saved(block).of(lambda: block(x))
            passes = []
            with Passes(T * H) as mode:
                y = block(x)
                passes.append(mode.total)
                y.sum().backward()
                passes.append(mode.total - passes[0])
            found.append((nbytes, *passes))
            assert isinstance(block, Patched) or fusedmlp.patch(block).partly
    (bytes_before, *before), (bytes_after, *after) = found
    assert bytes_before - bytes_after == 4 * T * H
    assert [b - a for b, a in zip(before, after, strict=True)] == [2, 4]


def test_a_model_under_zero_3():
    """Its hooks are on every module, activations too; patched before them or after."""
    inputs = batch("llama")
    expected = build("llama")(**inputs).logits
    for first in (True, False):
        model = build("llama")
        for act in (fusedmlp.patch, lambda m: [gathered(s) for s in m.modules()])[
            :: 1 if first else -1
        ]:
            act(model)
        assert len(fusedmlp.patch(model).partly) == 2
        torch.testing.assert_close(model(**inputs).logits, expected)


def test_a_model_of_accelerate():
    from accelerate.hooks import attach_align_device_hook_on_blocks, remove_hook_from_module

    model, inputs = build("llama"), batch("llama")
    expected = model(**inputs).logits
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm",
             "model.rotary_emb", "lm_head")  # fmt: skip
    where = dict.fromkeys(names, "cpu")
    hooks = lambda: attach_align_device_hook_on_blocks(  # noqa: E731
        model, execution_device=where, offload=dict.fromkeys(names, False)
    )
    hooks()
    assert len(fusedmlp.patch(model).partly) == 2
    torch.testing.assert_close(model(**inputs).logits, expected)
    fusedmlp.unpatch(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    remove_hook_from_module(model, recurse=True)
    assert not fusedmlp.patch(model).partly
    hooks()
    assert len(fusedmlp.patch(model).partly) == 2
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("way", ("before", "after"))
def test_a_model_with_lora_trains_alike(way):
    """Merged, disabled and switched adapters too, by what the projection does itself."""

    def adapted(patched):
        model = build("llama").eval()
        if patched and way == "before":
            fusedmlp.patch(model)
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        peft = get_peft_model(model, config)
        if patched and way == "after":
            assert not fusedmlp.patch(peft).partly
        return peft

    ours, plain = adapted(True), adapted(False)
    inputs = batch("llama")
    for model in (ours, plain):
        model(**inputs).loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None}
             for m in (ours, plain)]  # fmt: skip
    assert_same(*grads)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    with ours.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(ours(**inputs).logits, plain(**inputs).logits)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, plain(**inputs).logits)
    assert not fusedmlp.patch(merged).partly


class Whole(nn.Module):
    """A projection whose weight is whole numbers."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 12
        weight = torch.arange(96, dtype=torch.int8).view(12, 8) % 5 - 2
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


def test_a_backend_is_chosen_by_a_floating_parameter():
    """The first is of whole numbers, which no kernel takes."""
    block, x = GatedMLP(), torch.randn(3, 8)
    block.w1 = Whole()
    expected = block(x)
    with fusedmlp.backend("triton"):
        (entry,) = fusedmlp.patch(nn.Sequential(block)).patched
        torch.testing.assert_close(block(x), expected)
    assert "on triton" in str(entry)
