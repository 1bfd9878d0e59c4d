"""Bad masks and planes: one clear error each."""

import re

import pytest
import torch

from fusedmlp import PackedMasks, pack_masks
from fusedmlp.testing import CASES

MLP = CASES["masked_gated_mlp-1"]
CASE_NAMES = ("masked_gated_linear-1", MLP.name)

OCTETS = torch.zeros(4, 2, 1, dtype=torch.uint8)
BAD = [
    (lambda: pack_masks(torch.ones(3, 4)), ValueError, r"pack_masks: logits must be (n_m, H, D) with n_m from 1 to 16, got (3, 4); one mask is logits[None]"),
    (lambda: pack_masks(torch.ones(17, 3, 4)), ValueError, r"n_m from 1 to 16, got (17, 3, 4)"),
    (lambda: pack_masks(torch.ones(0, 3, 4)), ValueError, r"n_m from 1 to 16, got (0, 3, 4)"),
    (lambda: pack_masks(torch.ones(1, 3, 4).bool()), TypeError, r"logits must have a floating dtype, got torch.bool"),
    (lambda: pack_masks(torch.tensor([[[1.0, float("nan"), float("inf")]]])), ValueError, r"logits must be finite, got 2 that are NaN or infinite"),
    *((lambda bad=bad: pack_masks(torch.tensor([[[1.0, float(bad)]]])), ValueError, "logits must be finite, got 1 that are NaN or infinite")
      for bad in ("nan", "inf", "-inf")),
    (lambda: pack_masks([1.0]), TypeError, r"logits must be a Tensor of logits or PackedMasks, got list"),
    (lambda: PackedMasks(OCTETS.int(), 16), TypeError, r"planes must be a uint8 Tensor, got torch.int32"),
    (lambda: PackedMasks(OCTETS, 12.0), TypeError, r"width must be an int, got 12.0"),
    (lambda: PackedMasks(OCTETS[:, :0], -1), ValueError, r"width must be at least 0, got -1"),
    (lambda: PackedMasks(OCTETS, 8), ValueError, r"planes must be (H, 1, n_m) for width 8, with n_m from 1 to 16, got (4, 2, 1)"),
    (lambda: PackedMasks(torch.zeros(4, 2, 17, dtype=torch.uint8), 16), ValueError, r"with n_m from 1 to 16, got (4, 2, 17)"),
    (lambda: PackedMasks(OCTETS[:, :, :0], 16), ValueError, r"with n_m from 1 to 16, got (4, 2, 0)"),
    (lambda: PackedMasks(OCTETS[:, 0], 8), ValueError, r"planes must be (H, 1, n_m) for width 8, with n_m from 1 to 16, got (4, 1)"),
    (lambda: PackedMasks(OCTETS.expand(4, 2, 3), 16), ValueError, "PackedMasks: planes must be contiguous, got strides (2, 1, 0)"),
    (lambda: PackedMasks(OCTETS + 255, 12), ValueError, r"no bit set past width 12"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_planes(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


WRONG = [
    ("masks", torch.ones(2, 24, 15), ValueError, r"masks must be (2, 24, 16): of w's shape, got (2, 24, 15)"),
    ("masks", torch.ones(24, 16), ValueError, r"masks must be (n_m, H, D) with n_m from 1 to 16, got (24, 16); one mask is masks[None]"),
    ("masks", torch.ones(17, 24, 16), ValueError, r"n_m from 1 to 16, got (17, 24, 16)"),
    ("masks", torch.ones(1, 24, 16).int(), TypeError, r"masks must have a floating dtype, got torch.int32; a mask of bools m has the logits m.float() - 0.5"),
    ("masks", None, TypeError, r"masks must be a Tensor of logits or PackedMasks, got NoneType"),
    ("masks", PackedMasks(torch.zeros(24, 2, 1, dtype=torch.uint8), 15), ValueError, r"masks must be (1, 24, 16): of w's shape, got (1, 24, 15)"),
    ("masks", torch.ones(1, 24, 16, device="meta"), ValueError, r"masks must be on x's device cpu, got meta"),
    ("w", torch.ones(24), ValueError, r"w must be a matrix (H, D), got shape (24,)"),
    ("w", None, TypeError, r"w must be a Tensor, got NoneType"),
    ("w", torch.ones(24, 16).half(), TypeError, r"w must have x's dtype torch.float32, got torch.float16"),
    ("x", torch.ones(4, 7), ValueError, r"x must be (..., 16): D of w; got (4, 7)"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "value", "error", "message"), WRONG)
@pytest.mark.parametrize("name", CASE_NAMES)
def test_bad_arguments(name, argument, value, error, message, each_backend):
    case = CASES[name]
    with pytest.raises(error, match=f"^{case.op}: .*{re.escape(message)}"):
        case.run({**case.inputs(4, 16, 24, torch.float32), argument: value})


def test_bad_down_projection_and_activation(each_backend):
    inputs = MLP.inputs(4, 16, 24, torch.float32)
    with pytest.raises(ValueError, match=r"masked_gated_mlp: w_down must have shape \(16, 24\)"):
        MLP.run({**inputs, "w_down": torch.ones(16, 3)})
    with pytest.raises(ValueError, match="masked_gated_mlp: activation must be one of"):
        MLP.run(inputs, activation="swish")
