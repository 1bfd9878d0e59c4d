"""The toy table: counts to the digit, labels that tell the truth, losses that were kept."""

import argparse
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedmlp.bench import cli
from fusedmlp.bench.experiments import table, toy, toy_rows
from fusedmlp.bench.experiments.toy_rows import EXTRA, PUBLISHED, Build, Row, count_text, rows
from fusedmlp.bench.options import Refusal

ROOT = Path(__file__).parents[3]
KEPT = ROOT / table.SOURCE


def ids(row):
    return f"{row.model}-{row.build.label()}"


@pytest.mark.parametrize("row", [row for row in rows() if row.params is not None], ids=ids)
def test_parameters_to_the_digit(row):
    assert row.build.count() == row.params
    assert sum(p.numel() for p in row.build.make().parameters()) == row.params
    if row.published is not None:
        assert count_text(row.params) == row.published.params


def test_published_rows():
    """As many of each layer as README has."""
    counted = {m: sum(row.model == m for row in PUBLISHED) for m in toy_rows.models()}
    assert counted == {
        "mlp": 10,
        "feedforward": 11,
        "fastfeedforward": 6,
        "pathweightedfff": 3,
        "ngpt": 2,
        "gmlp": 1,
        "switch_ffn": 2,
    }
    assert all(row.published and row.params for row in PUBLISHED)
    assert not any(row.published for row in EXTRA)
    assert rows(published_only=True) == [row for row in PUBLISHED if row.build.available()]


@pytest.mark.parametrize("row", {ids(row): row for row in rows()}.values(), ids=ids)
def test_a_row_runs(row):
    """One step forward and backward and one evaluation, in the row's own way."""
    made = toy.train(row.build, seed=0, steps=1, compiled=False, device="cpu")
    assert all(map(torch.isfinite, map(torch.tensor, (made.train_loss, made.eval_loss))))
    assert made.mean_loss == pytest.approx(0.0153 if row.model == "ngpt" else 0.553, rel=0.03)


def test_label_says_what_is_built():
    inner = Build("FeedForward", {"dim": 4, "mult": 2})
    build = Build("NGPT", {"dim": 4, "feedforward_net": inner, "scalar_alpha": True})
    assert build.label() == "feedforward_net=FeedForward(mult=2), scalar_alpha=True"
    assert Build("MLP", {"input_dim": 4, "act_fn": nn.SiLU}).label() == "act_fn=SiLU"
    assert build.make().feedforward_net.proj.out_features == 8


def test_rows_join_when_their_layer_is_there():
    assert Build("FeedForward", {"dim": 4}).available()
    assert not Build("NoSuchLayer", {"dim": 4}).available()
    assert not Build("FeedForward", {"dim": 4, "no_such_argument": 1}).available()
    assert not Build("FeedForward", {"dim": 4, "glu_variant": "no_such_gate"}).available()
    assert not Build("NGPT", {"dim": 4, "feedforward_net": Build("NoSuchLayer")}).available()


@pytest.mark.parametrize(
    "count, text", [(33_408, "33.41K"), (999, "999"), (1_234_567, "1.23M"), (63_375, "63.38K")]
)
def test_count_text(count, text):
    assert count_text(count) == text


def test_task():
    first, second = (
        toy.batch(torch.Generator().manual_seed(3), normalized, "cpu")
        for normalized in (False, True)
    )
    x, y = first
    assert x.shape == y.shape == (32, 64, 64)
    assert (y - x.sin() - 0.5 * (2 * x).cos()).std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(second[0], x)
    torch.testing.assert_close(second[1].norm(dim=-1), torch.ones(32, 64))


def test_training_learns_and_repeats():
    train = functools.partial(
        toy.train, Build("FeedForward", {"dim": 64}), steps=12, compiled=False, device="cpu"
    )
    once, again, other = train(seed=0), train(seed=0), train(seed=1)
    assert once.train_loss == again.train_loss and once.eval_loss == again.eval_loss
    assert other.train_loss != once.train_loss
    assert once.train_loss < train(seed=0, steps=1).train_loss


