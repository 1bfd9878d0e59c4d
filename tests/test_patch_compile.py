"""A patched model under torch.compile, torch.export and AOTInductor, and in serving."""

import copy

import pytest
import torch
from patch_models import KINDS, batch, build
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import fusedmlp
from fusedmlp.patching.swap import Patched

_HERE = ("phi3", "llama4")  # by default
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "_to_copy.cpu")


class NoHost(TorchDispatchMode):
    """Raises where the host would wait for a value of the device."""

    paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        waits = any(wait in name for wait in _WAITS) and not self.paused
        assert not waits, name
        return func(*args, **(kwargs or {}))


def first_block(name):
    """The first patched block, the most complex of the model's kinds, and its method."""
    model = build(name, **KINDS[name]).eval()
    fusedmlp.patch(model)
    blocks = [m for m in model.modules() if isinstance(m, Patched)]
    block = max(blocks, key=lambda m: m._plan.op == "moe_mlp")
    return block, getattr(block, block._plan.method)


def values(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("training", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_one_graph_for_every_batch_and_length(training):
    model = build("llama", num_hidden_layers=1).train(training)
    fusedmlp.patch(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for rows, length in ((2, 7), (3, 5)):
        inputs = batch("llama", rows, length)
        results = []
        for run in (compiled, model):
            model.zero_grad()
            out = run(**inputs)
            if training:
                out.loss.backward()
            grads = [p.grad.clone() for p in model.parameters()] if training else []
            results.append((out.logits, out.loss, *grads))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


@pytest.mark.parametrize(
    "name", [n if n in _HERE else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
)
def test_a_block_is_one_graph(name, each_backend):
    block, run = first_block(name)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for length in (5, 7):
        x = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(length))
        results = []
        for call in (compiled, run):
            leaf = x.clone().requires_grad_()
            y = values(call(leaf))
            parameters = [p for p in block.parameters() if p.requires_grad]
            grads = torch.autograd.grad(y.sum(), [leaf, *parameters], allow_unused=True)
            results.append((y, *grads))
        for ours, eager in zip(*results, strict=True):
            if eager is not None:
                torch.testing.assert_close(ours, eager)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


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


def decode(run, model, ids, new):
    """Prefill, then token by token into a static cache; the logits of every step."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
    logits, length = [], ids.shape[1]
    position = torch.arange(length)
    for _ in range(new):
        out = run(ids, past_key_values=cache, use_cache=True, position_ids=position.unsqueeze(0))
        logits.append(out.logits[:, -1])
        ids, position = logits[-1].argmax(-1, keepdim=True), position[-1:] + 1
    return torch.stack(logits)


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


def test_export():
    model = build("llama", num_hidden_layers=1).eval()
    fusedmlp.patch(model)
    with torch.no_grad():
        program = exported(model)
        for rows, length in ((3, 7), (2, 4)):
            ids = batch("llama", rows, length)["input_ids"]
            torch.testing.assert_close(program.module()(ids), model(ids).logits)


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
