"""warmup(): after it a model compiles nothing more, and nothing about the model has changed."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp import Warmup, layers
from fusedmlp.dry import warm
from fusedmlp.dry.blocks import Block
from fusedmlp.dry.expected import expected
from fusedmlp.kernels.arch import ARCHES

ROOT = Path(__file__).parents[2]

# In a process whose kernels are not interpreted: warm up for an H100, then run the model itself
# under the driver that only compiles, its kernels forgotten by the process.
PROGRAM = """
import sys
import torch, fusedmlp
from torch import nn
from triton.runtime.jit import JITFunction
from fusedmlp.dry.blocks import blocks_of
from fusedmlp.dry.driver import compiling
from fusedmlp.kernels.arch import ARCHES

class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

torch.manual_seed(0)
model = nn.Sequential(MLP(), nn.BatchNorm1d(64), nn.Dropout(0.5)).bfloat16()
fusedmlp.patch(model)
if sys.argv[1] == "fp32":
    model.float()
model.train(sys.argv[1] != "eval")
state = {name: t.clone() for name, t in model.state_dict().items()}
random = torch.get_rng_state()
asked = []
run = JITFunction.run
with torch.autocast("cpu", torch.float16, enabled=sys.argv[1] == "fp32"):
    print("first:", fusedmlp.warmup(model, tokens=64, gpu="H100"))
assert JITFunction.run is run
assert torch.equal(random, torch.get_rng_state())
assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
assert all(p.grad is None for p in model.parameters())
with torch.set_grad_enabled(model.training), compiling(ARCHES["sm_90"]) as hits:
    x = torch.zeros(64, 64, dtype=model[0].gate.weight.dtype, requires_grad=model.training)
    with torch.autocast("cpu", torch.float16, enabled=sys.argv[1] == "fp32"):
        y = model(x)
    if model.training:
        torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y), allow_unused=True)
print("the model itself:", len(hits))
x = torch.zeros(64, 128)
with compiling(ARCHES["sm_90"]) as hits, torch.no_grad():
    fusedmlp.linear_act(x, torch.zeros(64, 128))
print("another:", len(hits))
"""


@pytest.mark.parametrize(
    "mode", ["eval", *(pytest.param(m, marks=pytest.mark.slow) for m in ("train", "fp32"))]
)
def test_a_warm_model_compiles_nothing(mode, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    argv = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    count = re.fullmatch(
        r"1 blocks: (\d+) kernels compiled, 0 taken from Triton's cache", found["first"]
    )
    # Gate and up in either order; in training the backward too.
    assert count and int(count[1]) >= (2 if mode == "eval" else 3)
    assert found["the model itself"] == "0" and found["another"] == "1"


def mlp():
    return layers.FeedForward(32, glu_variant="swiglu", bias=False)


@pytest.fixture
def compiled(monkeypatch):
    """As if kernels were compiled and there were a GPU."""
    monkeypatch.setattr(warm, "INTERPRETED", False)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fusedmlp.warmup(mlp(), 4), RuntimeError, "warmup: needs a GPU, torch finds none"),
        (lambda: fusedmlp.warmup(mlp(), 4), RuntimeError, "give gpu=, one of H100, H200, B200"),
        (
            lambda: fusedmlp.warmup(mlp(), 4, gpu="V1"),
            ValueError,
            "warmup: gpu must be one of H100",
        ),
        (lambda: fusedmlp.warmup(mlp(), []), ValueError, "tokens must hold a number of rows, got"),
        (lambda: fusedmlp.warmup(mlp(), [4, 0]), ValueError, "tokens must be at least 1, got 0"),
        (lambda: fusedmlp.warmup(mlp(), 1.5), TypeError, "tokens must be an int, got 1.5"),
        (lambda: fusedmlp.warmup("x", 4), TypeError, "model must be an nn.Module, got str"),
        (lambda: fusedmlp.warmup(nn.Linear(4, 4), 4), ValueError, "call fusedmlp.patch(model) fir"),
    ],
)
def test_what_it_refuses(call, error, message, compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(warm, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="got TRITON_INTERPRET=1; unset it"):
        fusedmlp.warmup(mlp(), 4)


def test_a_model_must_be_on_the_gpu(compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="model must be on the GPU, got the layer .* on cpu"):
        fusedmlp.warmup(mlp(), 4)


def test_weights_lie_in_either_order():
    """Each on 512 bytes, as CUDA's allocator has them, with strides and buffers as they are."""
    block = nn.Sequential(layers.SwiGLUMLP(24), nn.BatchNorm1d(24))
    block[0].c_up.weight = nn.Parameter(torch.randn(64, 32)[:, :24])
    (found,) = warm.blocks_of(block)
    places = []
    for way in (warm._ordered, warm._reversed):
        tensors = way(found)
        own = dict(found.module.named_parameters())
        assert tensors.keys() == own.keys()
        for name, t in tensors.items():
            assert (t.shape, t.stride(), t.dtype) == (own[name].shape, own[name].stride(), t.dtype)
            assert t.data_ptr() % 512 == 0 and t.requires_grad
        places.append([tensors[name].data_ptr() for name in ("c_gate.weight", "c_up.weight")])
    assert places[0][0] < places[0][1] and places[1][0] > places[1][1]


