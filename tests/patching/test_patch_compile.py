"""A patched model under torch.compile, torch.export and AOTInductor, and in serving."""

import copy

import pytest
import torch
from patch_blocks import MLP, GatedMLP, Model, Packed, Residual
from patch_models import KINDS, batch, build, decode, first_block, values
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp

_HERE = (("llama4", "reference"), ("gpt2", "triton"))  # by default
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "_to_copy.cpu")


class NoHost(TorchDispatchMode):
    """Raises where the host would wait for a value of the device."""

    paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        waits = any(wait in name for wait in _WAITS) and not self.paused
        assert not waits, name
        return func(*args, **(kwargs or {}))


def compiles_once(model, sizes, run):
    """One graph for every size; run(model, size) gives what has to be equal."""
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), None
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in sizes:
        for ours, eager in zip(run(compiled, size), run(model, size), strict=True):
            torch.testing.assert_close(ours, eager)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


@pytest.mark.parametrize("training", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_one_graph_for_every_batch_and_length(training):
    torch.manual_seed(0)
    model = Model(GatedMLP(), Packed(), MLP(), Residual()).train(training)
    assert len(fusedmlp.patch(model).patched) == 4

    def run(call, size):
        x = torch.randn(*size, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = call(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])

    compiles_once(model, ((2, 7), (3, 5)), run)


@pytest.mark.slow
@pytest.mark.parametrize("training", (True, False))
def test_one_graph_of_a_whole_llama(training):
    model = build("llama", num_hidden_layers=1).train(training)
    fusedmlp.patch(model)

    def run(call, size):
        out = call(**batch("llama", *size))
        grads = torch.autograd.grad(out.loss, list(model.parameters())) if training else ()
        return out.logits, out.loss, *grads

    compiles_once(model, ((2, 7), (3, 5), (5, 11)), run)


@pytest.mark.parametrize(
    "name, where",
    [
        (name, where)
        if (name, where) in _HERE
        else pytest.param(name, where, marks=pytest.mark.slow)
        for name in KINDS
        for where in ("reference", "triton")
    ],
)
def test_a_block_is_one_graph(name, where):
    block, run = first_block(name)

    def step(call, length):
        x = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(length))
        leaf, parameters = x.requires_grad_(), list(block.parameters())
        y = values(call(leaf))
        # None where a parameter of the block has no part in it.
        grads = torch.autograd.grad(y.sum(), [leaf, *parameters], allow_unused=True)
        return y, *(g for g in grads if g is not None)

    with fusedmlp.backend(where):
        compiles_once(run, (5, 7), step)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", KINDS)
def test_no_block_waits_for_the_device(name):
    block, run = first_block(name)
    x = torch.randn(1, 5, 64, requires_grad=True)
    with fusedmlp.backend("triton"), NoHost() as mode:
        if name == "switch":
            # transformers' own router: one_hot looks at its argument, on CPU alone.
            block.router.register_forward_pre_hook(lambda *_: setattr(mode, "paused", True))
            block.router.register_forward_hook(lambda *_: setattr(mode, "paused", False))
        values(run(x)).sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHost():
        x.sum().item()


def test_decoding_into_a_static_cache_compiles_twice():
    """Once for the prompt and once for a token: no step after that compiles again."""
    model = build("llama", num_hidden_layers=1).eval()
    ids = batch("llama", rows=1, length=5)["input_ids"]
    with torch.no_grad():
        expected = decode(model, model, ids, 6)
        fusedmlp.patch(model)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        torch.testing.assert_close(decode(compiled, model, ids, 6), expected)
        graphs = counter.frame_count
        assert graphs == 2
        torch.testing.assert_close(decode(compiled, model, ids, 6), expected)
        assert counter.frame_count == graphs


def exported(model):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    ids = batch("llama", 3, 7)["input_ids"]
    sizes = {"ids": {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("length", max=64)}}
    return torch.export.export(Logits(), (ids,), dynamic_shapes=sizes)


def program_or_reason(model):
    try:
        return exported(model)
    except torch._dynamo.exc.UserError as error:
        return str(error)


def test_export():
    """As the model's own code, which torch 2.11 cannot export with any length: it finds a guard on
    the lengths in the attention. Then the patched model has that guard and no other."""
    model = build("llama", num_hidden_layers=1).eval()
    with torch.no_grad():
        own = program_or_reason(model)
        fusedmlp.patch(model)
        ours = program_or_reason(model)
        if isinstance(own, str):
            assert ours == own
            return
        for rows, length in ((3, 7), (2, 4)):
            ids = batch("llama", rows, length)["input_ids"]
            torch.testing.assert_close(ours.module()(ids), model(ids).logits)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    model = build("llama", num_hidden_layers=1).eval()
    fusedmlp.patch(model)
    with torch.no_grad():
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(exported(model), package_path=package)
        ids = batch("llama", 2, 4)["input_ids"]
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(ids), model(ids).logits)


def test_compiled_before_and_unpatched_after():
    """Compiled code follows the class of its modules: patch and unpatch are seen, not missed."""
    model = build("llama", num_hidden_layers=1).eval()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(copy.copy(model).model.layers[0].mlp, backend=backend)
    x = torch.randn(1, 3, 64)
    expected = compiled(x)
    with fusedmlp.patched(model) as report:
        assert len(report.patched) == 1
        torch.testing.assert_close(compiled(x), expected)
        assert len(graphs) == 2
    torch.testing.assert_close(compiled(x), expected)
