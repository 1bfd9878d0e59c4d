"""docs/models.md: what runs of each family in transformers' table of experts, and why not the rest.

python tests/families            writes it
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import transformers
from families_build import D, E, H, every, experts, router
from families_compare import judged, relative
from families_scan import OUTSIDE, router_classes

from fusedmlp.patching import experts_forward
from fusedmlp.patching.form import Form, form_of
from fusedmlp.patching.route import route_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """\
# Experts of transformers, family by family

`make families` wrote this page with transformers {version}. Each row is a class of experts in
transformers' table (`use_experts_implementation`) or, marked \\*, one that is alike outside it. It
was built from its own configuration with {E} experts of width {D} and hidden width {H}, limits at
which each clamp bites, and run as `moe_mlp` beside its own loop over experts, in float32 on a CPU.
The error is the largest of the result's and of every gradient's, as a part of the norm of what it
was compared with in float64.

`model.set_experts_implementation("fusedmlp")` and [`patch(model)`](patch.md) run the experts; those
outside the table run by `patch(model)` alone. [Gates](gates.md) are told by their values and named
with the numbers of the family's default configuration; `gate_up` and `interleaved` say how gate and
up lie in one weight.

The router is what `patch(model)` makes of the one beside the experts: arguments of `topk_route`, or
its own code where `topk_route` has none for it.

| family | experts | gate | weights | router | error |
|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    family: str
    experts: str
    gate: str
    weights: str
    router: str
    error: str = ""

    def line(self) -> str:
        return f"| {' | '.join(self)} |"


def rows(errors: bool) -> Iterator[Row]:
    """Those of the installed release; the errors, which take most of the time, where asked for."""
    for family, name in every():
        form = form_of(experts(family, name, own_gate=True))
        mark = " \\*" if family in OUTSIDE else ""
        if isinstance(form, str):
            yield Row(family, name + mark, f"refused: {form.partition(': ')[2] or form}", "", "")
            continue
        error = _error(family, name) if errors else ""
        yield Row(
            family, name + mark, f"`{form.activation}`", _weights(form), _router(family), error
        )


def _error(family: str, name: str) -> str:
    module = experts(family, name)
    return f"{relative(judged(module, lambda *args: experts_forward(module, *args))):.0e}"


def _weights(form: Form) -> str:
    words = [form.packed or "without up"]
    words += ["transposed"] * form.transposed + ["biases"] * form.bias
    return ", ".join(words)


def _router(family: str) -> str:
    """Each of the family's routers once."""
    found = dict.fromkeys(_route(family, name) for name in router_classes(family))
    return "; ".join(found) or "its own"


def _route(family: str, name: str) -> str:
    try:
        route = route_of(router(family, name))
    except AssertionError:  # it takes more than a configuration
        return "its own"
    if isinstance(route, str):
        return f"its own: {route.partition(':')[0]}"
    options = dict(route.options)
    words = [options.pop("score", "softmax")]
    words += ["not renormalised"] if options.pop("norm", True) is False else []
    words += ["a correction"] * (route.added is not None)
    words += [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
              for key, value in options.items()]  # fmt: skip
    return ", ".join(words)


def page(errors: bool = True) -> str:
    head = HEAD.format(version=transformers.__version__, D=D, H=H, E=E)
    return head + "".join(f"{row.line()}\n" for row in rows(errors))


def written() -> list[Row]:
    """The rows of the page."""
    lines = PAGE.read_text().partition("|---|")[2].splitlines()[1:]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]