class Noisy(layers.SwiGLUMLP):
    """A layer that leaves traces: a buffer, an attribute, a draw; and a hook on it."""

    def __init__(self):
        super().__init__(16)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.last = torch.rand(())
        return super().forward(x)


@pytest.mark.parametrize("training", (True, False))
def test_a_run_leaves_no_trace(training):
    layer = Noisy().train(training)
    hooked = []
    layer.register_forward_hook(lambda *_: hooked.append(1))
    layer.c_gate.weight.register_hook(lambda grad: hooked.append(2))
    random, before = torch.get_rng_state(), dict(vars(layer))
    (block,) = warm.blocks_of(layer)
    assert not warm._run_all([(block, 4, warm._views)])
    assert torch.equal(random, torch.get_rng_state()) and vars(layer) == before
    assert layer.calls == 0 and not hooked and layer.training is training
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("training", (True, False))
def test_indices_among_the_inputs_have_no_gradient(training):
    """As experts take them beside their rows."""
    layer, seen = layers.SwiGLU(16, 8).train(training), []

    def call(module, x, index):
        seen.append((x.requires_grad, index.requires_grad))
        return module(x)[index]

    inputs = lambda rows, like: (  # noqa: E731
        like.new_zeros(rows, 16), torch.zeros(rows, dtype=torch.int64)
    )  # fmt: skip
    block = Block("", layer, call, inputs)
    warm._run(block, 3, dict(layer.named_parameters()))
    expected(block, 3, ARCHES["sm_90"], 1)
    assert seen == [(training, False)] * 2


def test_a_block_that_cannot_run_is_named():
    class Broken(layers.SwiGLUMLP):
        def forward(self, x):
            raise LookupError("no\nsuch thing")

    model = nn.Sequential(Broken(16), layers.SwiGLUMLP(16))
    blocks = warm.blocks_of(model)
    left = warm._run_all([(block, 4, warm._views) for block in blocks])
    assert left == ["0 (Broken), 4 tokens: LookupError: no"]
    told = str(Warmup(2, 3, 1, tuple(left)))
    assert told == (
        "2 blocks: 3 kernels compiled, 1 taken from Triton's cache\n"
        "not warm: 0 (Broken), 4 tokens: LookupError: no"
    )


def test_which_way_it_goes(compiled, monkeypatch):
    """On the GPU where the model is, or for one that is named, on every number of rows."""
    block, calls = SimpleNamespace(like=SimpleNamespace(is_cuda=True)), []
    monkeypatch.setattr(warm, "blocks_of", lambda model: [block])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for way in ("_on_gpu", "_without_gpu"):
        monkeypatch.setattr(warm, way, lambda *given, way=way: calls.append((way, *given)) or way)
    assert fusedmlp.warmup(mlp(), [4, 16]) == "_on_gpu"
    assert fusedmlp.warmup(mlp(), 4, gpu="H100") == "_without_gpu"
    assert calls == [("_on_gpu", [block], [4, 16]), ("_without_gpu", [block], [4], "H100")]


def test_on_a_gpu_it_waits_until_all_has_run(monkeypatch):
    """Each block on each number of rows, with its parameters where they lie."""
    done = []
    monkeypatch.setattr(warm, "_run_all", lambda jobs: done.append(jobs) or ["not this one"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    found = warm._on_gpu(["a", "b"], [4, 16])
    views = warm._views
    jobs = [("a", 4, views), ("a", 16, views), ("b", 4, views), ("b", 16, views)]
    assert done == [jobs, "waited"] and found == Warmup(2, 0, 0, ("not this one",))


def test_a_bar_says_what_is_done(monkeypatch):
    made, steps = [], []

    class Bar(contextlib.nullcontext):
        def __init__(self, *given):
            super().__init__(SimpleNamespace(step=steps.append))
            made.append(given)

    monkeypatch.setattr(warm, "Progress", Bar)
    blocks = warm.blocks_of(nn.Sequential(layers.SwiGLUMLP(16), layers.SwiGLUMLP(16)))
    warm._run_all([(block, 4, warm._views) for block in blocks])
    assert made == [("warmup", 2)] and steps == ["0", "1"]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    blocks = warm.blocks_of(nn.Sequential(layers.SwiGLUMLP(16), layers.SwiGLUMLP(16)))
    warm._run_all([(block, 4, warm._views) for block in blocks])
    assert "warmup" in capsys.readouterr().err
