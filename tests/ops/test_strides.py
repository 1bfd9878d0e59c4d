"""Every argument with a layout of its own, beside siblings with others, amid NaN: a stride that is
taken from a sibling, or a load past an edge, shows in the result or as an address."""

import pytest
import torch
from op_checks import check, placed

from fusedmlp.testing import CASES

# The last case of each op has all of its arguments; packed pairs are read otherwise.
LAST = {case.op: name for name, case in CASES.items() if not name.endswith("-bits")}
NAMES = (*LAST.values(), *(n for n in CASES if "-up_gate" in n), "gated_mlp-bias", "moe_mlp-bias")
WHOLE = ("q_", "s_")  # of one-bit weights, which are contiguous or refused


def vector(name, t):
    return name.startswith("b") or name in ("d1", "d2") or t.dim() == 1


def own_strides(name, t, i):
    return placed(t, inner=2 + i % 5, step=i)


def own_vectors(name, t, i):
    return placed(t, inner=2 + i) if vector(name, t) else t


def expanded(name, t, i):
    return t.flatten()[0].expand(t.shape) if vector(name, t) else t


# Each where kernels are others: tiles of many rows and of few, TMA where vectors alone are strided.
LAYOUTS = {
    "own strides": (own_strides, (19, 33, 17)),
    "own vectors": (own_vectors, (3, 16, 24)),
    "expanded": (expanded, (19, 16, 24)),
}


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("name", dict.fromkeys(NAMES))
def test_each_argument_has_strides_of_its_own(name, how, device, on_triton):
    lay, size = LAYOUTS[how]
    case = CASES[name]
    inputs = case.inputs(*size, torch.float32, device)
    laid = {
        k: t if k.startswith(WHOLE) else lay(k, t, i) for i, (k, t) in enumerate(inputs.items())
    }
    dy = None
    if not case.forward_only:
        dy = placed(torch.randn(case.fake_output(*size).shape, device=device), inner=3)
    check(case, laid, dy=dy)


@pytest.mark.parametrize("rows", (3, 19))
@pytest.mark.parametrize("n_m", (1, 2, 4, 6))
def test_packed_masks_may_start_anywhere(n_m, rows, device, on_triton):
    """As in a buffer of many parameters: the kernels read them in words of up to four masks."""
    case = CASES["masked_gated_linear-4-bits"]
    inputs = case.inputs(rows, 24, 16, torch.float32, device)
    inputs["masks"] = inputs["masks"][:, :, torch.arange(n_m) % 4].contiguous()
    for offset in (1, 2, 3):
        check(case, {**inputs, "masks": placed(inputs["masks"], offset=offset)})
