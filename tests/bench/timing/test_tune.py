"""The tile search, with a fake clock: real launchers in the interpreter, made-up milliseconds."""

import dataclasses
import math

import pytest
import torch

from fusedmlp.bench.report.ledger import check_record
from fusedmlp.bench.timing import candidates, tune
from fusedmlp.bench.timing.tune import LAUNCHES
from fusedmlp.kernels import device as device_module, pick
from fusedmlp.kernels.arch import ARCHES, INTERPRETER, TENSOR_MEMORY, Arch, arch_for
from fusedmlp.kernels.arch.tile import Tile
from fusedmlp.kernels.device import arch_of
from fusedmlp.kernels.launch import draw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = arch_for(90)
START = Tile(64, 64, 32, 4, 3, loads="tma")


def cost(tile: Tile) -> float:
    """A bowl with its bottom at 128x128x64, 8 warps, 4 stages."""
    best = Tile(128, 128, 64, 8, 4, loads="tma")
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    return 1 + sum(abs(math.log2(getattr(tile, n) / getattr(best, n))) for n in names)


def around(tile: Tile) -> list[Tile]:
    return candidates.neighbours(tile, HOPPER, "linear_act_fwd", 2)


def test_the_search_finds_the_bottom():
    best, tried = tune.search(START, around, cost, limit=500)
    assert cost(best) == 1
    assert tried < 500


def test_the_search_keeps_to_its_limit_and_never_repeats():
    seen = []

    def measure(tile: Tile) -> float:
        assert tile not in seen
        seen.append(tile)
        return cost(tile)

    best, tried = tune.search(START, around, measure, limit=7)
    assert tried == len(seen) == 7
    assert cost(best) == min(map(cost, seen))


def test_a_tile_that_cannot_be_used_never_wins():
    only_start = lambda tile: 5.0 if tile == START else math.inf  # noqa: E731
    assert tune.search(START, around, only_start, limit=50)[0] == START


@pytest.mark.parametrize("arch", ARCHES.values(), ids=lambda arch: arch.name)
def test_every_tile_of_the_table_passes_the_arithmetic(arch):
    for (kernel, size), tiles in arch.tiles.items():
        for tile in tiles:
            assert candidates.fits(tile, arch, kernel, size)
            near = candidates.neighbours(tile, arch, kernel, size)
            assert near
            assert tile not in near
            assert len(set(near)) == len(near)
            for other in near:
                assert (other.skinny, other.loads) == (tile.skinny, tile.loads)
                assert candidates.fits(other, arch, kernel, size)


def test_what_cannot_fit_is_ruled_out():
    tile = Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma")
    assert candidates.shared_bytes(tile, "gated_linear_fwd", 2) == 4 * (128 + 2 * 128) * 64 * 2
    assert candidates.shared_bytes(tile, "linear_act_fwd", 2) == 4 * (128 + 128) * 64 * 2
    five = dataclasses.replace(tile, num_stages=5)
    assert not candidates.fits(five, HOPPER, "gated_linear_fwd", 2)
    assert candidates.fits(five, HOPPER, "linear_act_fwd", 2)
    # 256 accumulators a thread leave no register; tensor memory keeps up to 128 x 512 elsewhere.
    wide = Tile(128, 128, 32, 4, 2, loads="tma")
    assert not candidates.fits(wide, HOPPER, "gated_linear_fwd", 2)
    for arch in ARCHES.values():
        assert candidates.fits(wide, arch, "gated_linear_fwd", 2) == (arch.mma == "tcgen05")
        full, over = (Tile(m, TENSOR_MEMORY, 16, 8, 1, subtiles=8) for m in (128, 256))
        assert candidates.fits(full, arch, "linear_act_fwd", 2) == (arch.mma == "tcgen05")
        assert not candidates.fits(over, arch, "linear_act_fwd", 2)
    assert not candidates.fits(Tile(64, 32, 32, 4, 2, subtiles=4), HOPPER, "linear_act_fwd", 2)


def test_growing_a_full_tile_costs_a_stage():
    full = Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma")
    near = candidates.neighbours(full, HOPPER, "gated_linear_fwd", 2)
    assert Tile(128, 128, 128, 8, 2, subtiles=2, loads="tma") in near


