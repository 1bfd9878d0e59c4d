"""What only a GPU can show. Collected everywhere; conftest.py deselects it where there is none."""

import re
import threading

import pytest
import torch

import fusedmlp
from fusedmlp.backends.cuda import loader
from fusedmlp.kernels.device import capability_of
from fusedmlp.testing import CASES, assert_close_to, compare, evaluate, yardsticks

pytestmark = pytest.mark.gpu

OWN = loader.ops_with_kernels(portable=False)
GEMMS = {name: case for name, case in CASES.items() if case.op in OWN}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("shape", [(4096, 1024, 2816), (2047, 1000, 1001), (1, 4096, 14336)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_model_sizes(case, shape, dtype):
    for name, numbers in compare(case, case.inputs(*shape, dtype, "cuda")).items():
        assert_close_to(*numbers, name=name)


@pytest.mark.extension
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", [(4096, 1024, 2816), (2047, 1000, 1008), (1, 4096, 14336)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("case", GEMMS.values(), ids=GEMMS)
def test_model_sizes_in_the_cuda_extension(case, shape, dtype):
    inputs = case.inputs(*shape, dtype, "cuda")
    launcher, why = loader.find(OWN[case.op][0], capability_of(inputs["x"].device))
    with fusedmlp.backend("cuda"):
        if launcher is None:
            with pytest.raises(RuntimeError, match=re.escape(why)):
                case.run(inputs)
        else:
            for name, numbers in compare(case, inputs).items():
                assert_close_to(*numbers, name=name)


@pytest.mark.parametrize("name", ("gated_mlp-bias", "mlp-bias", "gated_mlp-recompute-bias"))
def test_cuda_graph(name):
    """Forward and backward are captured, and the replay follows new values in the same memory."""
    case = CASES[name]
    inputs = case.inputs(64, 256, 512, torch.bfloat16, "cuda")
    static = {k: t.clone().requires_grad_() for k, t in inputs.items()}
    dy = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(case.run(static), list(static.values()), dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(static)
        grads = torch.autograd.grad(out, list(static.values()), dy)
    fresh = case.inputs(64, 256, 512, torch.bfloat16, "cuda", seed=9)
    with torch.no_grad():
        for k, t in static.items():
            t.copy_(fresh[k])
    graph.replay()
    expected = evaluate(case.run, fresh, dy)
    assert torch.equal(out, expected["out"])
    for k, g in zip(static, grads, strict=True):
        assert torch.equal(g, expected[f"d{k}"])


@pytest.mark.parametrize("name", ("gated_linear", "gated_mlp-recompute-bias"))
def test_a_new_thread(name):
    """An op is the first CUDA call of its thread, with its kernel loaded and its memory cached:
    TMA descriptors are made in a context all the same."""
    case = CASES[name]
    inputs = case.inputs(256, 512, 1024, torch.bfloat16, "cuda")
    expected = case.run(inputs).clone()
    found = []
    thread = threading.Thread(target=lambda: found.append(case.run(inputs)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("name", ("gated_mlp-bias", "mlp"))
def test_inductor(name):
    case = CASES[name]
    inputs = case.inputs(128, 256, 512, torch.bfloat16, "cuda")
    dy = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True)
    # By the rule, not by eager's bits: inductor may sum a bias's gradient in another order.
    known = yardsticks(case.run_reference, inputs, dy)
    for key, t in evaluate(compiled, inputs, dy).items():
        assert_close_to(t, *known[key], name=key)


def test_reference_on_the_gpu_only_when_asked():
    case = CASES["gated_mlp"]
    inputs = case.inputs(64, 128, 256, torch.bfloat16, "cuda")
    assert re.search("cuda tensors: (triton|cuda)", fusedmlp.explain())
    with fusedmlp.backend("reference"):
        assert "cuda tensors: reference (asked for)" in fusedmlp.explain()
        assert torch.equal(case.run(inputs), case.run_reference(inputs))


def test_float32_follows_the_matmul_precision():
    case = CASES["gated_linear"]
    inputs = case.inputs(256, 512, 512, torch.float32, "cuda")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        exact = case.run_reference({k: t.double() for k, t in inputs.items()})
        full = (case.run(inputs) - exact).abs().max()
        torch.set_float32_matmul_precision("high")
        tf32 = (case.run(inputs) - exact).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert full < 1e-5 < tf32 < 1e-1


def test_peak_memory_of_a_block():
    """Beyond its arguments, result and gradients: g, u, h forward; dg, du and h in backward."""
    M, D, H = 4096, 1024, 4096
    case = CASES["gated_mlp"]
    inputs = case.inputs(M, D, H, torch.bfloat16, "cuda")
    for t in inputs.values():
        t.requires_grad_()
    # What is held once a process and a thread, cuBLAS's workspaces, is no memory of the block.
    torch.autograd.grad(case.run(inputs).float().sum(), list(inputs.values()))
    out = case.run(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    torch.autograd.grad(out.float().sum(), list(inputs.values()))
    peak = torch.cuda.max_memory_allocated() - start
    gradients = sum(t.numel() for t in inputs.values()) * 2
    assert peak <= gradients + 2 * (3 * M * H) + 8 * M * D + (32 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("gated_act", "linear_act", "gated_mlp"))
def test_more_than_two_to_the_31_elements(name):
    """h has 2^31 + elements: offsets are int64 or the last rows are wrong."""
    H = 16384
    M = 2**31 // H + 256
    case = CASES[name]
    inputs = case.inputs(M, 64, H, torch.bfloat16, "cuda")
    rows = tuple(n for n in inputs if n in ("x", "g", "u"))
    tail = {n: t[-300:].contiguous() if n in rows else t for n, t in inputs.items()}
    dy = torch.randn(M, case.fake_output(1, 64, H).shape[1], device="cuda", dtype=torch.bfloat16)
    whole, part = evaluate(case.run, inputs, dy, rows), evaluate(case.run, tail, dy[-300:], rows)
    for name in part:
        # Another tile may sum in another order.
        torch.testing.assert_close(whole[name][-300:], part[name], rtol=2e-2, atol=2e-2)
