"""Rivals of hyper_attention compute it, or say what else; FLOPs and bytes at a layer's sizes."""

import pytest
import torch

from fusedmlp.bench import shapes
from fusedmlp.bench.rivals import RIVALS, hyper as rivals_hyper
from fusedmlp.bench.timing import calls
from fusedmlp.bench.work import Work, case_of


def work(name="hyper_attention-layer", M=36, D=64, H=2, dtype="float32"):
    return Work(case_of(name), "identity", dtype, M, D, H)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(rivals_hyper, "CHUNK", 4)
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)


@pytest.mark.parametrize("name", ("chunked", "compile-chunked"))
def test_computes_the_op(name, small_chunks, device):
    here = work()
    assert RIVALS[name].skip(here, "both") is None
    assert calls.disagreement(RIVALS[name], here, device) is None
    inputs = calls.draw(here, device, 0)
    for phase in ("forward", "both"):
        ours, theirs = (calls.calls_of(RIVALS[n], here, phase, [inputs])[0]()
                        for n in ("eager", name))  # fmt: skip
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("heads", (2, 16))
def test_softmax_attention_of_the_same_flops(heads):
    here = work(M=16384, D=1024, H=heads)
    batch, others, T, width = RIVALS["sdpa"].sizes(here)
    assert (batch, T) == (4, 4096) and 64 <= width <= 128
    flops = 4 * batch * others * width * T * (T + 1) // 2
    assert flops == pytest.approx(here.flops("forward"), rel=0.012)


def test_softmax_attention_runs_and_has_no_backward_here(device):
    here = work()
    inputs = calls.draw(here, device, 0)
    (call,) = calls.calls_of(RIVALS["sdpa"], here, "forward", [inputs])
    assert call().isfinite().all()
    assert RIVALS["sdpa"].phases == ("forward",)


def test_flops_and_bytes_of_a_layer():
    """The parts of the specification's 0.231 TF that go by pairs of tokens."""
    here = work(M=16384, D=1024, H=2)
    pairs = 4 * 4096 * 4097 // 2
    assert here.flops("forward") == pairs * (5 * 1024 // 2 + 4 * 16 * 6)
    tokens, slots = 4 * 4096, 4096
    per_token = 2 * 256 + 2 * 1024 + 16 * 6  # q, k; v, out; controls
    bytes_ = 2 * (tokens * per_token + slots * 33 * 6)
    assert work(M=16384, D=1024, H=2, dtype="bfloat16").bytes("forward") == bytes_


@pytest.mark.parametrize("heads", (2, 16))
def test_bytes_of_a_step(heads):
    """Each cache and parameter byte once; beside them a row of q, controls and the result."""
    N, Q = 4096, 2 * heads
    here = work("hyper_attention_step-layer", 8 * N, 1024, heads, "bfloat16")
    cache, slots = 8 * N * (256 + 1024), N * 33 * (Q + heads)
    row = 8 * (256 + 1024 + 16 * (Q + heads))
    assert here.bytes("forward") == 2 * (cache + slots + row)
    assert here.flops("forward") == 8 * N * (2560 + 64 * (Q + heads))
    assert RIVALS["eager"].skip(here, "backward") == "has no gradient"


def test_models_name_both():
    for model in shapes.HYPER.values():
        cases = [case_of(name) for name in shapes.cases_of(model)]
        assert [case.op for case in cases] == ["hyper_attention", "hyper_attention_step"]
        assert cases[0].shapes(4096, model.D, model.H)["q"] == (
            4, 2 * model.H, 1024, 1024 // 8 // model.H,
        )  # fmt: skip


def test_values_stay_small(device):
    """Random parameters as they are would leave float16's range."""
    for name in ("hyper_attention-layer", "hyper_attention_step-layer"):
        here = work(name, M=256, D=64, H=2, dtype="float16")
        inputs = calls.draw(here, device, 0)
        assert here.case.run_reference(inputs).isfinite().all()
