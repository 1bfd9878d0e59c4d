"""A default is a promise: who leaves an argument out gets tomorrow what they got today."""

import inspect
from pathlib import Path

import fusedmlp
from fusedmlp import distributed, testing

PROMISED = Path(__file__).with_name("defaults.txt")


def shown(value):
    """A class or function by its name, for its repr has an address."""
    return getattr(value, "__name__", None) or repr(value)


def callables(name, public):
    """A public name, and the methods of a class, by the names they are called by."""
    if not getattr(public, "__module__", "").startswith("fusedmlp") or not callable(public):
        return
    yield name, public
    if inspect.isclass(public):
        for method, function in sorted(vars(public).items()):
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function


def defaults():
    """A line for each that has some."""
    public = {name: getattr(fusedmlp, name) for name in fusedmlp.__all__}
    for room in (distributed, testing):
        stem = room.__name__.removeprefix("fusedmlp.")
        public |= {f"{stem}.{name}": getattr(room, name) for name in room.__all__}
    for name in sorted(public):
        for called, function in callables(name, public[name]):
            given = inspect.signature(function).parameters.values()
            pairs = [f"{p.name}={shown(p.default)}" for p in given if p.default is not p.empty]
            if pairs:
                yield f"{called}({', '.join(pairs)})"


def test_defaults_are_those_that_were_promised():
    promised, found = PROMISED.read_text().splitlines(), list(defaults())
    differences = "; ".join(sorted(set(found) ^ set(promised)))
    assert found == promised, (
        "defaults must be those of tests/house/defaults.txt, got others; write a new name there, "
        f"or a change, of which CHANGELOG.md tells users: {differences}"
    )
