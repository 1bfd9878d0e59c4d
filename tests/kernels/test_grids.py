"""Grids that a GPU launches: y and z end at 65,535, and only x goes on."""

from dataclasses import replace

import pytest
import torch

from fusedmlp.bench.gate.hazards import in_grid
from fusedmlp.kernels.arch import ARCHES, arch_for
from fusedmlp.kernels.arch.hyper import least_columns
from fusedmlp.kernels.device import pretend
from fusedmlp.kernels.hyper.backward import coefficient_kernel
from fusedmlp.kernels.hyper.gradients import hyper_attention_bwd
from fusedmlp.kernels.hyper.hyper_attention import hyper_attention_fwd
from fusedmlp.kernels.hyper.hyper_attention_step import hyper_attention_step
from fusedmlp.kernels.hyper.plan import HyperCall, plan_launch
from fusedmlp.kernels.launches.hyper import NAMES, OPTIONS, SHARED, core


@pytest.fixture
def grids(monkeypatch):
    """kernel -> its grid, of launches that do nothing."""
    seen = {}

    def note(self, *args, grid, warmup, **kwargs):
        seen[self.fn.__name__] = grid

    monkeypatch.setattr(type(coefficient_kernel), "run", note)
    return seen


def operands(batch, T, step=False):
    one = core(0 if step else T, T, T, (2, 1), 16, 16, (2, 2))
    shapes = {name: s if name in SHARED else (batch, *s) for name, s in one.items()}
    return [torch.zeros(shapes[name], dtype=torch.bfloat16) for name in NAMES]


def test_a_batch_above_65535(grids):
    batch = 70_000
    tensors = operands(batch, 1)
    with pretend(arch_for(90), 132):
        out, *left = hyper_attention_fwd(*tensors, *OPTIONS)
        hyper_attention_bwd(out, out, *tensors, *left, *OPTIONS, [True] * len(NAMES))
        position = torch.zeros(1, dtype=torch.int64)
        q, k, v, c1, u1, vt1, d1, c2, u2, vt2, d2 = operands(batch, 1, step=True)
        hyper_attention_step(q, k, v, position, c1, u1, vt1, d1, c2, u2, vt2, d2, *OPTIONS)
    assert {"coefficient_kernel", "gate_kernel", "slots_kernel", "_sum_kernel"} <= grids.keys()
    assert not [fault for grid in grids.values() for fault in in_grid(grid)]
    assert grids["coefficient_kernel"] == (batch,)


@pytest.mark.parametrize("rank", (1, 16, 17, 40))
def test_a_warp_group_has_sixteen_columns(rank):
    """Two warp groups over the same 64 rows share the columns of a product with the ranks."""
    q = torch.empty(1, 2, 128, 64, dtype=torch.bfloat16)
    shared = 0
    hopper = ARCHES["sm_90"]
    (tile,) = hopper.hyper["hyper_attention_out", 2]
    wide = hopper.with_row("hyper_attention_out", 2, (replace(tile, num_warps=8),))
    for arch in (*ARCHES.values(), wide):
        with pretend(arch, 132):
            for name in ("h1", "out", "gate", "dz2", "dslots"):
                call = HyperCall(q, q[:, :1], (rank, rank), (True, True), True)
                launch = plan_launch(f"hyper_attention_{name}", call)
                groups = max(1, launch.tile.num_warps // 4 // max(1, launch.plan.block // 64))
                wgmma = arch.mma == "wgmma" and launch.plan.block >= 64
                for columns in (launch.plan.block_r1, launch.plan.block_r2):
                    assert columns >= rank
                    assert columns >= (16 * groups if wgmma else 16)
                shared += wgmma and groups > 1
                assert least_columns(arch.mma, launch.tile) == (16 * groups if wgmma else 16)
    assert shared  # some tile does share them
