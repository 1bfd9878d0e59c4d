"""`fusedmlp bench cpu`: targets with yes or no, and the page beside its ledger."""

import json

import pytest

from fusedmlp.bench import cli
from fusedmlp.bench.cpu import clock, command, growth, targets


def test_a_ratio_is_the_median_of_its_rounds_with_their_middle_half():
    made = clock.ratio([1.0, 2, 3, 4, 50], [1.0, 1, 1, 1, 1])
    assert (made.middle, made.low, made.high) == (3, 2, 4)


def test_calls_take_turns(monkeypatch):
    monkeypatch.setattr(clock, "SHORTEST", 0)
    order = []
    found = clock.turns({n: lambda n=n: order.append(n) for n in "abc"}, rounds=3)
    # The first of each is not timed, and every other round goes the other way.
    assert order[-18:] == [*"aabbcc", *"ccbbaa", *"aabbcc"]
    assert {len(times) for times in found.values()} == {3}


def test_the_first_call_of_a_turn_is_not_timed(monkeypatch):
    took = []
    monkeypatch.setattr(clock.time, "process_time", lambda: sum(took))
    assert clock._turn(lambda: took.append(1 if took else 9), 2) == 1


def test_names_of_targets_differ():
    names = [target.name for target in targets.targets()]
    assert len(set(names)) == len(names) > 40


def test_what_is_kept_is_within_its_targets(tmp_path, capsys):
    folder = tmp_path / "a new" / "one"
    assert cli.main(["cpu", "--only", "keeps", "--rounds", "1", "--write", str(folder)]) == 0
    assert capsys.readouterr().out.count("yes") == 3
    records = json.loads((folder / "results.json").read_text())["records"]
    assert [r["met"] for r in records] == 3 * [True]
    assert records[0]["name"] in (folder / "table.md").read_text()


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(targets, "targets", lambda: pytest.fail("it measures"))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(SystemExit):
            cli.main(["cpu", "--write", str(folder)])
        assert "must be a folder that can be written; got" in capsys.readouterr().err


def test_a_missed_target_is_an_error(monkeypatch, capsys):
    slow = targets.Target("slow", 1, lambda rounds: (2.5, "2 to 3"))
    monkeypatch.setattr(targets, "targets", lambda: [slow])
    assert cli.main(["cpu"]) == 1
    assert capsys.readouterr().out.split()[-1] == "no"


def test_unknown_words_are_refused(capsys):
    assert cli.main(["cpu", "--only", "nothing", "here"]) == 2
    assert "no target has these words" in capsys.readouterr().err


@pytest.mark.parametrize("sweep", growth.sweeps()[2:4], ids=lambda s: s.name)
def test_growth_has_a_record_for_each_point(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "SHORTEST", 0)
    small = growth.Sweep(
        sweep.name, sweep.axis, sweep.points[:2], lambda n: {"ours": sweep.make(n)["ours"]}
    )
    records = [{"kind": "growth", "commit": None, **r} for r in growth.measure(1, [small])]
    assert [r["point"] for r in records] == list(small.points)
    assert all(r["us"] > 0 and r["peak_bytes"] > 0 for r in records)
    growth.plot(records, tmp_path / "growth.svg")
    assert sweep.name in command.markdown({"cpu": "x", "torch": "2", "fusedmlp": "0"}, records)
    assert (tmp_path / "growth.svg").stat().st_size > 1000
