"""The tool tells a fault that is killed from one that survives, and says so; its command line."""

import json
import shutil
import subprocess

import mutants_command as command
import mutants_draw as draw
import mutants_report as report
import pytest
from mutants_base import ROOT, Mutant, MutantError
from mutants_lists import FAULTS
from mutants_rooms import Row
from mutants_sound import Sound, fingerprint
from mutants_trial import Copy, Outcome, Trials

# ---- trials

TOY = "def least(a, b):\n    return a if a < b else b\n\n\ndef twice(n):\n    return 2 * n\n"
TESTS = (
    "from toy import least, twice\n\n\ndef test_toy():\n    assert least(1, 2) == 1\n    twice(1)\n"
)


@pytest.fixture
def toy(tmp_path):
    """A checkout whose test looks at one of two functions."""
    root = tmp_path / "toy"
    root.mkdir()
    (root / "toy.py").write_text(TOY)
    (root / "test_toy.py").write_text(TESTS)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def at(old, new):
    start = TOY.index(old)
    return Mutant("toy.py", start, start + len(old), new, "by hand")


def test_killed_survived_timed_out_and_restored(toy, tmp_path):
    copy, trials = Copy(toy, tmp_path / "copy"), Trials(Sound(tmp_path / "sound.json", ""))
    judge = lambda *fault: trials.judge(copy, "toy", at(*fault), ("test_toy.py",))  # noqa: E731
    killed = judge("a < b", "a > b")
    assert (killed.result, killed.by) == ("killed", "test_toy.py::test_toy")
    assert judge("2 * n", "2 + n").result == "survived"
    assert judge("least(a, b)", "least(a, b").result == "killed"  # a file that does not parse
    copy.seconds = 1
    for folder in (toy, copy.folder):
        assert (folder / "toy.py").read_text() == TOY


def test_tests_that_name_the_function_or_the_file_come_first(toy, tmp_path):
    assert at("2 * n", "").words(TOY) == ["twice", "toy"]
    names = ("other", "toy", "twice", "last")
    text = "".join(f"def test_{name}():\n    assert 0\n" for name in names)
    (toy / "test_names.py").write_text(text)
    copy, first = Copy(toy, tmp_path / "copy"), "test_names.py::test_"
    assert copy.run(["test_names.py"], ["twice", "last"]).failed == first + "twice"
    assert copy.run(["test_names.py"], ["nothing"]).failed == first + "other"
    both = ["test_toy.py", "test_names.py"]
    assert copy.run(both, ["names"]).failed == first + "other"
    copy.close()


def test_tests_that_fail_without_a_fault_are_an_error(toy, tmp_path):
    (toy / "test_toy.py").write_text("def test_toy():\n    assert 0\n")
    (toy / "test_none.py").write_text("")
    copy = Copy(toy, tmp_path / "copy")
    for name, got in (("test_toy.py", "test_toy.py::test_toy"), ("test_none.py", "nothing to run")):
        with pytest.raises(MutantError, match=f"{name}: must pass without a fault, got {got}"):
            Trials(Sound(tmp_path / "sound.json", "")).check(copy, name)


def test_what_has_passed_is_not_run_again_until_something_changes(toy, tmp_path):
    made = lambda: Sound(tmp_path / "kept" / "sound.json", fingerprint(toy))  # noqa: E731
    for test in ("test_toy.py", "test_toy.py::test_toy"):
        assert not made().passes(toy, test)
        made().note(toy, test)
        assert made().passes(toy, test)
        for file, text in (("test_toy.py", TESTS), ("toy.py", TOY)):
            (toy / file).write_text(text + "\n")
            assert not made().passes(toy, test), file
            (toy / file).write_text(text)
            assert made().passes(toy, test)


def test_a_copy_is_of_a_checkout_and_is_what_the_tests_see(toy, tmp_path):
    copy = Copy(toy, tmp_path / "copy")
    copy.check_package("toy")
    with pytest.raises(MutantError, match="pytest must be imported from the copy"):
        copy.check_package("pytest")
    shutil.rmtree(toy / ".git")
    with pytest.raises(MutantError, match="must be a git checkout"):
        Copy(toy, tmp_path / "other")


