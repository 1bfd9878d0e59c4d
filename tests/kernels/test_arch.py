"""How a tile is chosen, and that planning for a GPU that is not there leaves no trace."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from fusedmlp import batch_invariant
from fusedmlp.bench.shapes import DENSE
from fusedmlp.kernels import arch, device as device_module, tiles
from fusedmlp.kernels.arch import ARCHES, arch_for
from fusedmlp.kernels.arch.tile import FEW, FEW_MMA, Fit
from fusedmlp.kernels.dense import gated_linear
from fusedmlp.kernels.device import pretend
from fusedmlp.kernels.moe.grouped import experts_fit, grouped_grid
from fusedmlp.kernels.pick import pick_splits, pick_tile, reading
from fusedmlp.testing import CASES, assert_close_to, compare

X = torch.empty(1, dtype=torch.bfloat16)


@pytest.fixture
def hopper():
    arch = arch_for(90)
    with pretend(arch, 132):
        yield arch.tiles["gated_linear_fwd", 2]


def test_large_results_take_the_preferred_tile(hopper):
    assert pick_tile("gated_linear_fwd", X, 8192, 14336, Fit.TMA) == hopper[0]


def test_small_results_take_the_tile_that_fills_the_gpu(hopper):
    # 128 x 128 tiles of (256, 4096) are 64, fewer than 132 multiprocessors; 64 x 128 are 128.
    assert pick_tile("gated_linear_fwd", X, 256, 4096, Fit.TMA).block_m == 64
    assert pick_tile("gated_linear_fwd", X, 2048, 4096, Fit.TMA).block_m == 128


def test_few_rows_take_the_skinny_tile(hopper):
    for M, skinny in ((1, True), (16, True), (17, False)):
        assert pick_tile("gated_linear_fwd", X, M, 14336, Fit.TMA).skinny is skinny
        assert not pick_tile("gated_linear_bwd", X, M, 14336, Fit.TMA).skinny


@pytest.mark.parametrize(("name", "multiprocessors"), [("sm_90", 132), ("sm_100", 148)])
def test_few_rows_are_read_by_enough_multiprocessors(name, multiprocessors):
    """Dense shapes of the model table, 17 to 64 rows: a weight of 32 MB or more is read at 80% of
    the bandwidth or faster, by what multiprocessors and L2 can take. No smaller one, and no more
    rows, is read slower than it need be; x, which every tile reads, is then a good part of it."""
    row = ARCHES[name]
    with pretend(row, multiprocessors):
        for model in DENSE.values():
            kernel = "gated_linear_fwd" if model.gated else "linear_act_fwd"
            usable = [t for t in row.tiles[kernel, 2] if t.tma]
            for M in (17, 33, 64, 65, 128):
                times = {t: reading(t, kernel, M, model.H, multiprocessors)[0] for t in usable}
                tile = pick_tile(kernel, X, M, model.H, Fit.TMA)
                assert times[tile] == min(times.values()), (model.name, M)
                weight = 2 * model.D * model.H * (1 + model.gated)
                if M <= 64 and weight >= 32e6:
                    assert times[tile] <= 1.25, (model.name, M, tile)


def test_tiles_for_few_rows_serve_no_others(hopper):
    """Unless a row has no others, as where one tile is measured."""
    few = [t for t in hopper if t.few]
    assert few
    for M in (129, 1024, 8192):
        assert pick_tile("gated_linear_fwd", X, M, 1024, Fit.TMA) not in few
    assert pick_tile("gated_linear_fwd", X, 128, 1024, Fit.TMA) in few
    with batch_invariant():
        assert pick_tile("gated_linear_fwd", X, 128, 1024, Fit.TMA) not in few
    row = arch_for(90).with_row("gated_linear_fwd", 2, (few[0],))
    with pretend(row, 132):
        assert pick_tile("gated_linear_fwd", X, 8192, 1024, Fit.TMA) == few[0]


def test_every_tile_for_few_rows_says_so():
    assert all(t.few for t in (*FEW, FEW_MMA))


def test_a_tile_for_few_rows_is_not_persistent(hopper):
    wide, few = hopper[0], next(t for t in hopper if t.few)
    assert tiles.grid_of(wide, X, 128, 1 << 16) == (132,)
    assert tiles.grid_of(few, X, few.block_m, 1 << 16) == ((1 << 16) // few.block_n,)


def test_a_multiprocessor_has_two_persistent_blocks_of_four_warps(hopper):
    """As many as its registers hold, and no more than there are tiles; of experts' rows too."""
    eight, four = hopper[0], next(t for t in hopper if t.num_warps == 4 and t.tma and not t.few)
    assert (eight.blocks, four.blocks) == (1, 2)
    assert tiles.grid_of(four, X, 1 << 10, 1 << 16) == (264,)
    assert tiles.grid_of(four, X, four.block_m, 200 * four.block_n) == (200,)
    assert grouped_grid(eight, X, 1 << 14, 8, 1 << 14) == (132,)
    assert grouped_grid(four, X, 1 << 14, 8, 1 << 14) == (264,)


