"""`check`: its records, its verdict, what it says when a kernel is wrong or raises."""

import argparse
import json

import pytest
import torch

import fusedmlp
from fusedmlp.bench import check, cli, glance
from fusedmlp.bench.report.ledger import check_record
from fusedmlp.bench.work import Work
from fusedmlp.testing import CASES

SMALL = ((8, 16, 24),)


def run(**changes):
    records = []
    options = check.CheckOptions(**{"cases": ("gated_act",), "shapes": SMALL, **changes})
    return check.run(options, records.append), records


def test_a_record_has_what_the_ledger_wants():
    passed, (record,) = run(dtypes=("float32",))
    assert passed
    check_record(json.loads(json.dumps(record)), "record")
    assert record["case"] == record["op"] == "gated_act"
    assert (record["M"], record["D"], record["H"]) == SMALL[0]
    assert set(record["tensors"]) == {"out", "dg", "du"}
    assert set(record["tensors"]["out"]) == {
        "max", "rms", "relative_l2", "eager_max", "eager_rms", "rounding_max", "rounding_rms",
        "max_bound", "rms_bound", "worst", "passed",
    }  # fmt: skip


def test_the_backend_is_said(device):
    _, (kernels,) = run()
    assert kernels["backend"] == ("triton (interpreter)" if device == "cpu" else "triton")
    _, (reference,) = run(backend="reference")
    assert reference["backend"] == "reference"


def test_the_reference_is_eager_itself():
    passed, (record,) = run(backend="reference", dtypes=("bfloat16",))
    assert passed
    tensors = record["tensors"].values()
    assert all(t["max"] == t["eager_max"] for t in tensors)


def test_forward_only_has_no_gradients():
    _, (record,) = run(backward=False)
    assert set(record["tensors"]) == {"out"}


@pytest.fixture
def wrong_kernel(monkeypatch):
    """Every result off by 1%."""
    run_case = lambda self, t, **options: 1.01 * self.run_reference(t, **options)  # noqa: E731
    monkeypatch.setattr(type(CASES["gated_act"]), "run", run_case)


def test_a_wrong_kernel_fails(wrong_kernel, capsys):
    passed, records = run(dtypes=("float32",))
    assert not passed
    check.show(records)
    text = capsys.readouterr().out
    assert "FAIL" in text
    assert "1 checked, 1 failed" in text


def test_a_kernel_that_raises_fails_and_the_next_is_still_checked(monkeypatch, capsys):
    def run_case(self, inputs, **options):
        if self.name == "gated_act":
            raise RuntimeError("no such tile")
        return self.run_reference(inputs, **options)

    monkeypatch.setattr(type(CASES["gated_act"]), "run", run_case)
    passed, records = run(cases=("gated_act", "linear_act"))
    assert not passed
    assert [r["passed"] for r in records] == [False, True]
    assert records[0]["error"] == "RuntimeError: no such tile"
    assert records[0]["tensors"] == {}
    check_record(records[0], "record")
    check.show(records)
    assert "no such tile" in capsys.readouterr().out


def test_nan_is_an_infinite_error(monkeypatch):
    def run_case(self, inputs, **options):
        return self.run_reference(inputs, **options) * float("nan")

    monkeypatch.setattr(type(CASES["gated_act"]), "run", run_case)
    passed, (record,) = run(backward=False)
    assert not passed
    assert record["tensors"]["out"]["max"] == float("inf")
    check_record(record, "record")
    check.show([record])


def test_defaults_visit_every_dtype_and_case():
    works = check.plan(check.CheckOptions())
    assert {w.case.name for w in works} == set(CASES)
    assert {w.dtype for w in works} == {"bfloat16", "float16", "float32"}


def test_dtypes_make_the_full_product():
    works = check.plan(check.CheckOptions(cases=("mlp",), dtypes=("float16", "float32")))
    sizes = {(w.M, w.D, w.H) for w in works}
    assert len(works) == 2 * len(sizes) > 2


