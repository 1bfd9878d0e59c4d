"""Patched models compute what they computed: logits, loss, gradients, training, generation."""

import copy

import pytest
import torch
from patch_models import KINDS, MODELS, batch, build

import fusedmlp
from fusedmlp.patching.swap import Patched
from fusedmlp.testing import assert_close_to

GENERATES = [n for n in MODELS if n not in ("bert", "vit")]


def to_dtype(inputs, dtype):
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}


def step(model, inputs):
    """logits, loss and every gradient; 0 where an expert without tokens has none."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    out = model(**to_dtype(inputs, dtype))
    out.loss.backward()
    results = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    return results | {
        f"d{k}": torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for k, p in model.named_parameters()
    }


def trained(model, inputs, momentum, steps=10):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    for _ in range(steps):
        step(model, inputs)
        optimiser.step()
    return {k: p.detach() for k, p in model.named_parameters()}


def assert_same(ours, exact, eager):
    assert ours.keys() == exact.keys() == eager.keys()
    for name, out in ours.items():
        assert_close_to(out, exact[name], eager[name], name=name)


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_is_patched(name):
    model = build(name)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    kinds = {key: type(m) for key, m in model.named_modules()}
    modules = dict(model.named_modules())
    report = fusedmlp.patch(model)
    _, _, _, ops, activation = MODELS[name]
    assert {e.op for e in report.patched} == ops
    assert [e.detail.partition(":")[0] for e in report.left] == ["tied"] * (name == "bert")
    assert len(report.patched) == {"llama4": 3, "switch": 4}.get(name, 2)
    assert all(f"activation {activation!r}" in e.detail for e in report.patched)
    assert {e.backend for e in report.patched} == {"reference"}
    # The modules, their names and their parameters are those that were.
    assert list(model.state_dict()) == keys
    assert all(p is parameters[k] for k, p in model.named_parameters())
    assert all(m is modules[k] and isinstance(m, kinds[k]) for k, m in model.named_modules())
    assert all(type(m).__name__ == kinds[k].__name__ for k, m in model.named_modules())
    again = fusedmlp.patch(model)
    assert again == report
    fusedmlp.unpatch(model)
    assert {key: type(m) for key, m in model.named_modules()} == kinds


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_every_gradient(name):
    model, inputs = build(name), batch(name)
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    assert fusedmlp.patch(ours).patched
    triple = [step(m, inputs) for m in (ours, exact, model)]
    assert all(d.abs().max() > 0 for k, d in triple[1].items() if "expert" not in k)
    assert_same(*triple)


@pytest.mark.parametrize(
    "name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_ten_steps_of_training(name):
    model, inputs = build(name), batch(name)
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    fusedmlp.patch(ours)
    # An expert without tokens has a gradient of 0, which momentum goes on from, where the model's
    # own code has none.
    momentum = 0.0 if name == "switch" else 0.9
    assert_same(*(trained(m, inputs, momentum) for m in (ours, exact, model)))


@pytest.mark.parametrize("name", GENERATES)
def test_generates_the_same_tokens(name):
    model = build(name).eval()
    ids = batch(name)["input_ids"]
    ask = lambda: model.generate(ids, max_new_tokens=8, do_sample=False)  # noqa: E731
    with torch.no_grad():
        expected = ask()
        with fusedmlp.patched(model):
            assert torch.equal(ask(), expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", KINDS)
def test_through_the_kernels(name):
    """The same in Triton's interpreter, with one layer."""
    model, inputs = build(name, **KINDS[name]), batch(name, rows=1, length=5, seed=1)
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    with fusedmlp.backend("triton"):
        report = fusedmlp.patch(ours)
        assert {e.backend for e in report.patched} == {"triton"}
        assert all(e.detail.startswith("tied") for e in report.left)  # BERT's head
        results = step(ours, inputs)
    assert_same(results, step(exact, inputs), step(model, inputs))


def block_step(block, method, dtype, where):
    block = copy.deepcopy(block).to(dtype)
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = x.to(dtype).requires_grad_()
    with fusedmlp.backend(where):
        y = getattr(block, method)(x)
        (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    parameters = {f"d{k}": p.grad for k, p in block.named_parameters() if p.grad is not None}
    return {"y": (y[0] if isinstance(y, tuple) else y).detach(), "dx": x.grad} | parameters


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
)
def test_a_block_through_the_kernels_in_bfloat16(name):
    """One block alone: deeper, each rounding is another argument of the next layer."""
    model = build(name, **KINDS[name])
    ours = copy.deepcopy(model)
    fusedmlp.patch(ours)
    path, block = next((k, m) for k, m in ours.named_modules() if isinstance(m, Patched))
    plain, method = model.get_submodule(path), block._plan.method
    assert_same(
        block_step(block, method, torch.bfloat16, "triton"),
        block_step(plain, method, torch.float64, "auto"),
        block_step(plain, method, torch.bfloat16, "auto"),
    )
