"""Every family in transformers' table of experts, against its own class on tiny experts in which
each clamp bites: forward and every gradient."""

import families_compare
import pytest
import torch
from families_build import every, experts
from families_models import WHOLE, model, results
from families_scan import families
from torch import nn

import fusedmlp
from fusedmlp.patching import experts_forward
from fusedmlp.patching.form import is_experts
from fusedmlp.patching.gate import InFloat64
from fusedmlp.patching.swap import Patched

# Families whose experts are something else than the kernels compute, and what is said of them.
REFUSED = {"muse_spark": "MuseSparkExperts has a norm after each expert, which no kernel has"}


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
