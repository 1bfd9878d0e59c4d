"""Patched models on a GPU. Collected everywhere; conftest.py deselects it where there is none."""

import copy

import pytest
import torch
from patch_models import KINDS, batch, build, decode, first_block, values

import fusedmlp
from fusedmlp.testing import assert_close_to

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", KINDS)
def test_a_step_in_float32(name):
    model, inputs = build(name).cuda(), {k: t.cuda() for k, t in batch(name).items()}
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    assert {e.backend for e in fusedmlp.patch(ours).patched} == {"triton"}
    results = []
    for m in (ours, exact, model):
        dtype = next(m.parameters()).dtype
        out = m(**{k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()})
        out.loss.backward()
        results.append({"logits": out.logits.detach(), "loss": out.loss.detach()} | {
            f"d{k}": torch.zeros_like(p) if p.grad is None else p.grad
            for k, p in m.named_parameters()
        })  # fmt: skip
    for key, out in results[0].items():
        assert_close_to(out, results[1][key], results[2][key], name=key)


@pytest.mark.parametrize("name", KINDS)
def test_a_token_in_a_cuda_graph(name):
    """A block is captured for one token, and the replay follows new values in the same memory."""
    block, run = first_block(name)
    block.cuda().to(torch.bfloat16)
    static = torch.randn(1, 1, 64, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = values(run(static))
    for seed in range(3):
        torch.manual_seed(seed)
        static.copy_(torch.randn(1, 1, 64))
        graph.replay()
        with torch.no_grad():
            assert torch.equal(y, values(run(static)))


def test_decoding_in_cuda_graphs():
    """torch.compile's own CUDA graphs around a patched model, token by token."""
    model = build("llama", num_hidden_layers=1).eval().cuda()
    ids = batch("llama", rows=1, length=5)["input_ids"].cuda()
    fusedmlp.patch(model)
    with torch.no_grad(), torch.device("cuda"):
        expected = decode(model, model, ids, 6)
        torch._dynamo.reset()
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        out = decode(compiled, model, ids, 6)
    assert torch.equal(out.argmax(-1), expected.argmax(-1))
