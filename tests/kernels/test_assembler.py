"""Tiles that have wgmma read registers are chosen by the assembler that Triton runs."""

import pytest
import torch

from fusedmlp.kernels import pick
from fusedmlp.kernels.arch import ARCHES, arch_for, binary, masked
from fusedmlp.kernels.arch.assembler import ByAssembler, assembler, keeps_registers
from fusedmlp.kernels.arch.tile import Fit
from fusedmlp.kernels.device import pretend

OLD, NEW = ("12.8", "12.9", "13.0", "13.2"), ("13.3", "13.4", "14.0")
HOPPER = arch_for(90)
MADE = ("masked", "binary")  # kernels whose weight is made in registers
FROM_REGISTERS, TMA = {**masked.WGMMA, **binary.WGMMA}, {**masked.TMA, **binary.TMA}
X = torch.empty(1, dtype=torch.bfloat16)


@pytest.fixture
def ptxas(monkeypatch, tmp_path):
    """A function that puts a ptxas of some version in the place of Triton's."""

    def forget():
        assembler.cache_clear()
        pick._pick.cache_clear()

    def put(version):
        tool = tmp_path / f"ptxas-{version}"
        tool.write_text(
            f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.1\n"
        )
        tool.chmod(0o755)
        for name in ("PTXAS", "PTXAS_BLACKWELL"):  # which of them is for Hopper hangs on Triton
            monkeypatch.setenv(f"TRITON_{name}_PATH", str(tool))
        forget()

    yield put
    forget()


def every(arch):
    """key -> tiles, as they are now."""
    return dict(arch.tiles.items())


@pytest.mark.parametrize("version", (*OLD, *NEW, "12.9.86", "13.3.33"))
def test_the_first_that_keeps_them_is_of_cuda_13_3(version):
    assert keeps_registers(version) is (version in (*NEW, "13.3.33"))


@pytest.mark.parametrize("version", OLD)
def test_an_old_assembler_gets_no_operand_in_registers(version, ptxas):
    ptxas(version)
    assert assembler(90) == version
    for arch in ARCHES.values():
        if arch.mma == "wgmma":
            assert not [
                tile
                for (kernel, _), tiles in arch.tiles.items()
                for tile in tiles
                if tile.weight_left and kernel.startswith(MADE)
            ]
    for key in FROM_REGISTERS:
        assert HOPPER.tiles[key] is TMA[key]


@pytest.mark.parametrize("version", NEW)
def test_a_newer_one_multiplies_weights_where_they_are_made(version, ptxas):
    ptxas(version)
    assert masked.WGMMA and binary.WGMMA and all(k.startswith(MADE) for k, _ in FROM_REGISTERS)
    for key, tiles in FROM_REGISTERS.items():
        assert HOPPER.tiles[key] is tiles and tiles[0].weight_left


def test_nothing_else_hangs_on_it(ptxas):
    """No other row of Hopper's, and no other GPU: mma.sync has always read registers."""
    ptxas(OLD[0])
    before = {name: every(arch) for name, arch in ARCHES.items()}
    ptxas(NEW[0])
    after = {name: every(arch) for name, arch in ARCHES.items()}
    changed = {
        (name, key)
        for name, rows in after.items()
        for key in rows
        if rows[key] != before[name][key]
    }
    assert changed == {("sm_90", key) for key in FROM_REGISTERS}
    assert any(t.weight_left for t in after["sm_80"]["masked_gated_linear_dx", 2])


def test_launches_take_the_row_of_the_assembler(ptxas):
    for version, left in ((OLD[-1], False), (NEW[0], True)):
        ptxas(version)
        with pretend(HOPPER, 132):
            for kernel, size in FROM_REGISTERS:
                tile = pick.pick_tile(kernel, X, 8192, 4096, Fit.TMA)
                assert tile == HOPPER.tiles[kernel, size][0] and tile.weight_left is left


def test_tiles_that_differ_have_names_that_differ():
    """Tables, records and explain() know a tile by its name."""
    for tables in (HOPPER.tiles.rows, HOPPER.tiles.from_registers):
        assert all(len(set(map(str, tiles))) == len(tiles) for tiles in tables.values())
    for key, tiles in FROM_REGISTERS.items():
        assert {t for t in tiles if t not in TMA[key]} == {
            t for t in tiles if str(t) not in map(str, TMA[key])
        }


def test_the_assembler_is_asked_once_and_only_for_rows_that_hang_on_it(ptxas, monkeypatch):
    from triton.backends.nvidia import compiler

    asked, own = [], compiler.get_ptxas
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: asked.append(arch) or own(arch))
    ptxas(NEW[0])
    assert HOPPER.tiles["gated_linear_fwd", 2] and not asked
    for key in FROM_REGISTERS:
        assert HOPPER.tiles[key]
    assert asked == [90]


def test_rows_are_a_mapping_as_any():
    rows = ByAssembler(90, {("a", 2): (), ("b", 2): ()}, {})
    assert rows == {("a", 2): (), ("b", 2): ()} and len(rows) == 2
    with pytest.raises(KeyError):
        rows["c", 2]