@pytest.mark.parametrize("stride, fit", ((24, Fit.TMA), (20, Fit.ELEMENT), (0, Fit.ELEMENT)))
def test_a_stack_is_read_by_one_descriptor_where_its_matrices_are_16_bytes_apart(stride, fit):
    memory = torch.zeros(64, dtype=torch.bfloat16)
    assert tiles.fit_of(memory.as_strided((2, 3, 8), (stride, 8, 1))) == fit


def test_unaligned_operands_take_element_loads(hopper):
    assert pick_tile("gated_linear_fwd", X, 8192, 14337, Fit.ELEMENT).loads == "element"


def test_splits_fill_the_gpu_and_leave_work_in_each(hopper):
    tile = pick_tile("gated_linear_fwd", X, 1, 4096, Fit.TMA)
    # 4096 / 32 columns = 128 blocks; 528 wanted; K = 4096 leaves at most 8 parts of 512.
    assert pick_splits(tile, X, 4096, 4096) == 5
    assert pick_splits(tile, X, 4096, 1024) == 2
    assert pick_splits(tile, X, 100_000, 4096) == 1
    assert pick_splits(tile, X, 4096, 100) == 1


def test_pretending_ends():
    before = device_module.arch_of(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), pretend(arch_for(100), 148):
        assert device_module.multiprocessors(torch.device("cpu")) == 148
        raise ZeroDivisionError
    assert device_module.arch_of(torch.device("cpu")) is before is arch.INTERPRETER


def forget_gpus():
    device_module._arch_of_gpu.cache_clear()
    device_module._capability.cache_clear()


def test_gpus_between_rows_get_the_older_row(monkeypatch):
    exact = {arch.capability: arch for arch in ARCHES.values()}
    newer = {capability + 1: arch for capability, arch in exact.items()}
    for capability, row in (newer | exact).items():
        forget_gpus()
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda i, c=capability: divmod(c, 10)
        )
        assert device_module.arch_of(torch.device("cuda", 0)) is row
    forget_gpus()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "T4")
    with pytest.raises(
        RuntimeError,
        match=r"T4: compute capability 8\.0 or newer is needed, got 7\.5; .*backend\('reference'\)",
    ):
        device_module.arch_of(torch.device("cuda", 0))
    forget_gpus()


def test_a_row_says_what_follows_from_its_instructions():
    kinds = {arch.mma: arch for arch in ARCHES.values()}
    assert [(kind, arch.tma, arch.tensor_memory) for kind, arch in sorted(kinds.items())] == [
        ("mma.sync", False, 0), ("tcgen05", True, 512), ("wgmma", True, 0),
    ]  # fmt: skip
    assert sum(arch.thorough for arch in ARCHES.values()) == 1
    assert len({arch.capability for arch in ARCHES.values()}) == len(ARCHES)


