"""A dry run keeps to its thread, and its model is as it was."""

import os
import subprocess
import sys
import threading
from collections import deque
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
import triton
from torch import nn
from torch.nn.utils import prune, weight_norm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fusedmlp
from fusedmlp import layers
from fusedmlp.backends import choice
from fusedmlp.dry import driver, warm
from fusedmlp.kernels import device
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.kernels.pick import LAST

ROOT = Path(__file__).parents[2]


class During(layers.SwiGLUMLP):
    """A layer that does something more in a forward."""

    def __init__(self, do):
        super().__init__(64)
        self.do = do
        self.eval()

    def forward(self, x):
        self.do()
        return super().forward(x)


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@torch.no_grad()
def test_another_thread_computes_meanwhile():
    x = torch.randn(4, 64)
    found = []

    def compute():
        with torch.no_grad():
            y = layers.SwiGLUMLP.forward(layer, x)
        found.append((choice.chosen(), device.pretended(), torch.equal(y, expected)))

    layer = During(lambda: in_thread(compute))
    expected = layers.SwiGLUMLP.forward(layer, x)
    assert "gated_mlp by triton" in fusedmlp.explain(layer, gpu="H100", tokens=64)
    assert found == [("auto", False, True)]


def test_what_another_thread_calls_is_not_planned():
    x = torch.ones(4, 64)
    layer = During(lambda: in_thread(lambda: fusedmlp.gated_act(x, x)))
    assert "gated_act" not in fusedmlp.explain(layer, gpu="H100").partition("nothing was run")[2]


def test_a_backend_inside_a_forward_is_that_of_the_run():
    found = []

    def choose():
        with fusedmlp.backend("reference"):
            found.append(choice.chosen())
            in_thread(lambda: found.append(choice.chosen()))
        found.append(choice.chosen())

    fusedmlp.explain(During(choose), gpu="H100")
    assert found == ["reference", "auto", "triton"] and choice.chosen() == "auto"


def test_two_at_once(monkeypatch):
    """The second begins inside the first, and would end after it."""
    pick, began, ended = choice.pick, threading.Event(), threading.Event()
    monkeypatch.setitem(LAST, "linear_act_fwd", "of a launch before")
    texts = []

    def first():
        second.start()
        began.wait(0.3)

    def wait():
        began.set()
        ended.wait(10)

    second = threading.Thread(
        target=lambda: texts.append(fusedmlp.explain(During(wait), gpu="H100"))
    )
    text = fusedmlp.explain(During(first), gpu="H100")
    ended.set()
    second.join()
    assert texts == [text]
    assert choice.pick is pick and choice.chosen() == "auto" and not device.pretended()


class Counting(nn.Linear):
    """A projection that writes down its calls."""

    def __init__(self):
        super().__init__(64, 64)
        self.list, self.dict, self.set, self.deque = [], {"calls": [0]}, set(), deque()
        self.tensor = torch.zeros(1)

    def forward(self, x):
        self.list.append(x.shape)
        self.dict["calls"][0] += 1
        self.set.add(x.shape)
        self.deque.append(x.shape)
        self.tensor += 1
        self.new = True
        return super().forward(x)

    def state(self):
        return [self.list, self.dict, self.set, self.deque, self.tensor]


