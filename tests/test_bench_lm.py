"""The language model bench: its text, its repeatability, its records."""

import dataclasses
import json

import pytest
import torch

from fusedmlp.bench import lm

TINY = lm.Plan("swiglu", layers=1, dim=16, hidden=32, context=8, batch=2, steps=4, every=2,
               held_out=2, warmup=2)  # fmt: skip
TEXT = torch.arange(40_000).mul(7919).remainder(251).to(torch.uint8)


def test_text_is_the_standard_library():
    data = lm.text()
    assert data.dtype == torch.uint8 and len(data) > 1_000_000
    assert b"def " in data.numpy().tobytes()


def test_held_out_text_is_not_trained_on():
    training, held = lm.split(torch.arange(40_000), 8)
    assert len(training) + len(held) == 40_000
    assert not set(training.tolist()) & set(held.tolist())
    assert 0.04 < len(held) / 40_000 < 0.06


@pytest.mark.parametrize(
    "mlp, attention",
    [*((m, "softmax") for m in lm.MLPS), ("gelu", "hyperglu"), ("gelu", "hypermlp")],
)
def test_runs_repeat_and_learn(mlp, attention):
    plan = dataclasses.replace(TINY, mlp=mlp, attention=attention)
    curves = [list(lm.train(plan, TEXT)) for _ in range(2)]
    losses = [[point["held_out"] for point in curve] for curve in curves]
    assert losses[0] == losses[1]
    assert [point["step"] for point in curves[0]] == [0, 2, 4]
    record = json.loads(json.dumps(lm.result(plan, TEXT, curves[0])))
    assert record["held_out_loss"] == losses[0][-1] < losses[0][0]


def test_models_agree_but_for_their_mlp():
    one, other = (dict(lm.Model(dataclasses.replace(TINY, mlp=m)).named_parameters())
                  for m in ("mswiglu-1", "mswiglu-4"))  # fmt: skip
    for name, p in one.items():
        assert name.endswith("mask") or torch.equal(p, other[name]), name


@pytest.mark.parametrize("attention", ("hyperglu", "hypermlp"))
def test_equal_parameters_in_place_of_attention(attention):
    ours, softmax = (
        lm.parameters_of(lm.Plan("swiglu", attention=a)) for a in (attention, "softmax")
    )
    assert ours["attention_weights"] == pytest.approx(softmax["attention_weights"], rel=0.02)


def test_no_time_ends_a_run():
    (point,) = lm.train(TINY, TEXT, seconds=-1)
    assert point["step"] == 0


def test_table_and_plot(tmp_path):
    results = [lm.result(dataclasses.replace(TINY, seed=s), TEXT, list(lm.train(TINY, TEXT)))
               for s in (0, 1)]  # fmt: skip
    assert "| swiglu | " in lm.table(results)
    lm.plot(results, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 1000
