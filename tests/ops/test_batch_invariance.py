"""batch_invariant(): a row's result and its gradient are the same bits in any batch, of every op
that promises it; and what cannot promise it says so."""

import inspect
import os
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
from compiled import in_compiler
from invariance import BATCHES, bits, differing, executed
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler

import fusedmlp
from fusedmlp.backends import library
from fusedmlp.backends.choice import launcher
from fusedmlp.backends.cuda.loader import Unfit
from fusedmlp.backends.op import KERNELS, OPS
from fusedmlp.invariance import invariant
from fusedmlp.kernels import pick, plans
from fusedmlp.testing import CASES, evaluate, floating

# The rows of these are not a batch: positions of a sequence, and slots of a cache (below).
NOT_ROWS = ("hyper_attention", "hyper_attention_step")
NAMES = [name for name, case in CASES.items() if case.op not in NOT_ROWS]
# The last Case of each op has the most: biases, choices, masks. Eight choices a token take long.
ONE_EACH = list({CASES[name].op: name for name in NAMES if "top8" not in name}.values())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNED, RAGGED = (80, 112), (67, 101)


@pytest.mark.parametrize("size", (ALIGNED, RAGGED), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_by_formulas_on_a_cpu(name, size):
    for dtype in (*DTYPES, torch.float64):
        assert differing(CASES[name], *size, dtype, wanted="all") == [], dtype


@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients_lie_as_without_the_mode(name):
    case = CASES[name]
    inputs = case.inputs(5, *RAGGED, torch.float32, "cpu", seed=0)
    dy = None if case.forward_only else torch.randn_like(case.run_reference(inputs))
    laid = []
    for mode in (False, True):
        with fusedmlp.batch_invariant(mode):
            found = evaluate(case.run, inputs, dy, tuple(floating(inputs)))
        laid.append({key: (t.shape, t.stride(), t.dtype) for key, t in found.items()})
    assert laid[0] == laid[1]


def test_wide_rows_on_a_cpu_which_threads_share():
    """More elements than PyTorch gives one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            assert differing(CASES["gated_mlp-bias"], 33, 2051, dtype, (2, 17, 64)) == []
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ONE_EACH)
def test_rows_in_kernels(name, device, on_triton):
    found = differing(
        CASES[name], *ALIGNED, torch.float32, (2, 17, 33), device=device, wanted="all"
    )
    assert found == []


# Each Case once, in sizes and dtypes by turns: all six of each are 342 tests.
GRID = [(name, (ALIGNED, RAGGED)[i % 2], DTYPES[i % 3]) for i, name in enumerate(NAMES)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "dtype"), GRID)
def test_rows_in_kernels_in_all_batches(name, size, dtype, device, on_triton):
    assert differing(CASES[name], *size, dtype, BATCHES, device=device, wanted="all") == []


def test_without_the_mode_rows_differ(device, on_triton):
    """And with a tile that goes by the number of rows, which is what the mode is for."""
    case, batches = CASES["gated_linear-bias"], (17, 33)
    assert differing(case, *ALIGNED, torch.float32, batches, device=device, mode=False)
    with mock.patch.object(pick, "invariant", return_value=False):
        assert differing(case, *ALIGNED, torch.float32, batches, device=device)


EXECUTED = [
    ("sm_80", "gated_mlp-bias", torch.float32),
    ("sm_90", "linear_act-bias", torch.bfloat16),
]
# Five blocks on each generation, and each dtype there: all three of each are 45.
BLOCKS = ("gated_mlp-bias", "mlp-bias", "masked_gated_linear-2-bits", "binary_gated_mlp",
          "moe_mlp-top2-bias")  # fmt: skip
MORE = [
    (arch, name, DTYPES[(i + j) % len(DTYPES)])
    for i, arch in enumerate(("sm_80", "sm_90", "sm_100"))
    for j, name in enumerate(BLOCKS)
]


@pytest.mark.parametrize(
    ("arch", "name", "dtype"),
    [*EXECUTED, *(pytest.param(*job, marks=pytest.mark.slow) for job in MORE)],
)
def test_rows_in_compiled_kernels(arch, name, dtype):
    """In the machine for PTX: few rows and more than a tile of them, at widths that TMA takes."""
    batches = (2, 17, 33, 130)[: 4 if (arch, name, dtype) in MORE else 2]
    found, ran = in_compiler(executed, arch, name, dtype, ALIGNED, batches)
    assert found == [] and ran
    assert not any("partial" in kernel for kernel in ran), "K was cut for few rows"


@pytest.mark.parametrize("backend", ("auto", "triton"))
def test_steps_of_hyper_attention(backend, device):
    """A batch of caches."""
    B, H, N, dq, dv = 5, 2, 40, 16, 8
    draw = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw, device=device)  # noqa: E731
    q, k, v = normal(B, 2 * H, dq), normal(B, 2 * H, N, dq), normal(B, H, N, dv)
    at = torch.tensor([33], device=device)
    with fusedmlp.backend(backend), fusedmlp.batch_invariant():
        among = fusedmlp.hyper_attention_step(q, k, v, at)
        for b in range(B):
            alone = fusedmlp.hyper_attention_step(q[b : b + 1], k[b : b + 1], v[b : b + 1], at)
            assert torch.equal(bits(alone[0]), bits(among[b]))


@pytest.mark.parametrize("backend", ("auto", "triton"))
def test_sequences_of_hyper_attention(backend, device):
    B, H, T, dq, dv = 3, 2, 40, 16, 8
    draw = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw, device=device)  # noqa: E731
    q, k, v = normal(B, 2 * H, T, dq), normal(B, 2 * H, T, dq), normal(B, H, T, dv)
    with fusedmlp.backend(backend), fusedmlp.batch_invariant():
        among = fusedmlp.hyper_attention(q, k, v)
        for b in range(B):
            one = slice(b, b + 1)
            alone = fusedmlp.hyper_attention(q[one], k[one], v[one])
            assert torch.equal(bits(alone[0]), bits(among[b]))


# ---- the mode


def block(device, rows=33):
    torch.manual_seed(0)
    x, w_in, w_out = torch.randn(rows, 80), torch.randn(112, 80), torch.randn(80, 112)
    return [t.to(device).requires_grad_() for t in (x, w_in, w_out)]


@pytest.mark.parametrize("recompute", (False, True))
def test_backward_outside_is_in_the_mode_of_its_forward(recompute, device, each_backend):
    x, *weights = block(device)
    dy = torch.randn(33, 80, device=device)

    def dx(rows, inside):
        with fusedmlp.batch_invariant():
            y = fusedmlp.mlp(x[rows], *weights, recompute=recompute)
        with fusedmlp.batch_invariant(inside):
            return torch.autograd.grad(y, x, dy[rows])[0][rows]

    whole = dx(slice(0, 33), True)
    assert torch.equal(whole, dx(slice(0, 33), False))
    assert torch.equal(whole[5:6], dx(slice(5, 6), False))


def test_a_thread_has_its_own():
    seen = []
    with fusedmlp.batch_invariant():
        thread = threading.Thread(target=lambda: seen.append(invariant()))
        thread.start()
        thread.join()
        with fusedmlp.batch_invariant(False):
            seen.append(invariant())
        seen.append(invariant())
    assert seen == [False, False, True] and not invariant()
    assert fusedmlp.batch_invariant()(invariant)() and not invariant()


def test_rows_are_read_alike_wherever_they_lie(device, on_triton):
    x, *weights = (t.detach() for t in block(device))
    wide = torch.zeros(33, 83, device=device)
    wide[:, 1:81] = x
    with fusedmlp.batch_invariant():
        expected = fusedmlp.mlp(x, *weights)
        assert torch.equal(expected, fusedmlp.mlp(wide[:, 1:81], *weights))
        assert torch.equal(expected[7:8], fusedmlp.mlp(wide[7:8, 1:81], *weights))


def test_compiled_code_is_guarded_by_the_mode(device, on_triton):
    x, *weights = block(device)
    called = []

    def look(graph, inputs):
        called.append([str(node.target) for node in graph.graph.nodes])
        return graph

    looking = aot_autograd(fw_compiler=make_boxed_compiler(look))
    compiled = torch.compile(fusedmlp.mlp, backend=looking, fullgraph=True)

    def run(rows):
        y = compiled(x[rows], *weights)
        return y, torch.autograd.grad(y.sum(), x)[0][rows]

    run(slice(0, 33))
    assert not any("invariant" in name for graph in called for name in graph)
    with fusedmlp.batch_invariant():
        among = run(slice(0, 33))
    forward, backward = called[-2:]
    for graph in (forward, backward):
        own = [name for name in graph if name.startswith("fusedmlp.")]
        assert own and all("_invariant" in name for name in own)
        assert not any(name.startswith(("aten.mm", "aten.addmm")) for name in graph)
    with fusedmlp.batch_invariant():
        alone = run(slice(5, 6))
    assert all(torch.equal(a[0], b[5]) for a, b in zip(alone, among, strict=True))


@pytest.mark.parametrize("name", ("mlp", "mlp-bias"))
def test_formulas_in_the_mode_give_what_they_give_without(name):
    inputs = CASES[name].inputs(19, 24, 16, torch.float32)
    with fusedmlp.backend("reference"):
        expected = CASES[name].run(inputs)
        with fusedmlp.batch_invariant():
            torch.testing.assert_close(CASES[name].run(inputs), expected)


def test_rows_that_lie_so_are_not_copied():
    memory = torch.zeros(12, 8)
    assert library._lies_by_width(memory) and library._lies_by_width(memory[2:])
    for other in (memory[:, :4], memory.t(), memory[::2], memory.flatten()[1:9].view(2, 4)):
        assert not library._lies_by_width(other)
    assert not library._lies_by_width(torch.zeros(34)[2:].view(4, 8))  # 8 bytes on
    launch = library._by_widths(KERNELS["gated_linear_fwd"], lambda x, *rest: x)
    for mode, rows, kept in ((True, memory, True), (True, memory.t(), False), (False, other, True)):
        with fusedmlp.batch_invariant(mode):
            assert (launch(rows) is rows) == kept and torch.equal(launch(rows), rows)


@pytest.mark.parametrize("name", KERNELS)
def test_the_mode_is_in_the_key_of_a_plan(name):
    launcher = KERNELS[name].triton
    key_of, _ = plans._key_of(launcher)
    kinds = inspect.signature(launcher, eval_str=True).parameters.values()
    arguments = [torch.zeros(2, 2) if p.annotation is torch.Tensor else None for p in kinds]
    before = key_of(None, 0, *arguments)
    with fusedmlp.batch_invariant():
        inside = key_of(None, 0, *arguments)
    assert before != inside and before == key_of(None, 0, *arguments)


def test_a_patched_block_is_in_it_by_itself(device, each_backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 112), nn.GELU(), nn.Linear(112, 80)).to(device)
    fusedmlp.patch(model, batch_invariant=True)
    x = torch.randn(33, 80, device=device)
    assert torch.equal(model(x)[5:6], model(x[5:6])) and not invariant()
    assert "batch-invariant" in repr(model)
    model[2].register_forward_hook(lambda *_: None)
    with pytest.raises(
        TypeError, match="batch_invariant=True all of mlp must be fused, got linear"
    ):
        model(x)


def test_explain_says_that_it_is_on():
    assert "batch invariance: on" not in fusedmlp.explain()
    with fusedmlp.batch_invariant():
        assert f"batch invariance: on in this thread, as for {pick.ROWS}" in fusedmlp.explain()


# ---- what cannot


def test_the_cuda_kernels_refuse():
    for row in (row for op in OPS.values() for row in op.cuda):
        launch = launcher(row, lambda *_: "triton")
        with fusedmlp.batch_invariant():
            assert launch(torch.zeros(2, 2)) == "triton"
            with fusedmlp.backend("cuda"), pytest.raises(Unfit, match="must be 'auto' or 'triton'"):
                launch(torch.zeros(2, 2))


def test_transforms_and_second_derivatives_refuse(device, each_backend):
    x, *weights = block(device)
    with fusedmlp.batch_invariant():
        with pytest.raises(RuntimeError, match=r"mlp: .* got a transform of torch.func"):
            torch.func.grad(lambda t: fusedmlp.mlp(t, *weights).sum())(x)
        y = fusedmlp.mlp(x, *weights)
    if each_backend == "triton":
        with pytest.raises(RuntimeError, match="mlp: create_graph must be False"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.interpreter
def test_formulas_refuse_to_be_compiled():
    x, *weights = block("cpu")
    compiled = torch.compile(fusedmlp.mlp, backend="eager", fullgraph=True)
    with fusedmlp.batch_invariant(), pytest.raises(Exception, match="torch.compile on CPU tensors"):
        compiled(x, *weights)


def test_arguments():
    with pytest.raises(TypeError, match="batch_invariant: on must be True or False, got 1"):
        fusedmlp.batch_invariant(1)
    with pytest.raises(TypeError, match="batch_invariant must be True or False, got 1"):
        fusedmlp.patch(nn.Linear(2, 2), batch_invariant=1)


@pytest.mark.parametrize("value", ("1", "yes"))
def test_the_environment(value):
    code = "import fusedmlp.invariance as i; print(i.invariant())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "FUSEDMLP_BATCH_INVARIANT": value},
    )  # fmt: skip
    assert done.stdout == "True\n" if value == "1" else "must be 0 or 1, got 'yes'" in done.stderr