class Broken(nn.Module):
    def __init__(self, dim):
        super().__init__()
        raise RuntimeError(f"no layer of width {dim}\nand more")


class Switching(nn.Linear):
    """Counts what a layer with an auxiliary loss is asked for."""

    has_aux_loss = True

    def __init__(self, dim):
        super().__init__(dim, dim)

    def forward(self, x):
        return super().forward(x), torch.tensor(100.0)


@pytest.fixture
def short(monkeypatch):
    """Two quick rows and one that fails."""
    for kind in (Broken, Switching):
        monkeypatch.setattr(toy_rows.layers, kind.__name__, kind, raising=False)
    good = Build("FeedForward", {"dim": 64, "mult": 1})
    chosen = [
        Row("feedforward", good, None, toy_rows.Published("8.32K", 0.5, "a note of theirs")),
        Row("feedforward", Build("Broken", {"dim": 64})),
        Row("switch_ffn", Build("Switching", {"dim": 64}), note="a note"),
        Row("feedforward", good),
    ]
    monkeypatch.setattr(table, "rows", lambda published=False: chosen)


def test_command(short, capsys, tmp_path):
    kept, page = tmp_path / "table.json", tmp_path / "table.md"
    options = ["--steps", "2", "--seeds", "2", "--no-compile", "--device", "cpu"]
    written = ["--json", str(kept), "--markdown", str(page)]
    assert cli.main(["table", *options, *written]) == 1
    text = capsys.readouterr()
    assert "mlp_utils' Loss" not in text.out
    assert text.err.startswith("1 of 4 rows failed")
    found = json.loads(kept.read_text())
    good, broken, switch, again = found["records"]
    assert good["runs"] == again["runs"], "one configuration is trained once"
    assert [run["seed"] for run in good["runs"]] == [0, 1]
    assert good["params"] == 2 * 64 * 64 + 2 * 64 and broken["params"] is None
    assert broken["runs"] == [] and broken["failure"] == "RuntimeError: no layer of width 64"
    # In training with the auxiliary loss, in eval without.
    assert switch["runs"][0]["train_loss"] > 100 > switch["runs"][0]["eval_loss"]

    assert cli.main(["table", "--from", str(kept), "--compare"]) == 1
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith(("feedforward", "switch"))]
    assert "0.500000" in lines[0] and "a note of theirs" in lines[0]
    assert "FAIL" in lines[1] and "N/A" in lines[1] and "no layer of width 64" in lines[1]
    assert "Success" in lines[2] and "a note" in lines[2]
    assert page.read_text() == table.markdown(found, str(kept))
    assert "mlp_utils' Loss" in page.read_text()


def test_resume(short, capsys, tmp_path, monkeypatch):
    kept = tmp_path / "table.json"
    options = ["table", "--seeds", "1", "--no-compile", "--device", "cpu", "--json", str(kept)]
    options += ["--resume"]
    assert cli.main([*options, "--steps", "1", "--model", "switch_ffn"]) == 0
    first = json.loads(kept.read_text())["records"]
    assert [record["model"] for record in first] == ["switch_ffn"]

    trained = []
    train = toy.train
    monkeypatch.setattr(toy, "train", lambda build, *a: trained.append(build) or train(build, *a))
    assert cli.main([*options, "--steps", "1"]) == 1
    assert [build.layer for build in trained] == ["FeedForward", "Broken"]
    records = json.loads(kept.read_text())["records"]
    assert [record["model"] for record in records] == [
        "feedforward",
        "feedforward",
        "switch_ffn",
        "feedforward",
    ]
    assert records[2] == first[0]
    # What failed, and what was trained otherwise, is trained again.
    trained.clear()
    assert cli.main([*options, "--steps", "2"]) == 1
    assert [build.layer for build in trained] == ["FeedForward", "Broken", "Switching"]
    assert cli.main(["table", "--resume"]) == 2
    assert "--resume needs --json FILE" in capsys.readouterr().err


