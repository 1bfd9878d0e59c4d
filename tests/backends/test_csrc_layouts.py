"""Arguments of the CUDA kernels in layouts at the boundary of what they take, amid NaN, one at a
time: exactly those that are documented are served, and right; the others are Unfit."""

import pytest
import simt_extension
import torch
from op_checks import placed

import fusedmlp
from fusedmlp.backends.cuda.loader import Unfit
from fusedmlp.testing import CASES, poison

# In 16 bits: bases 2, 4, 8 and 16 bytes off; rows 8, 16 and 24 bytes further apart than they need.
OFF = {f"{n} bytes off": {"offset": n // 2} for n in (2, 4, 8, 16)}
APART = {f"{n} bytes between rows": {"step": n // 2} for n in (8, 16, 24)}
LAYOUTS = {**OFF, **APART, "every other": {"inner": 2}}
SIXTEEN = {"16 bytes off", "16 bytes between rows"}
CONTIGUOUS = LAYOUTS.keys() - {"every other"}  # of a vector, which has no second row

# Case, size, and for each argument which layouts are served.
PORTABLE = [
    ("binary_linear-bias", (3, 128, 24), {"x": SIXTEEN, "b_weight": CONTIGUOUS}),
    ("binary_gated_linear-bias", (3, 128, 24),
     {"x": SIXTEEN, "b_gate": CONTIGUOUS, "b_up": CONTIGUOUS}),
    ("masked_gated_linear-2-bits", (3, 32, 24), {"x": SIXTEEN, "w": SIXTEEN}),
    ("top1_route", (5, 8, 40), {"logits": LAYOUTS.keys()}),
]  # fmt: skip
PAIRS = CONTIGUOUS - {"2 bytes off"}  # a bias is read two elements at a time
DENSE = [
    ("gated_linear-bias", (3, 16, 24), {"x": SIXTEEN, "w_gate": SIXTEEN, "w_up": SIXTEEN,
                                        "b_gate": PAIRS, "b_up": PAIRS}),
    ("linear_act-bias", (3, 16, 24), {"x": SIXTEEN, "w": SIXTEEN, "b": PAIRS}),
]  # fmt: skip
ROWS = [("sm_80", *row) for row in PORTABLE] + [
    (arch, *row) for arch in ("sm_90a", "sm_100a") for row in DENSE
]


def served(case, inputs, key, layouts, expected):
    """The layouts of one argument that are served, all of them right."""
    found = set()
    for how, t in layouts.items():
        try:
            out = case.run({**inputs, key: t})
        except Unfit:
            continue
        assert torch.equal(out, expected), (key, how)
        found.add(how)
    return found


@pytest.mark.parametrize("arch, name, size, taken", ROWS, ids=[f"{r[0]}-{r[1]}" for r in ROWS])
def test_layouts_are_read_right_or_refused(arch, name, size, taken, monkeypatch):
    case = CASES[name]
    inputs = {k: t.detach() for k, t in case.inputs(*size, torch.bfloat16).items()}
    with simt_extension.installed(monkeypatch, arch), fusedmlp.backend("cuda"), poison():
        expected = case.run(inputs)
        for key, wanted in taken.items():
            layouts = {how: placed(inputs[key], **layout) for how, layout in LAYOUTS.items()}
            assert served(case, inputs, key, layouts, expected) == set(wanted), key


def test_packed_masks_start_on_eight_bytes(monkeypatch):
    case = CASES["masked_gated_linear-8-bits"]
    inputs = case.inputs(3, 32, 24, torch.bfloat16)
    inputs = {k: t.detach() for k, t in inputs.items()}
    layouts = {n: placed(inputs["masks"], offset=n) for n in (1, 2, 4, 7, 8, 12, 16)}
    with simt_extension.installed(monkeypatch, "sm_80"), fusedmlp.backend("cuda"), poison():
        expected = case.run(inputs)
        assert served(case, inputs, "masks", layouts, expected) == {8, 16}
