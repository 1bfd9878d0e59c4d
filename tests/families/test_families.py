"""Every family in transformers' table of experts, against its own class on tiny experts in which
each clamp bites: forward and every gradient."""

import families_compare
import families_table
import pytest
import torch
import transformers
from compiled import in_compiler
from families_build import every, experts, inputs
from families_compiled import COMPILED, compiled
from families_models import WHOLE, model, results
from families_scan import families
from torch import nn

import fusedmlp
from fusedmlp.patching import experts_forward
from fusedmlp.patching.form import form_of, is_experts
from fusedmlp.patching.gate import InFloat64
from fusedmlp.patching.swap import Patched
from fusedmlp.reference.activations import resolve

# Families whose experts are something else than the kernels compute, and what is said of them.
REFUSED = {"muse_spark": "MuseSparkExperts has a norm after each expert, which no kernel has"}


@pytest.fixture(scope="module")
def rows():
    return list(families_table.rows(errors=False))


def test_the_page_says_what_runs(rows):
    """Without the errors, which `make families` writes. A release with other families than the
    page's has the same rows for those that both have."""
    said = {(row.family, row.experts): row._replace(error="") for row in families_table.written()}
    now = {(row.family, row.experts): row for row in rows}
    same_release = transformers.__version__ in families_table.PAGE.read_text()
    assert said.keys() == now.keys() or not same_release
    both = said.keys() & now.keys()
    assert len(both) > 60 and all(said[key] == now[key] for key in both), "run: make families"


def test_every_file_that_names_the_table_has_experts_that_are_seen():
    assert len(families()) > 60 and all(families().values())


@pytest.mark.parametrize("family, name", every())
def test_experts_are_their_own_class(family, name):
    """By transformers' table and by patch()."""
    module = experts(family, name)
    by_table = lambda *args: experts_forward(module, *args)  # noqa: E731
    block = nn.ModuleDict({"experts": module})
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            families_compare.judged(module, by_table)
        (left,) = fusedmlp.patch(block).left
        assert left.detail == REFUSED[family]
        return
    if resolve(gate := form_of(module).activation).scalars:
        # Another number would show: clamps bite.
        other, arguments = experts(family, name, own_gate=True), inputs(torch.float32)
        assert form_of(other).activation != gate
        mine, its = by_table(*arguments), experts_forward(other, *arguments)
        assert not torch.allclose(mine, its, rtol=0.1)
    errors = families_compare.judged(module, by_table)
    assert not {what: error for what, error in errors.items() if not error.passed}
    ours = families_compare.results(module, by_table, torch.float32)
    with fusedmlp.patched(block):
        assert isinstance(module, Patched)
        patched = families_compare.results(module, module, torch.float32)
    assert all(torch.equal(patched[what], ours[what]) for what in ours)


@pytest.mark.parametrize("family", WHOLE)
def test_a_patched_model_computes_what_it_computed(family):
    """In float64, so that nothing but another formula could differ."""
    whole = model(family)
    with InFloat64():
        own = results(whole)
        with fusedmlp.patched(whole, dtype_check=False):
            kinds = {type(m).__name__: m for m in whole.modules() if is_experts(m)}
            assert kinds and all(isinstance(m, Patched) for m in kinds.values())
            ours = results(whole)
    assert own.keys() == ours.keys()
    for name in own:
        torch.testing.assert_close(ours[name], own[name], rtol=1e-8, atol=1e-9)


ARCHES = ("sm_80", "sm_90", "sm_100")
HERE = {("gpt_oss", "sm_90"), ("deepseek_v4", "sm_80"), ("inkling2", "sm_100")}  # by default


@pytest.mark.parametrize(
    "family, name, arch",
    [
        (family, name, arch) if (family, arch) in HERE
        else pytest.param(family, name, arch, marks=pytest.mark.slow)
        for family, name in COMPILED for arch in ARCHES
    ],
)  # fmt: skip
def test_what_the_compiler_emits_is_their_own_class(family, name, arch):
    errors, kernels = in_compiler(compiled, family, name, arch)
    assert not {what: error for what, error in errors.items() if not error.passed}
    assert {"moe_mlp._up_kernel", "moe_mlp._combine_kernel", "backward._dh_kernel"} <= {*kernels}