def test_refuses_other_files(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(Refusal, match="x.json"):
        table.read(str(path))
    path.write_text('{"records": [{"kind": "time"}]}')
    with pytest.raises(Refusal, match="expected a file that `table --json` wrote"):
        table.read(str(path))


def test_refuses_a_list(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"kind": "toy"}]')
    with pytest.raises(Refusal, match="expected a file that `table --json` wrote"):
        table.read(str(path))


@pytest.mark.parametrize("option", ("--json", "--markdown"))
def test_files_that_cannot_be_written_are_refused_first(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "train", lambda *a: pytest.fail("trained before the refusal"))
    for path in (tmp_path / "none" / "file", tmp_path):
        with pytest.raises(SystemExit) as end:
            cli.main(["table", "--device", "cpu", option, str(path)])
        assert end.value.code == 2
        assert f"{option}: must be a file that can be written" in capsys.readouterr().err


def test_worse_than_the_mean_is_said():
    record = table.record_of(
        PUBLISHED[0],
        [toy.ToyRun(0, 0.1, 0.6, 0.55, 1.0)],
        None,
        argparse.Namespace(compile=1, steps=1),
        "0123456789abcdef",
    )
    assert "worse in eval than predicting the mean (0.550)" in table.remarks(record, False)
    record["runs"][0]["eval_loss"] = 0.5
    assert table.remarks(record, False) == ""


def test_a_page_of_other_steps_says_so_and_compares_nothing(tmp_path):
    page = tmp_path / "page.md"
    argv = ["table", "--model", "mlp", "--published", "--steps", "2", "--seeds", "1"]
    argv += ["--no-compile", "--device", "cpu"]
    assert cli.main([*argv, "--markdown", str(page)]) == 0
    text = page.read_text()
    assert "The task of mlp_utils' README: 2 (its recipe has 501: only after as many" in text
    assert "501 steps" not in text
    assert "--from" not in text and "its records were not kept" in text
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    at = header.split(" | ").index("Difference")
    assert rows and all(row.split(" | ")[at] == "-" for row in rows)


@pytest.fixture(scope="module")
def kept():
    return table.read(str(KEPT))


def losses(kept, model, name, **labels):
    """Mean loss of each published row of a model that was kept, by a word in its configuration."""
    found = {}
    for key, word in labels.items():
        (record,) = [
            r
            for r in kept["records"]
            if r["model"] == model and word in r["configuration"].split(", ") and r["published"]
        ]
        found[key] = table.mean(record, name)
    return found


def test_kept_page_is_generated(kept):
    assert KEPT.with_suffix(".md").read_text() == table.markdown(kept, table.SOURCE)


def test_kept_rows_are_whole(kept):
    for record in kept["records"]:
        assert record["failure"] is None
        assert [run["seed"] for run in record["runs"]] == [0, 1, 2]
        if record["published"]:
            assert count_text(record["params"]) == record["published"]["params"]


@pytest.mark.parametrize("name", ("train_loss", "eval_loss"))
def test_kept_orderings_are_the_published_ones(kept, name):
    variants = {k: f"glu_variant={k}" for k in ("none", "glu", "swiglu", "geglu")}
    loss = losses(kept, "feedforward", name, **variants)
    assert loss["glu"] < loss["none"] < min(loss["swiglu"], loss["geglu"])
    assert loss["swiglu"] == pytest.approx(loss["geglu"], rel=0.05)
    ngpt = losses(kept, "ngpt", name, scalar="scalar_alpha=True", vector="scalar_alpha=False")
    assert ngpt["vector"] == pytest.approx(ngpt["scalar"], rel=0.05)


def test_kept_trees_beat_the_mean_only_if_hardened(kept):
    """Eval routes hard: without the hardening loss that fails, and the table says so."""
    for record in kept["records"]:
        if record["model"] == "fastfeedforward":
            hardened = "hardening_coef" in record["configuration"]
            worse = "worse in eval than predicting the mean" in table.remarks(record, False)
            assert worse is not hardened, record["configuration"]
