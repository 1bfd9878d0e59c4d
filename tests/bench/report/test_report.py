"""The report: what it says comes from the ledgers, and what was typed by hand is found."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from fusedmlp.bench.report import (
    command as report,
    ledger as book,
    plots,
    tables,
    targets,
)
from fusedmlp.bench.report.command import BEGIN, END, Places
from fusedmlp.testing import CASES

SAMPLE = Path(__file__).parents[2] / "data" / "synthetic.json"
OPS = list(dict.fromkeys(case.op for case in CASES.values()))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Places:
    """A report of the sample ledger, written once; tests that change it take a copy."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("report")
    (root / "results").mkdir()
    shutil.copy(SAMPLE, root / "results" / "synthetic.json")
    (root / "README.md").write_text(f"# before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    places = Places(root / "results", root / "RESULTS.md", root / "README.md", made_up=True)
    report.write(places)
    return places


@pytest.fixture
def mine(written, tmp_path) -> Places:
    root = tmp_path / "copy"
    shutil.copytree(written.markdown.parent, root)
    return Places(root / "results", root / "RESULTS.md", root / "README.md", made_up=True)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_results_in_this_repository_are_generated():
    found = report.differences(Places())
    assert not found, "run `python -m fusedmlp.bench report`\n" + "\n".join(found)


def test_no_made_up_number_is_published(tmp_path):
    assert book.load(SAMPLE).gpu == book.MADE_UP
    shutil.copy(SAMPLE, tmp_path / "synthetic.json")
    with pytest.raises(book.LedgerError, match="expected a real GPU, got 'Synthetic'"):
        book.collect(tmp_path)


def test_a_report_just_written_is_up_to_date(mine):
    assert report.differences(mine) == []


def test_an_edited_number_is_found(mine):
    edit(mine.markdown, "6.393", "5.393")
    (found,) = report.differences(mine)
    assert "RESULTS.md differs" in found
    assert "5.393" in found


def test_an_edited_readme_is_found_and_the_rest_of_it_is_left_alone(mine):
    edit(mine.readme, "87.7%", "97.7%")
    (found,) = report.differences(mine)
    assert "README.md differs" in found
    edit(mine.readme, "97.7%", "87.7%")
    edit(mine.readme, "# before", "# new words")
    assert report.differences(mine) == []
    assert mine.readme.read_text().endswith("\n\nafter\n")


def test_a_readme_without_markers_is_an_error(mine):
    mine.readme.write_text("# no markers\n")
    with pytest.raises(ValueError, match="README.md: expected the lines <!-- results:begin -->"):
        report.render(mine)


def test_an_edited_or_missing_or_left_over_plot_is_found(mine):
    first, second, *_ = sorted(mine.plots.glob("*.svg"))
    edit(first, "<g", "<g ")
    second.unlink()
    (mine.plots / "old-gpu.svg").write_text("<svg/>")
    found = "\n".join(report.differences(mine))
    assert f"{first.name} shows other numbers, or was edited" in found
    assert f"{second.name} is missing" in found
    assert "old-gpu.svg belongs to no ledger" in found
    report.write(mine)
    assert report.differences(mine) == []


def test_a_new_number_makes_text_and_plots_stale(mine):
    path = mine.results / "synthetic.json"
    ledger = book.load(path)
    for record in ledger.of_kind("time"):
        if record["provider"] == "fusedmlp" and record["case"] == "gated_act":
            record["of_copy"] = 0.5
    path.write_text(ledger.text())
    found = "\n".join(report.differences(mine))
    assert "RESULTS.md differs" in found
    assert "gated_act-forward-synthetic.svg shows other numbers" in found
    assert "gated_linear-forward-synthetic.svg" not in found


def test_plots_are_the_same_for_the_same_numbers(written):
    (plot, *_) = plots.plots_of(book.collect(written.results, made_up=True), OPS)
    assert plots.svg(plot) == (written.plots / f"{plot.name}.svg").read_text()
    # No text of a plot depends on when or with what it was drawn.
    assert not re.search(r"<dc:date>|Matplotlib v", plots.svg(plot))


def test_every_number_of_a_table_stands_in_the_ledger(written):
    """The cells of the table of times against the records, from the text alone."""
    sample = book.load(SAMPLE)
    text = written.markdown.read_text()
    ours = [r for r in sample.of_kind("time") if r["provider"] == "fusedmlp"]
    rows = [line for line in text.splitlines() if "| fusedmlp |" in line]
    assert len(rows) == len(ours)
    for record, row in zip(sorted(ours, key=lambda r: r["op"]), rows, strict=True):
        assert f"{record['M']} x {record['D']} x {record['H']}" in row
        assert f"| {record['median_ms']:.4g} (" in row


def test_every_table_says_where_it_comes_from(written):
    text = written.markdown.read_text()
    source = tables.provenance(book.load(written.results / "synthetic.json"))
    for fact in ("Synthetic", "2000-01-01", "commit 0000", "torch 0.0", "SM clock 1 of 2 MHz"):
        assert fact in source
    for section in text.split("\n## ")[1:]:
        title = section.splitlines()[0]
        if title in ("State", "Targets"):  # a column of each row says it
            assert "2000-01-01" in section
        elif title != "Rooflines":  # a picture says it in its title
            tables_in_it = len(re.findall(r"^\| ---", section, re.MULTILINE))
            assert section.count(source) >= max(1, tables_in_it)


def test_failures_are_shown(written):
    text = written.markdown.read_text()
    assert "| `gated_linear` | Synthetic | triton | 3: 1 FAILED |" in text
    assert "FAILED: gated_linear-bias silu bfloat16 509 x 1021 x 1531: dx" in text
    assert "not timed: quack, 12 of its sizes and phases: does not serve gated_act" in text
    assert "time:mlp killed" in text


def test_ops_without_a_device_record_are_listed_by_name(written):
    measured = {"gated_act", "gated_linear"}
    missing = ", ".join(f"`{op}`" for op in OPS if op not in measured)
    line = f"Without a device record: {missing}."
    assert line in written.markdown.read_text()
    assert line in written.readme.read_text()


def test_a_check_on_the_cpu_or_of_the_reference_is_no_device_record():
    (check, *_) = book.load(SAMPLE).of_kind("check")
    assert tables.on_device(check)
    assert not tables.on_device({**check, "device": "cpu"})
    assert not tables.on_device({**check, "backend": "reference"})
    assert not tables.on_device({**check, "backend": "triton (interpreter)"})


def test_without_ledgers_it_says_that_nothing_was_measured(tmp_path):
    places = Places(tmp_path / "results", tmp_path / "RESULTS.md", tmp_path / "README.md")
    report.write(places)
    text = places.markdown.read_text()
    assert tables.NOTHING in text
    assert all(f"`{op}`" in text for op in OPS)
    assert "| met |" not in text
    assert "| missed |" not in text
    assert not places.readme.exists()


def test_the_newest_ledger_of_a_gpu_wins():
    old, new = book.load(SAMPLE), book.load(SAMPLE)
    new.date = "2000-01-02"
    ((ledger, records),) = tables.newest([old, new], "gated_act", "time")
    assert ledger is new
    new.records = [r for r in new.records if r.get("op") != "gated_act"]
    ((ledger, records),) = tables.newest([old, new], "gated_act", "time")
    assert ledger is old
    assert {r["op"] for r in records} == {"gated_act"}


def record(provider: str, ms: float, **fields) -> dict:
    base = next(
        r for r in book.load(SAMPLE).of_kind("time")
        if (r["op"], r["M"], r["provider"]) == ("gated_linear", 4096, "fusedmlp")
    )  # fmt: skip
    return {**base, "provider": provider, "median_ms": ms, **fields}


def target(**fields) -> targets.Target:
    return targets.Target("gated_linear", "text", 1.0, **fields)


def test_a_target_is_judged_by_its_worst_size():
    over = target(over=("quack", "liger"), where=lambda r: r["M"] >= 4096)
    good = [record("fusedmlp", 1.0), record("quack", 1.1), record("liger", 2.0)]
    worse = [record("fusedmlp", 1.0, M=8192), record("quack", 0.9, M=8192)]
    other = [record("fusedmlp", 1.0, M=16), record("quack", 0.1, M=16)]
    found = targets.measure(over, [*good, *other])
    assert (found.value, found.sizes) == (1.1, 1)
    assert targets.verdict(over, found) == "met"
    found = targets.measure(over, [*good, *worse, *other])
    assert (found.value, found.sizes, found.record["M"]) == (0.9, 2, 8192)
    assert targets.verdict(over, found) == "missed"


def test_a_target_without_its_numbers_is_not_measured():
    share = target(share="of_cublas")
    assert targets.measure(share, [record("fusedmlp", 1.0, of_cublas=None)]) is None
    assert targets.measure(share, [record("fusedmlp", 1.0, dtype="float16")]) is None
    assert targets.measure(share, [record("quack", 1.0)]) is None
    assert targets.measure(share, [record("fusedmlp", 1.0, skipped="failed")]) is None
    assert targets.measure(target(over=("quack",)), [record("fusedmlp", 1.0)]) is None
    assert targets.verdict(share, None) == "not measured"
    assert "no record can tell" in targets.verdict(target(), None)


def test_targets_name_known_baselines_and_fields():
    from fusedmlp.bench.rivals import RIVALS

    fields = json.loads(SAMPLE.read_text())["records"]
    times = next(r for r in fields if r["kind"] == "time")
    for t in targets.TARGETS:
        assert not t.share or t.share in times
        assert set(t.over) <= set(RIVALS)


def test_the_sample_is_unmistakably_made_up():
    sample = json.loads(SAMPLE.read_text())
    assert sample["machine"]["gpu"] == "Synthetic"
    assert set(sample["commit"]) == {"0"}
    assert {r["device"] for r in sample["records"] if r["kind"] == "check"} == {"Synthetic"}


def test_no_module_of_the_report_holds_a_measured_number():
    """Numbers in prose would not be generated: only the target table may name speeds."""
    for module in (report, tables, plots):
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"\d (TFLOP/s|GB/s|ms)\b", node.value), node.value


def test_report_says_in_json_what_is_out_of_date(tmp_path, capsys):
    from fusedmlp.bench import cli

    file = tmp_path / "report.json"
    assert cli.main(["report", "--check", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == {"out_of_date": []}