def test_activations_and_shapes_are_taken():
    options = check.CheckOptions(cases=("mlp",), activations=("relu", "tanh"), shapes=SMALL)
    assert [(w.activation, w.size) for w in check.plan(options)] == [
        ("relu", "8x16x24"), ("tanh", "8x16x24"),
    ]  # fmt: skip


def test_who_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check.choice, "INTERPRETED", False)
    assert check.needs_interpreter("auto")
    assert check.needs_interpreter("triton")
    assert not check.needs_interpreter("reference")
    with fusedmlp.backend("reference"):
        assert not check.needs_interpreter("auto")
    monkeypatch.setattr(check.choice, "INTERPRETED", True)
    assert not check.needs_interpreter("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check.choice, "INTERPRETED", False)
    assert not check.needs_interpreter("auto")


def test_the_child_gets_the_very_options():
    options = check.CheckOptions(
        cases=("mlp", "gated_act"), dtypes=("float16",), activations=("tanh",), shapes=SMALL,
        backward=False,
    )  # fmt: skip
    args = cli.parser().parse_args(list(check._arguments(options)))
    assert check.options_of(args) == check.CheckOptions(**{**vars(options), "backend": "triton"})


def test_the_interpreter_runs_in_a_child_that_reports_as_it_goes():
    records = []
    options = check.CheckOptions(cases=("gated_act",), dtypes=("float32",), shapes=((3, 4, 5),))
    assert check.run_interpreted(options, records.append)
    assert [r["backend"] for r in records] == ["triton (interpreter)"]


def test_a_child_that_dies_is_an_error_with_its_output(monkeypatch):
    monkeypatch.setattr(check, "_arguments", lambda options: iter(["check", "--no-such-flag"]))
    with pytest.raises(check.Refusal, match="no-such-flag"):
        check.run_interpreted(check.CheckOptions(cases=("gated_act",)), lambda record: None)


def test_worst_tensor_is_the_one_nearest_its_bound():
    near = {"max": 0.9, "max_bound": 1.0, "rms": 0.0, "rms_bound": 0.0}
    past = {"max": 0.1, "max_bound": 1.0, "rms": 2.0, "rms_bound": 1.0}
    assert glance.strain(near) == 0.9
    assert glance.strain(past) == 2.0
    assert glance.strain({**near, "max": 1e-9, "max_bound": 0.0}) == 1.0


def test_ops_and_cases_add_up():
    args = cli.parser().parse_args(["check", "--op", "mlp", "--case", "gated_act", "mlp"])
    of_mlp = [name for name, case in CASES.items() if case.op == "mlp"]
    assert check.options_of(args).cases == ("gated_act", *of_mlp) and of_mlp[0] == "mlp"


def test_exit_code_says_whether_all_passed(monkeypatch, tmp_path, capsys):
    file = tmp_path / "errors.json"
    argv = ["check", "--case", "gated_act", "--shape", "3x4x5", "--backend", "reference"]
    assert cli.main([*argv, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["schema"] == 1
    assert written["machine"]["torch"] == torch.__version__
    assert [r["kind"] for r in written["records"]] == ["check"]
    assert "says nothing of the kernels" in capsys.readouterr().out
    monkeypatch.setattr(
        check, "check_one",
        lambda work, backward: {**Work.identity(work), "kind": "check", "tensors": {},
                                "backend": "x", "device": "cpu", "passed": False},
    )  # fmt: skip
    assert cli.main(argv) == 1


def test_a_models_widths_are_too_large_for_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["check", "--model", "llama3-8b"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["8x16", "8x16x0", "8,16,24", "axbxc"])
def test_a_bad_shape_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["check", "--shape", text])
    assert "must be MxDxH" in capsys.readouterr().err
    assert isinstance(cli.parser(), argparse.ArgumentParser)
