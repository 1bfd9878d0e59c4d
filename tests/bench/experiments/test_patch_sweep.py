"""The page of model types: what it says is so, and a command that was interrupted goes on."""

import re

import pytest
import transformers

from fusedmlp.bench import cli
from fusedmlp.bench.experiments import patch_sweep

# Fused, left, without an MLP.
TYPES = ("llama", "squeezebert", "univnet")
COUNTS = re.compile(
    r"with transformers (\S+): (\d+) model types, (\d+) of them\s+with a fused block, (\d+) without"
)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_sweep, "KEPT", tmp_path / "kept" / "rows.jsonl")


def printed(capsys, *arguments):
    assert cli.main(["patch-sweep", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def without_error(line):
    """What no processor rounds otherwise."""
    cells = line.split("|")
    return [*cells[:6], *cells[7:]]


def test_the_page_says_what_is_so(kept, capsys):
    page = patch_sweep.PAGE.read_text().splitlines()
    release = COUNTS.search(patch_sweep.PAGE.read_text())[1]
    found = printed(capsys, *TYPES)
    assert [line.split()[1] for line in found] == list(TYPES)
    assert "SqueezeBertModule: intermediate.conv1d is a" in found[1]
    assert "no projection was found that leads to another" in found[2]
    if release == transformers.__version__:
        said = [without_error(line) for line in page if line.startswith("| ")]
        assert all(without_error(line) in said for line in found), "run: make patch-sweep"


def test_no_type_is_passed_over_in_silence():
    """Their counts are those of the table."""
    text = patch_sweep.PAGE.read_text()
    _, every, fused, silent = COUNTS.search(text).groups()
    rows = [
        line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| [\w.-]+ \| \d", line)
    ]
    assert len(rows) == int(every) and int(silent) == 0
    assert int(fused) == sum(int(r[2]) + int(r[3]) > 0 for r in rows) >= 190
    for kind, lines, whole, partly, left, _, why in rows:
        assert int(lines) == int(whole) + int(partly) + int(left), kind
        assert bool(why.strip()) == (int(left) > 0 or int(lines) == 0), kind


def test_it_goes_on_where_it_was_interrupted(kept, capsys, monkeypatch):
    first = printed(capsys, "llama")
    monkeypatch.setattr(patch_sweep, "row", None)
    assert printed(capsys, "llama") == first
    monkeypatch.setattr(patch_sweep, "_digest", lambda: "other sources")
    monkeypatch.setattr(patch_sweep, "row", lambda kind, *_: patch_sweep.Row(kind, failed="again"))
    assert "again" in printed(capsys, "llama")[0]


def test_a_type_that_takes_too_long(kept, capsys, monkeypatch):
    def endless(*_):
        while True:
            pass

    monkeypatch.setattr(patch_sweep, "row", endless)
    (line,) = printed(capsys, "llama", "--seconds", "1")
    assert line.endswith("| not done in 1 s |")
