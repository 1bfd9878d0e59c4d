"""The language model bench: its text, equal weights, runs that repeat and go on, its page."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedmlp.bench import cli
from fusedmlp.bench.experiments import lm, lm_page, lm_train
from fusedmlp.bench.experiments.lm_attention import MIXERS
from fusedmlp.bench.experiments.lm_models import (
    MLPS,
    LanguageModel,
    ModelPlan,
    build_mlp,
    names,
    weights_of,
)
from fusedmlp.bench.experiments.lm_one_bit import ROUNDED
from fusedmlp.bench.experiments.lm_train import Run
from fusedmlp.bench.options import Refusal
from fusedmlp.bench.report import plots

TINY = ModelPlan(
    "swiglu", layers=1, dim=16, heads=2, context=8, batch=2, steps=4, every=2, held_out=2, warmup=2
)
TEXT = torch.arange(40_000).mul(7919).remainder(251).to(torch.uint8)
KEPT = Path(__file__).parents[3] / "bench" / "results" / "lm"


def trained(plan):
    run = Run(plan, TEXT)
    run.go_on()
    return run


def losses(run):
    return [{k: v for k, v in point.items() if k != "seconds"} for point in run.curve]


def test_text_is_the_standard_library():
    data = lm_train.text()
    assert data.dtype == torch.uint8 and len(data) > 1_000_000
    assert b"def " in data.numpy().tobytes()


def test_held_out_text_is_not_trained_on():
    training, held = lm_train.split(torch.arange(40_000), 8)
    assert len(training) + len(held) == 40_000
    assert not set(training.tolist()) & set(held.tolist())
    assert 0.04 < len(held) / 40_000 < 0.06


@pytest.mark.parametrize("name, build", MIXERS)
def test_mixers_are_causal_and_of_equal_weights(name, build):
    torch.manual_seed(0)
    mixer, x = build(16, 2, 8).eval(), torch.randn(1, 8, 16)
    y = mixer(x)
    x[:, 5:] += 1
    torch.testing.assert_close(mixer(x)[:, :5], y[:, :5])
    assert not torch.allclose(mixer(x)[:, 5:], y[:, 5:])
    with torch.device("meta"):
        assert weights_of(build(96, 3, 128)) == pytest.approx(4 * 96**2, rel=0.02)


@pytest.mark.parametrize("mlp", names(MLPS))
def test_equal_weights(mlp):
    """The four MLPs of the table match exactly; PathWeightedFFF's widths are what they are."""
    for dim in (96, 384):
        with torch.device("meta"):
            got = weights_of(build_mlp(mlp, dim))
        near = {"path-7": 1.0}.get(mlp, 0.0 if mlp in names(MLPS)[:4] else 0.01)
        assert got == pytest.approx(8 * dim**2, rel=near, abs=0), dim


@pytest.mark.parametrize(
    "mlp, mixer",
    [*((mlp, "attention") for mlp in names(MLPS)), ("swiglu", "hyperglu"), ("gelu", "hypermlp")],
)
def test_runs_repeat_and_learn(mlp, mixer):
    plan = dataclasses.replace(TINY, mlp=mlp, mixer=mixer)
    for block in LanguageModel(plan).blocks:
        y = block.mlp(torch.randn(2, 8, 16))
        begins_at_0 = not (y[0] if isinstance(y, tuple) else y).any()
        # A scale of 0 would never learn.
        assert begins_at_0 == (mlp != "binary"), "an MLP begins at 0"
    once, again = trained(plan), trained(plan)
    assert losses(once) == losses(again)
    assert [point["step"] for point in once.curve] == [0, 2, 4]
    record = json.loads(json.dumps(once.record()))
    assert record["held_out_loss"] == once.curve[-1]["held_out"] < once.curve[0]["held_out"]
    assert all(p.isfinite().all() for p in once.model.parameters())


@pytest.mark.parametrize("mlp", ("binary", *ROUNDED))
def test_one_bit_after_training(mlp):
    run = trained(dataclasses.replace(TINY, mlp=mlp))
    before = [p.clone() for p in run.model.parameters()]
    record = run.record()
    assert all(map(torch.equal, before, run.model.parameters())), "the trained model changed"
    if mlp == "binary":
        assert record["packed_held_out_loss"] == pytest.approx(record["held_out_loss"], rel=1e-6)
        assert "rounded_held_out_loss" not in record
    else:
        matrices = [p for p in run.model.blocks[0].mlp.parameters() if p.dim() == 2]
        assert len(record["relative_weight_error"]) == len(matrices)
        assert all(0.3 < e < 0.8 for e in record["relative_weight_error"])
        assert record["rounded_held_out_loss"] != record["held_out_loss"]
    ((_, models),) = lm_page.comparisons([record])
    (sentence,) = lm_page.one_bit(models)
    assert sentence.endswith("bits a byte (seed 0).") and sentence in lm_page.markdown([record])
    assert ("off by" in sentence) == (mlp != "binary")


