"""Small maps with gaps, which drivers of Blackwell may make wrongly: no TMA tile takes one."""

import pytest
import torch

from fusedmlp.kernels import maps, tiles
from fusedmlp.kernels.arch import ARCHES, arch_for
from fusedmlp.kernels.arch.tile import Fit
from fusedmlp.kernels.device import pretend
from fusedmlp.kernels.moe.grouped import experts_fit
from fusedmlp.kernels.pick import pick_grouped_tile, pick_tile

bf16 = torch.bfloat16
X = torch.empty(1, dtype=bf16)
WIDE = torch.empty(64, 1024, dtype=bf16)  # 128 KB
GAPS = WIDE[:, :512]
SMALL_GAPS = GAPS[:63]


@pytest.mark.parametrize("arch", ARCHES.values(), ids=ARCHES)
def test_what_is_doubtful(arch):
    with pretend(arch, 132):
        blackwell = arch.mma == "tcgen05"
        assert maps.doubtful(SMALL_GAPS) is blackwell
        assert maps.doubtful(SMALL_GAPS.t()) is blackwell
        assert maps.doubtful(SMALL_GAPS[:1]) is blackwell  # by its strides, as the driver sees it
        assert not maps.doubtful(WIDE[:8]) and not maps.doubtful(WIDE[:8].t())
        tall = torch.empty(65, 1024, dtype=bf16)[:, :512]
        assert not maps.doubtful(tall)  # its last element lies beyond 128 KB
        fit = Fit.VECTOR if blackwell else Fit.TMA
        assert tiles.fit_of(WIDE, SMALL_GAPS) == fit
        assert tiles.fit_of(WIDE, weights=(SMALL_GAPS.t(),)) == fit
        assert tiles.fit_of(WIDE, None, tall) == Fit.TMA
        experts = torch.empty(2, 64, 64, dtype=bf16)
        assert experts_fit(experts, None) == Fit.TMA
        assert experts_fit(experts[:, :32]) == fit
        assert experts_fit(torch.empty(2, 64, 65, dtype=bf16)) == Fit.ELEMENT


def test_a_doubtful_map_takes_no_tma_tile():
    """Few rows are loaded 16 bytes at a time, of which no map is made."""
    with pretend(arch_for(100), 148):
        for kernel in ("gated_linear_fwd", "linear_act_bwd", "binary_linear_dx"):
            assert pick_tile(kernel, X, 512, 512, Fit.TMA).tma
            assert pick_tile(kernel, X, 512, 512, Fit.VECTOR).loads == "element"
            assert pick_tile(kernel, X, 512, 512, Fit.ELEMENT).loads == "element"
        assert pick_tile("gated_linear_fwd", X, 4, 512, Fit.VECTOR).loads == "vector"
        assert pick_tile("gated_linear_bwd", X, 4, 512, Fit.VECTOR).loads == "element"
        assert pick_grouped_tile("moe_up", X, 512, 4, Fit.VECTOR).loads == "element"
        assert pick_grouped_tile("moe_wgrad", X, 512, 1, Fit.VECTOR).loads == "vector"
    with pretend(arch_for(80), 108):
        assert pick_tile("gated_linear_fwd", X, 512, 512, Fit.VECTOR).loads == "vector"