# ---- the command


def test_an_unknown_room_is_a_clear_error(capsys):
    assert command.main(["--room", "attic"]) == 2
    assert "--room must be of backends, bench, check, csrc, " in (said := capsys.readouterr().err)
    assert said.endswith(", got attic\n")


def test_an_unknown_operator_is_a_clear_error(capsys):
    assert command.main(["--room", "csrc", "--operator", "typo"]) == 2
    said = capsys.readouterr().err
    assert "--operator must be of and, or, arithmetic, comparison, " in said
    assert said.endswith("statement dropped, got typo\n")


def test_the_list_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(command, "Copy", None)
    arguments = ["--list", "--room", "weights", "--count", "2", "--seed", "5"]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "--seed 5" in shown and " by hand\n" in shown
    assert command.main([*arguments, "--no-hand"]) == 0
    assert "by hand" not in (drawn := capsys.readouterr().out)
    assert drawn.count("\n  + ") == 2


def test_a_run_from_end_to_end(toy, capsys, monkeypatch):
    row = Row("toy", ("toy.py",), ("test_toy.py",))
    mutants = [at("a < b", "a > b"), at("2 * n", "2 + n"), at("a < b", "a <= b")]
    for module in (command, draw):
        monkeypatch.setattr(module, "ROOT", toy)
    monkeypatch.setattr(command, "chosen", lambda given, seed: mutants)
    monkeypatch.setattr(draw, "row_of", lambda path: row)
    monkeypatch.setattr(draw, "reason", lambda mutant, text: "<=" in mutant.new)
    monkeypatch.setattr(Copy, "check_package", lambda self, name: None)
    assert command.main(["--jobs", "2", "--json", str(toy / "found.json")]) == 1
    shown = capsys.readouterr().out
    assert "killed by test_toy.py::test_toy" in shown
    assert "-    return 2 * n\n+    return 2 + n" in shown
    assert shown.split("\n")[-2].split() == ["all", *"10110", "50", "%"]
    assert '"survived": 1' in (toy / "found.json").read_text()


def test_a_file_without_a_fault_by_hand(capsys):
    assert "fusedmlp/packing.py" not in {fault.path for fault in FAULTS}
    one = command.chosen(command.parse(["--file", "fusedmlp/packing.py", "--count", "1"]), 0)
    assert [mutant.path for mutant in one] == ["fusedmlp/packing.py"]
    both = ["--file", "fusedmlp/packing.py", "fusedmlp/reference/moe.py", "--count", "0"]
    by_hand = command.chosen(command.parse(both), 0)
    assert {mutant.path for mutant in by_hand} == {"fusedmlp/reference/moe.py"}
    assert command.main(["--list", "--file", "fusedmlp/nothing.py"]) == 2
    assert "got fusedmlp/nothing.py" in capsys.readouterr().err


def test_survivors_are_found_again_and_a_line_that_is_gone_is_named(tmp_path, capsys):
    rows = draw.rows_of(["weights"])
    one, other = list(draw.drawn(rows, 2, 3))
    texts = {m.path: (ROOT / m.path).read_text() for m in (one, other)}
    outcomes = [Outcome("weights", one, "survived"), Outcome("weights", other, "killed")]
    found = report.record(outcomes, 3, texts)
    (file := tmp_path / "found.json").write_text(json.dumps(found))
    (mutant,) = command.chosen(command.parse(["--again", str(file)]), 0)
    assert mutant.lines(texts[mutant.path]) == one.lines(texts[one.path])
    found["mutants"][0]["before"] = "no such line"
    file.write_text(json.dumps(found))
    assert command.main(["--again", str(file)]) == 2
    assert "must hold the line of a survivor, which is gone; " in capsys.readouterr().err


def test_the_score_leaves_out_what_changes_nothing():
    results = ("killed", "timed out", "survived", "survived", "equivalent", "stillborn")
    outcomes = [Outcome("ops", at("a", "b"), result) for result in results]
    assert report.score(report.counts(outcomes)["ops"]) == 0.5
    assert report.table([Outcome("ops", at("a", "b"), "equivalent")]).endswith("-")