# One of the kernels that one call launches.
CALLS = {launch.call: kernel for kernel, launch in LAUNCHES.items()}


@pytest.mark.parametrize("kernel", CALLS.values())
def test_every_launcher_passes_the_rule_on_its_own_tile(kernel):
    tile = arch_of(DEVICE).row(kernel, 4)[0]
    row = tune.TileRow(kernel, torch.float32, tile, (LAUNCHES[kernel].checked,))
    tune.Bench(row, DEVICE, fake_timer, [].append).check(tile)


def test_every_kernel_of_the_table_has_a_launcher():
    tables = [table for arch in ARCHES.values() for table in (arch.tiles, arch.hyper)]
    assert {kernel for table in tables for kernel, _ in table} == set(LAUNCHES)


def test_passes_that_share_tiles_keep_their_size():
    for kernel in candidates._HYPER_SHARED:
        (tile,) = HOPPER.hyper[kernel, 2]
        near = candidates.neighbours(tile, HOPPER, kernel, 2)
        assert near and {t.block_m for t in near} == {tile.block_m}, kernel


@pytest.mark.parametrize("kernel", ("hyper_attention_scores", "hyper_attention_step"))
def test_a_search_of_hyper_attentions_tiles(kernel):
    """Its tiles are reached, small ones too, and the launch obeys."""
    (tile,) = HOPPER.hyper[kernel, 2]
    near = candidates.neighbours(tile, HOPPER, kernel, 2)
    assert dataclasses.replace(tile, block_m=2 * tile.block_m) in near
    assert any(t.block_n != tile.block_n for t in near) == kernel.endswith("step")
    other = dataclasses.replace(tile, num_warps=1)
    with tune.forced(kernel, torch.float32, other, DEVICE):
        assert pick.hyper_tile(kernel, torch.empty(0, device=DEVICE)) == other
    (row,) = tune.rows_of(kernel, torch.bfloat16, LAUNCHES[kernel].sizes, DEVICE)
    assert row.shapes == ((16384, 1024, 2), (16384, 1024, 16))


def test_operands_are_no_zeros_and_repeat():
    first, second = (
        draw(LAUNCHES["gated_linear_bwd"], (8, 32, 16), torch.float32, DEVICE) for _ in range(2)
    )
    for name, t in first.items():
        assert torch.equal(t, second[name])
        assert t.std() > 0.1


def forced_tile() -> Tile:
    (tile,) = arch_of(DEVICE).tiles["linear_act_fwd", 4]
    return tile


def fake_timer(call) -> float:
    """Runs the call, so that a launch really happens, and prefers short K steps."""
    pick.LAST.clear()
    call()
    (last,) = pick.LAST.values()
    return 1.0 + last.block_k / 64


TABLE = Arch(
    "made_up", 0, "wgmma", 1 << 20, 2048,
    {("linear_act_fwd", 4): (
        Tile(32, 32, 32, 4, 2, loads="tma", group_m=2),
        Tile(32, 32, 32, 4, 2, loads="element", group_m=2),
        Tile(16, 32, 16, 4, 2),
    )},
)  # fmt: skip
OPTIONS = tune.TuneOptions(
    kernels=("linear_act_fwd",), dtypes=("float32",), shapes=((40, 48, 64), (33, 48, 32)),
    limit=9, device=str(DEVICE),
)  # fmt: skip


@pytest.fixture
def made_up_table():
    with device_module.pretend(TABLE, 3):
        yield


def parsed(rows: str) -> dict:
    return eval("{" + rows + "}", {"Tile": Tile})