def test_alignment():
    t = torch.empty(64, 64, dtype=torch.bfloat16)
    assert tiles.fit_of(t, None, t[:, 8:], t[::2], t[:1], weights=(t, t.t(), None)) == Fit.TMA
    overlapping = torch.empty(4096, dtype=torch.bfloat16).as_strided((100, 64), (8, 1))
    odd = torch.empty(64, 65, dtype=torch.bfloat16)
    for bad in (t[:, 1:], odd, t[:, ::2], t[:0], t[:1, :1].expand(64, 64), t[:1].expand(64, 64),
                overlapping):  # fmt: skip
        assert tiles.fit_of(t, bad) == Fit.ELEMENT
        assert tiles.fit_of(t, weights=(bad,)) == Fit.ELEMENT
    assert tiles.fit_of(t.t()) == Fit.ELEMENT


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_alignment_at_the_boundary(dtype):
    """Row steps and first elements of every number of elements up to 32 bytes: whether each row
    starts on 16 bytes, of a row, of a weight along either dimension and of a stack of experts."""
    size = dtype.itemsize
    memory = torch.empty(4096, dtype=dtype)
    assert memory.data_ptr() % 32 == 0
    for step in range(16, 16 + 32 // size + 1):
        for offset in range(32 // size + 1):
            t = memory[offset:].as_strided((4, 16), (step, 1))
            lies = step * size % 16 == 0 and offset * size % 16 == 0
            fit = Fit.TMA if lies else Fit.ELEMENT
            assert tiles.fit_of(t) == tiles.fit_of(weights=(t,)) == fit, (step, offset)
            assert tiles.fit_of(weights=(t.t(),)) == fit
            assert tiles.fit_of(t[:1]) == fit  # whose step is read all the same
            experts = memory[offset:].as_strided((3, 4, 16), (4 * 16 + step - 16, 16, 1))
            assert experts_fit(experts) == experts_fit(experts.mT) == fit, (step, offset)


# Every tile of the tables is executed as it is compiled (`bench gate execute`); here each way once.
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("loads", "subtiles", "left"),
    [("tma", 4, False), ("tma", 2, True), ("vector", 2, True), ("element", 1, False)],
)
def test_every_way_of_cutting_gives_the_same_numbers(
    loads, subtiles, left, device, on_triton, monkeypatch
):
    """The constexprs that tiles of real GPUs use and the interpreter's own tiles do not."""
    interpreter = arch.INTERPRETER
    rows = {
        key: tuple(
            dataclasses.replace(
                t, block_n=64, subtiles=subtiles, loads=loads, weight_left=left
            )
            for t in tiles_ if not t.skinny
        )[:1]
        for key, tiles_ in interpreter.tiles.items()
    }  # fmt: skip
    monkeypatch.setattr(device_module, "INTERPRETER", dataclasses.replace(interpreter, tiles=rows))
    monkeypatch.setattr(gated_linear, "fit_of", lambda *rows, weights: Fit[loads.upper()])
    for name in ("gated_mlp-bias", "mlp-bias", "masked_gated_mlp-1"):
        case = CASES[name]
        for key, numbers in compare(case, case.inputs(70, 48, 136, torch.float16)).items():
            assert_close_to(*numbers, name=f"{key} of {name}")


@triton.jit
def _round_kernel(x_ptr, y_ptr, N: tl.constexpr):
    x = tiles.load_tile(x_ptr, N, 1, 0, 0, 1, N, 1, N, False)
    tiles.store_tile(y_ptr, N, 0, 0, 1, N, x, 1, N, False)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_results_are_rounded_to_nearest_even(dtype, device):
    x = torch.randn(1, 1024, device=device)
    ties = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-30, float("inf"), -float("inf"), float("nan")]
    x[0, : len(ties)] = torch.tensor(ties)
    y = torch.empty(1, 1024, device=device, dtype=dtype)
    _round_kernel[(1,)](x, y, 1024)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
