"""Every family in transformers' table of experts, against its own class on tiny experts in which
each clamp bites: forward and every gradient."""

import pytest
from families_build import every, experts
from families_compare import judged
from families_scan import OUTSIDE, families

from fusedmlp.patching import experts_forward

# Families whose experts are something else than the kernels compute, and what is said of them.
REFUSED = {
    "muse_spark": "has_post_expert_norm",
    **dict.fromkeys(
        ("beam", "deepseek_v4", "glm5_next", "hy_v4", "hy_v4_vl", "inkling2", "inkling2_loop",
         "minimax_m3_vl", "openai_privacy_filter"), "a gate of its own",
    ),
    "gpt_oss": "is_concatenated",
}  # fmt: skip
KNOWN = [(family, name) for family, name in every() if family not in OUTSIDE]


def test_every_file_that_names_the_table_has_experts_that_are_seen():
    assert len(families()) > 60 and all(families().values())


@pytest.mark.parametrize("family, name", KNOWN)
def test_experts_of_the_table_are_their_own_class(family, name):
    module = experts(family, name)
    run = lambda *args: experts_forward(module, *args)  # noqa: E731
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            judged(module, run)
        return
    wrong = {what: error for what, error in judged(module, run).items() if not error.passed}
    assert not wrong