@pytest.mark.usefixtures("made_up_table")
def test_tune_picks_the_fastest_and_prints_a_row_that_parses(capsys):
    records = []
    rows = tune.run(OPTIONS, records.append, fake_timer)
    ((key, tiles),) = parsed(rows).items()
    assert key == ("linear_act_fwd", 4)
    # The K step shrank to the smallest; the rows that no shape uses are printed as they were.
    assert tiles[0].block_k == 16
    assert tiles[1:] == TABLE.tiles[key][1:]
    gain = (1 + 32 / 64) / (1 + 16 / 64) - 1
    assert rows.count(f"{gain:+.1%} over {TABLE.tiles[key][0]}") == 2
    for record in records:
        check_record(record, "record")
    # Every tile is on record as it is timed, before the search ends.
    timed = [r for r in records if r["kind"] == "tile"]
    assert records[: len(timed)] == timed
    assert {r["tile"]["block_k"] for r in timed if r["skipped"] is None} >= {64, 32, 16}
    found = records[len(timed) :]
    assert [(r["M"], r["D"], r["H"]) for r in found] == list(OPTIONS.shapes)
    for record in found:
        assert (record["median_ms"], record["table_ms"]) == (1.25, 1.5)
        assert Tile(**record["tile"]) == tiles[0]


@pytest.mark.usefixtures("made_up_table")
def test_a_gain_within_the_noise_keeps_the_tables_tile():
    clock = iter(range(10**6))
    rows = tune.run(OPTIONS, lambda record: None, lambda call: 1 - next(clock) * 1e-7)
    assert parsed(rows)["linear_act_fwd", 4] == TABLE.tiles["linear_act_fwd", 4]
    assert "kept" in rows


@pytest.mark.usefixtures("made_up_table")
def test_a_fast_tile_with_wrong_numbers_is_discarded(monkeypatch, capsys):
    launch = LAUNCHES["linear_act_fwd"]

    def wrong_at_16(inputs, training):
        results = launch.call(inputs, training)
        if forced_tile().block_k == 16:
            results["h"][-1, -1] += 1
        return results

    broken = dataclasses.replace(launch, call=wrong_at_16)
    monkeypatch.setitem(LAUNCHES, "linear_act_fwd", broken)
    rows = tune.run(OPTIONS, lambda record: None, fake_timer)
    assert parsed(rows)["linear_act_fwd", 4][0].block_k == 32
    assert "AssertionError: h: max error" in capsys.readouterr().out


@pytest.mark.usefixtures("made_up_table")
def test_a_tile_that_does_not_compile_is_discarded(monkeypatch, capsys):
    launch = LAUNCHES["linear_act_fwd"]

    def fails_at_16(inputs, training):
        if forced_tile().block_k == 16:
            raise RuntimeError("out of resource: shared memory")
        return launch.call(inputs, training)

    broken = dataclasses.replace(launch, call=fails_at_16)
    monkeypatch.setitem(LAUNCHES, "linear_act_fwd", broken)
    rows = tune.run(OPTIONS, lambda record: None, fake_timer)
    assert parsed(rows)["linear_act_fwd", 4][0].block_k == 32
    assert "out of resource" in capsys.readouterr().out


@pytest.mark.usefixtures("made_up_table")
def test_a_broken_table_tile_is_an_error_and_no_search(monkeypatch):
    launch = LAUNCHES["linear_act_fwd"]
    wrong = dataclasses.replace(
        launch, call=lambda t, training: {k: v + 1 for k, v in launch.call(t, training).items()}
    )
    monkeypatch.setitem(LAUNCHES, "linear_act_fwd", wrong)
    with pytest.raises(AssertionError, match="h: max error"):
        tune.run(OPTIONS, lambda record: None, fake_timer)


def test_shapes_are_grouped_by_the_tables_tile():
    with device_module.pretend(HOPPER, 132):
        rows = tune.rows_of(
            "gated_linear_fwd", torch.bfloat16,
            ((16, 4096, 14336), (1, 4096, 14336), (8192, 4096, 14336), (4096, 2048, 8192)), DEVICE,
        )  # fmt: skip
    assert [(row.tile.skinny, len(row.shapes)) for row in rows] == [(True, 2), (False, 2)]


@pytest.mark.parametrize("arch", [*ARCHES.values(), INTERPRETER], ids=lambda arch: arch.name)
def test_a_tile_survives_its_source(arch):
    for tile in {tile for tiles in arch.tiles.values() for tile in tiles}:
        assert eval(tune.source(tile), {"Tile": Tile}) == tile