def test_models_agree_but_for_their_mlp():
    one, other = (
        dict(LanguageModel(dataclasses.replace(TINY, mlp=mlp)).named_parameters())
        for mlp in ("relu_sq", "switch-4")
    )
    assert {n for n in one if ".mlp." not in n} == {n for n in other if ".mlp." not in n}
    for name, p in one.items():
        assert ".mlp." in name or torch.equal(p, other[name]), name


class Dropping(nn.Module):
    """Draws from torch's own generator in training, has a loss of its own."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.5))
        self.pulled = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.inner(x), self.pulled.square().sum()


@pytest.fixture
def dropping(monkeypatch):
    monkeypatch.setattr(
        "fusedmlp.bench.experiments.lm_models.MLPS", [*MLPS, ("dropping", Dropping)]
    )
    return dataclasses.replace(TINY, mlp="dropping")


def test_auxiliary_loss_in_training_and_held_out_text_in_eval_mode(dropping):
    run = trained(dropping)
    assert run.model.blocks[0].mlp.pulled.item() < 1
    assert run.held_out_loss() == run.held_out_loss() and run.model.training


@pytest.mark.parametrize("stop", (0, 2, 3))
@pytest.mark.parametrize("mlp", ("mswiglu-2", "switch-4", "dropping"))
def test_a_resumed_run_equals_one_that_never_stopped(mlp, stop, tmp_path, dropping):
    """Bit for bit, whether it stopped at a point of the curve or between two."""
    plan, path = dataclasses.replace(TINY, mlp=mlp, steps=5), tmp_path / "run.safetensors"
    whole, first = trained(plan), Run(plan, TEXT)

    def tick():
        if first.step == stop:
            first.save(path)
            raise KeyboardInterrupt

    if stop:
        with pytest.raises(KeyboardInterrupt):
            first.go_on(tick=tick)
    else:
        first.go_on(over=lambda: True, keep=lambda run: run.save(path))
    torch.manual_seed(99)
    second = Run.load(path, TEXT)
    assert second.step == stop and not second.finished
    second.go_on()
    assert losses(second) == losses(whole)
    for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not list(tmp_path.glob("*.part"))


def test_a_run_on_another_text_is_refused(tmp_path):
    Run(TINY, TEXT).save(tmp_path / "run.safetensors")
    with pytest.raises(Refusal, match=r"run\.safetensors: expected a run on this Python's"):
        Run.load(tmp_path / "run.safetensors", TEXT + 1)


def test_bfloat16_by_autocast():
    run = trained(dataclasses.replace(TINY, dtype="bfloat16"))
    assert run.curve[-1]["held_out"] < run.curve[0]["held_out"]
    assert run.curve != trained(TINY).curve
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_command(tmp_path, monkeypatch, capsys):
    """Time over, then the rest, then nothing left to do; a page and a plot."""
    monkeypatch.setattr(lm, "text", lambda: TEXT)
    monkeypatch.setattr(lm.machine, "commit", lambda: "one")
    command = ["lm", "--mlp", "relu_sq", "swiglu", "--seeds", "2", "--dim", "16", "--heads", "2",
               "--layers", "1", "--context", "8", "--batch", "2", "--steps", "4", "--device",
               "cpu", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main([*command, "--minutes", "1e-9"]) == 0
    assert "4 of 4 runs unfinished" in capsys.readouterr().out
    assert lm.read(tmp_path) == [] and len(list(tmp_path.glob("checkpoints/*"))) == 1

    monkeypatch.setattr(lm.machine, "commit", lambda: "another")
    assert cli.main(command) == 0
    records = lm.read(tmp_path)
    assert records[0]["commit"] == "one, then another" and records[1]["commit"] == "another"
    assert [(r["model"], r["seed"]) for r in records] == [
        ("relu_sq", 0), ("relu_sq", 1), ("swiglu", 0), ("swiglu", 1),
    ]  # fmt: skip
    assert capsys.readouterr().out.count("relu_sq") > 1
    page = (tmp_path / "table.md").read_text()
    assert page == lm_page.markdown(records) and "* 3A, swiglu for relu_sq: " in page
    (plot,) = lm_page.plots(records)
    assert plots.fault(plot, tmp_path / f"{plot.name}.svg") is None

    monkeypatch.setattr(Run, "go_on", lambda *a: pytest.fail("a finished run was trained again"))
    assert cli.main(command) == 0
    assert lm.read(tmp_path) == records
    assert cli.main(["lm", "--dim", "20", "--heads", "3"]) == 2
    assert "--dim must be a multiple of 2 * --heads" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"records": [{"kind": "toy"}]}')
    assert cli.main(["lm", "--report", "--out", str(tmp_path)]) == 2
    assert "expected a file that `lm` wrote" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ("-1", "0", "nan", "soon"))
def test_minutes_are_positive(minutes, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["lm", "--minutes", minutes])
    assert end.value.code == 2
    assert f"--minutes: must be a number above 0; got '{minutes}'" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (["lm", "--out", str(tmp_path / "lm")], ["table"]):
        assert cli.main([*command, "--device", "cuda"]) == 2
        assert "--device cuda needs a GPU; torch finds none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["lm", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path / 'file'}: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "expected a folder with a results.json that `lm` wrote"),
        ('[{"kind": "lm"}]', "results.json: expected a file that `lm` wrote"),
        ('{"records": [{"kind": "lm"}]}', "results.json: expected a file that `lm` wrote"),
        ('{"records": 3}', "results.json: expected a file that `lm` wrote"),
        ("{", "results.json: Expecting property name"),
    ],
)
def test_report_refuses_what_it_did_not_write(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert cli.main(["lm", "--report", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def record(model, seed, loss, **more):
    return trained(dataclasses.replace(TINY, seed=seed, steps=1)).record() | {
        "model": model, "held_out_loss": loss, **more,
    }  # fmt: skip


def test_verdicts():
    records = [record(m, s, loss) for m, pair in (("relu_sq", (1.0, 1.1)), ("swiglu", (0.9, 1.0)),
               ("gelu", (0.9, 1.2))) for s, loss in enumerate(pair)]  # fmt: skip
    ((_, models),) = lm_page.comparisons(records)
    three_a, three_b = lm_page.verdicts(models)
    assert three_a.startswith("* 3A, swiglu for relu_sq: 0.1443 bits a byte fewer, in every seed")
    assert (
        three_b.startswith("* 3B, gelu for relu_sq: 0.0000 bits a byte") and "disagree" in three_b
    )
    _, rows = lm_page.cells(models)
    assert rows[1][-3:] == ["relu_sq", "-0.1443", "2 of 2 seeds"] and rows[2][-1] == "1 of 2 seeds"


def test_a_mixer_stands_against_attention_with_the_same_mlp():
    models = {m: [record(m, 0, loss)] for m, loss in (("gelu", 1.0), ("swiglu", 0.5),
              ("hyperglu+swiglu", 0.25), ("hyperglu+silu", 0.5))}  # fmt: skip
    _, rows = lm_page.cells(models)
    assert [row[-3] for row in rows] == ["", "gelu", "swiglu", "gelu"]


def test_what_differs_is_not_compared():
    records = [record("relu_sq", 0, 1.0), record("swiglu", 0, 1.0, hidden=256)]
    (_, fitted), (_, of_one_width) = lm_page.comparisons(records)
    assert list(fitted) == ["relu_sq"] and list(of_one_width) == ["swiglu"]


def test_weights_that_are_far_off_are_said():
    """SwiGLUMLP rounds its width up to a multiple of 64, which is much where dim is small."""
    page = lm_page.markdown([record("relu_sq", 0, 1.0, mlp_weights=2048)])
    assert "Every MLP has as nearly 2,048 weights as its widths allow.\n" in page
    page = lm_page.markdown([record("relu_sq", 0, 1.0, mlp_weights=2048), record("swiglu", 0, 1.0)])
    assert "as its widths allow; more than 1% off: swiglu +50.0%.\n" in page


def test_kept_page_and_plots_are_generated():
    records = lm.read(KEPT)
    assert (KEPT / "table.md").read_text() == lm_page.markdown(records)
    for plot in (made := lm_page.plots(records)):
        assert plots.fault(plot, KEPT / f"{plot.name}.svg") is None
    assert not plots.stale(made, KEPT)


@pytest.mark.gpu
def test_a_gpu_learns_and_goes_on(tmp_path):
    run = Run(dataclasses.replace(TINY, mlp="switch-4", dtype="bfloat16"), TEXT, "cuda")
    run.go_on(over=lambda: True)
    run.save(tmp_path / "run.safetensors")
    again = Run.load(tmp_path / "run.safetensors", TEXT, "cuda")
    again.go_on()
    assert again.finished and again.curve[-1]["held_out"] < again.curve[0]["held_out"]
