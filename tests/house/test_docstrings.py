"""Docstrings of public names: each has an example, and every example runs and prints what it
says."""

import doctest
import inspect

import pytest
import torch

import fusedmlp
import fusedmlp.distributed

PUBLIC = {name: getattr(fusedmlp, name) for name in fusedmlp.__all__}
# torch.nn's own are documented there.
OURS = {name: v for name, v in PUBLIC.items() if not v.__module__.startswith("torch.")}
DISTRIBUTED = {n: getattr(fusedmlp.distributed, n) for n in fusedmlp.distributed.__all__}
WITH_EXAMPLE = {n: v for n, v in {**OURS, **DISTRIBUTED}.items() if ">>>" in v.__doc__}
FUNCTIONS = [name for name, value in OURS.items() if inspect.isfunction(value)]


def examples_of(name, value):
    # Nothing is given: an example imports what it uses.
    return doctest.DocTestParser().get_doctest(value.__doc__, {}, name, None, None)


@pytest.mark.parametrize("name", OURS)
def test_public_name_has_an_example(name):
    assert "\nExamples:\n" in inspect.getdoc(OURS[name]), f"fusedmlp.{name} has no Examples:"
    assert examples_of(name, OURS[name]).examples, f"fusedmlp.{name} has no example"


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_example_prints_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    torch.manual_seed(0)
    found = []
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    runner.run(examples_of(name, WITH_EXAMPLE[name]), out=found.append)
    assert runner.failures == 0, "".join(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_says_what_is_raised(name):
    if name not in ("backend", "explain"):
        assert "Raises" in OURS[name].__doc__ or "Arguments and errors as" in OURS[name].__doc__


def test_a_wrong_example_is_found():
    def wrong():
        """
        >>> 1 + 1
        3
        """

    runner = doctest.DocTestRunner()
    runner.run(examples_of("wrong", wrong), out=lambda text: None)
    assert runner.failures == 1