class MLP(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate, self.up, self.down = gate, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def explain(model):
    text = fusedmlp.explain(model, gpu="H100", tokens=64)
    assert "cannot be planned" not in text
    return text


def warmup(model):
    left = warm._run_all([(block, 64, warm._views) for block in warm.blocks_of(model)])
    assert not left, left


RUNS = pytest.mark.parametrize("run", (explain, warmup))


@RUNS
@pytest.mark.parametrize("training", (True, False))
def test_what_a_projection_writes_down(run, training):
    model = nn.Sequential(MLP(Counting())).train(training)
    assert fusedmlp.patch(model)
    gate, called = model[0].gate, []
    for register in (
        gate.register_forward_hook,
        gate.register_forward_pre_hook,
        gate.register_full_backward_hook,
        model[0].register_forward_hook,
    ):
        register(lambda *_: called.append(1))
    before = gate.state()
    run(model)
    assert not called and not hasattr(gate, "new")
    assert all(new is old for new, old in zip(gate.state(), before, strict=True))
    assert before == [[], {"calls": [0]}, set(), deque(), torch.zeros(1)]


def of_its_own(gate, x):
    assert gate.weight.shape == (64, 64)
    gate.calls.append(1)
    return nn.Linear.forward(gate, x)


AROUND = {
    "prune": lambda gate: prune.l1_unstructured(gate, "weight", 0.5),
    "weight_norm": weight_norm,
    "method": lambda gate: setattr(gate, "forward", MethodType(of_its_own, gate)),
    "partial": lambda gate: setattr(gate, "forward", partial(of_its_own, gate)),
}


@RUNS
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("around", AROUND)
def test_what_makes_weights_is_called(run, around):
    model = nn.Sequential(MLP(nn.Linear(64, 64)))
    fusedmlp.patch(model)
    gate = model[0].gate
    gate.calls = []
    AROUND[around](gate)
    weight = gate.weight
    if run is explain:
        text = explain(model).partition("nothing was run")[2]
        assert "gated_act by triton" in text and "gated_mlp" not in text
    else:
        run(model)
    assert gate.weight is weight and not gate.calls
    assert all(p.grad is None for p in model.parameters())


class WithAct(MLP):
    def __init__(self, gate, act):
        super().__init__(gate)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Holding(layers.SwiGLUMLP):
    """A layer that calls a patched module, which sees that its functions are those of before."""

    def __init__(self, inner):
        super().__init__(64)
        self.inner = inner

    def forward(self, x):
        return super().forward(self.inner(x))


@RUNS
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_projection_is_called(run):
    """A copy of it would have no code."""
    model = nn.Sequential(MLP(torch.jit.script(nn.Linear(64, 64))))
    assert fusedmlp.patch(model).patched
    run(model)


@RUNS
def test_a_partial_function_of_a_module_inside(run):
    inner = WithAct(nn.Linear(64, 64), partial(nn.functional.gelu, approximate="tanh"))
    assert fusedmlp.patch(nn.ModuleList([inner])).patched
    act = inner.act
    run(nn.Sequential(Holding(inner)))
    assert inner.act is act


# In a process whose kernels are not interpreted.
PROGRAM = """
import threading
import torch, fusedmlp
from triton import knobs
from triton.runtime.driver import DriverConfig, driver
from triton.runtime.jit import JITFunction
from fusedmlp import layers
from fusedmlp.backends import choice
from fusedmlp.kernels.pick import LAST
from fusedmlp.ops import gated_linear

def raised(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:90]

x, w = torch.randn(4, 64), torch.randn(64, 64)
compute = lambda: fusedmlp.gated_mlp(x, w, w, w)
kernel = lambda: gated_linear.fwd(x, w, w, None, None, "silu", True, False)
refused = raised(kernel)
assert refused.startswith("NotImplementedError")
expected, no_driver = compute(), raised(lambda: driver.active)
found = []

class Meanwhile(layers.SwiGLUMLP):
    def forward(self, x):
        thread = threading.Thread(target=lambda: found.append((
            torch.equal(compute(), expected), choice.chosen(), raised(lambda: driver.active)
        )))
        thread.start()
        thread.join()
        return super().forward(x)

heard = []
knobs.compilation.listener = listener = lambda **what: heard.append(what)
replaced = lambda: (JITFunction.run, DriverConfig.active, choice.pick, knobs.compilation.listener)
before = replaced()
layer = Meanwhile(64).bfloat16().eval()
text = fusedmlp.explain(layer, gpu="H100")
assert len(found) == 1 and raised(kernel) == refused, raised(kernel)
warmed = []
threads = [
    threading.Thread(target=lambda: warmed.append(fusedmlp.warmup(layer, 16, gpu="H100")))
    for _ in range(2)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert sum(w.compiled for w in warmed) >= 1 and not any(w.left for w in warmed), warmed
assert len(heard) == sum(w.compiled + w.cached for w in warmed)
assert len(found) == 5 and set(found) == {(True, "auto", no_driver)}, found
assert replaced() == before and not LAST and not choice.SERVED
assert fusedmlp.explain(layer, gpu="H100") == text
assert raised(kernel) == refused, raised(kernel)
"""


def test_kernels_that_are_compiled(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    argv = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("served", (0, 1))
@pytest.mark.parametrize("gpu", (None, "a GPU"))
@pytest.mark.parametrize("interpreted", (False, True))
def test_kernels_take_cpu_tensors_where_they_do_not_yet(interpreted, gpu, served, monkeypatch):
    """They do where they are interpreted, in a dry run, and once they were asked to."""
    registered = []
    library = SimpleNamespace(impl=lambda name, launcher, device: registered.append((name, device)))
    monkeypatch.setattr(driver, "INTERPRETED", interpreted)
    monkeypatch.setattr(driver.HERE, "gpu", gpu)
    cache = SimpleNamespace(cache_info=lambda: SimpleNamespace(currsize=served))
    monkeypatch.setattr(driver, "serve_cpu", cache)
    monkeypatch.setattr(torch.library, "_scoped_library", lambda *_: nullcontext(library))
    with driver._serving_cpu():
        already = interpreted or gpu or served
        assert registered == ([] if already else [(name, "CPU") for name in driver.BY_PLANS])


LIMIT = 1 << 14  # elements on floats up to which an operator computes
# What is made of floats, and whether it is computed.
OPERATORS = {
    "few floats": (lambda: torch.full((LIMIT,), 2.0) + 1, True),
    "one more": (lambda: torch.full((LIMIT + 1,), 2.0) + 1, False),
    "of two tensors": (lambda: torch.full((LIMIT // 2,), 2.0) + torch.ones(LIMIT // 2), True),
    "of two, one more": (lambda: torch.full((LIMIT // 2 + 1,), 2.0).minimum(torch.ones(())), True),
    "many integers": (lambda: torch.arange(4 * LIMIT) + 1, True),
    "few floats by many integers": (
        lambda: torch.arange(4.0)[torch.arange(2 * LIMIT) % 4], True),
    "many floats by few integers": (
        lambda: torch.zeros(LIMIT + 1).index_select(0, torch.tensor([1])), False),
    "a reduction": (lambda: torch.zeros(LIMIT, 3).sum(1), False),
    "on a device": (lambda: torch.zeros_like(torch.empty(LIMIT + 1), device="cpu"), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPERATORS)
def test_which_operators_compute(kind, monkeypatch):
    """Results have shape, dtype and place all the same."""
    make, computed = OPERATORS[kind]
    made, expected = [], make()
    own = driver.unwritten
    monkeypatch.setattr(driver, "unwritten", lambda t: made.append(t.shape) or own(t))
    with driver.Untouched():
        found = make()
    assert made == ([] if computed else [expected.shape])
    assert (found.shape, found.dtype, found.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
    assert not computed or torch.equal(found, expected)


def test_writes_and_views_of_many_floats():
    """A write is not done and gives what it was to write to; a view is one."""
    whole, other = torch.ones(2, LIMIT + 1, 3)
    with driver.Untouched():
        for write in (lambda: whole.add_(1), lambda: whole.zero_(), lambda: whole.copy_(2 * other),
                      lambda: torch.add(other, 1, out=whole)):  # fmt: skip
            assert write() is whole
        views = whole.t(), whole[3:], whole.view(-1), whole.expand(2, -1, -1)
    assert whole.eq(1).all()
    assert all(v.untyped_storage().data_ptr() == whole.data_ptr() for v in views)


def test_an_operator_without_arguments_by_name():
    """PyTorch may give no dict of them at all."""
    a = torch.ones(2)
    with driver.Untouched() as mode:
        made = mode.__torch_dispatch__(torch.ops.aten.add.Tensor, (), (a, a))
    assert torch.equal(made, a + a)


def test_the_driver_is_of_a_gpu_of_that_generation():
    made = driver._CompileOnly(90)
    assert made.get_current_target() == GPUTarget("cuda", 90, 32)
    assert (made.get_current_device(), made.get_current_stream(0)) == (90, 0)


def test_a_launch_is_compiled_and_noted(monkeypatch):
    """On as many multiprocessors as an H100 has, unless others are given."""
    arch, kernel = ARCHES["sm_90"], SimpleNamespace(fn=SimpleNamespace(__name__="name"))
    run = lambda self, *given, grid, warmup, **more: (self, given, grid, warmup, more)  # noqa: E731
    monkeypatch.setattr(JITFunction, "run", run)
    for given, count in (((), 132), ((7,), 7)):
        with driver.compile_only(arch, *given) as compiled:
            assert device.HERE.gpu == (arch, count)
            made = JITFunction.run(kernel, 1, 2, grid=[3, 4], warmup=False, num_warps=8)
        assert made == (kernel, (1, 2), [3, 4], True, {"num_warps": 8})
        assert compiled == [("name", made, (3, 4))]
    with driver.compiling(arch):
        assert device.HERE.gpu == (arch, 132) and choice.chosen() == "triton"


@pytest.mark.parametrize("dry", (True, False))
@pytest.mark.parametrize("before", (True, False))
def test_which_kernels_are_heard_of(before, dry, monkeypatch):
    """Those of its thread in a dry run, else all; the first time that each is asked for. Whoever
    listened before hears all that is said."""
    heard = []
    listener = (lambda **said: heard.append(said)) if before else None
    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    monkeypatch.setattr(device.HERE, "gpu", "a GPU" if dry else None)
    said = [{"metadata": {"hash": name}, "cache_hit": hit, "src": 1} for name, hit in
            (("a", True), ("b", False), ("a", False))]  # fmt: skip
    with driver.listening() as hits:
        listen = triton.knobs.compilation.listener
        in_thread(lambda: listen(**said[1]))
        listen(**said[0])
        listen(**said[2])
    assert hits == {"a": True} | ({} if dry else {"b": False})
    assert heard == ([said[1], said[0], said[2]] if before else [])
    assert triton.knobs.compilation.listener is listener
