"""Every argument with a layout of its own, beside siblings with others, amid NaN: a stride that is
taken from a sibling, or a load past an edge, shows in the result or as an address."""

import pytest
import torch
from op_checks import check, placed

from fusedmlp.testing import CASES

# The last case of each op has all of its arguments, but for those whose last is plain.
LAST = {case.op: name for name, case in CASES.items() if not name.endswith("-bits")}
NAMES = (*LAST.values(), "gated_linear-bias", "moe_mlp-bias")
WHOLE = ("q_", "s_")  # of one-bit weights, which are contiguous or refused


def vector(name, t):
    return name.startswith("b") or name in ("d1", "d2") or t.dim() == 1


def own_strides(name, t, i):
    return placed(t, inner=2 + i % 5, step=i)


def own_vectors(name, t, i):
    """Vectors alone, every other one expanded; matrices keep to what TMA takes."""
    if not vector(name, t):
        return t
    return placed(t, inner=2 + i) if i % 2 else t.flatten()[0].expand(t.shape)


def amid_nan(name, t, i):
    """Rows 16 or 32 bytes further apart, which TMA takes as well."""
    return placed(t, step=4 + 4 * (i % 2)) if t.is_floating_point() else t


# Each where kernels are others: tiles by element loads, few rows, tiles by TMA.
LAYOUTS = {
    "own strides": (own_strides, (19, 33, 17)),
    "own vectors": (own_vectors, (3, 16, 24)),
    "amid NaN": (amid_nan, (19, 16, 24)),
}
VECTORS = {
    name: any(vector(k, t) for k, t in CASES[name].inputs(3, 16, 24, torch.float32).items())
    for name in NAMES
}
ROWS = [(n, how) for n in VECTORS for how in LAYOUTS if VECTORS[n] or how != "own vectors"]


@pytest.mark.parametrize("name, how", ROWS)
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


@pytest.mark.parametrize("n_m, rows", [(2, 19), (4, 3), (4, 19), (6, 3)])
def test_packed_masks_may_start_anywhere(n_m, rows, device, on_triton):
    """As in a buffer of many parameters: the kernels read them in words of up to four masks."""
    case = CASES["masked_gated_linear-4-bits"]
    inputs = case.inputs(rows, 24, 16, torch.float32, device)
    inputs["masks"] = inputs["masks"][:, :, torch.arange(n_m) % 4].contiguous()
    check(case, {**inputs, "masks": placed(inputs["masks"], offset=1)})
