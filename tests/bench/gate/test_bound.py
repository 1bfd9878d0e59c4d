"""The bound from machine code, on snippets whose answers are known."""

import dataclasses
import json
from pathlib import Path

import bounded
import pytest
from compiled import in_compiler

from fusedmlp.bench.gate.bound import cutlass, table
from fusedmlp.bench.gate.bound.cubin import Layout
from fusedmlp.bench.gate.bound.derive import Passed, together
from fusedmlp.bench.gate.bound.loops import loops_of
from fusedmlp.bench.gate.bound.machine import MACHINES, pipes_of
from fusedmlp.bench.gate.bound.row import Bound
from fusedmlp.bench.gate.bound.sass import control_of, parse
from fusedmlp.bench.gate.bound.values import Unreadable
from fusedmlp.bench.gate.bound.walk import Launched, Walk
from fusedmlp.kernels.arch import ARCHES

H100 = MACHINES["sm_90"]
LAYOUT = Layout(base=0x210, size=0x400, parameters=((0, 4), (4, 4)), threads=128)


def code(text):
    """Instructions, one a line; a line that ends in a colon is a label."""
    lines, at = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(line)
            continue
        lines.append(f"/*{at:04x}*/ {line} ;")
        at += 16
    return next(parse("\n".join(lines)))


def walk(text, *parameters, warps=4, **launch):
    data = tuple(p.to_bytes(4, "little") for p in parameters) or (bytes(4), bytes(4))
    given = Launched(LAYOUT, data, (1, 1, 1), 32 * warps, **launch)
    return Walk(code(text), H100).run(given, 0, warps)


NESTED = """
MOV R0, RZ
.L_outer:
MOV R1, RZ
.L_inner:
IADD3 R1, R1, 0x1, RZ
ISETP.LT.AND P0, PT, R1, c[0x0][0x214], PT
@P0 BRA `(.L_inner)
IADD3 R0, R0, 0x2, RZ
ISETP.GE.AND P1, PT, R0, c[0x0][0x210], PT
@!P1 BRA `(.L_outer)
EXIT
"""


def test_nested_loops_are_found_and_their_trips_come_from_the_launch():
    outer, inner = loops_of(code(NESTED))
    assert (outer.head, inner.head, inner.depth) == (1, 2, 1) and outer.inner == [inner]
    assert inner.body < outer.body
    counts, _ = walk(NESTED, 10, 7)
    assert counts[outer.head] == 5 and counts[inner.head] == 35
    counts, _ = walk(NESTED, 3, 1)
    assert counts[outer.head] == 2 and counts[inner.head] == 2


def test_a_division_as_the_compiler_writes_it():
    text = """
    ULDC UR4, c[0x0][0x214]
    I2F.U32.RP R0, UR4
    MUFU.RCP R0, R0
    IADD3 R2, R0, 0xffffffe, RZ
    F2I.FTZ.U32.TRUNC.NTZ R3, R2
    MOV R2, RZ
    IADD3 R4, RZ, -R3, RZ
    IMAD R5, R4, UR4, RZ
    IMAD.HI.U32 R3, R3, R5, R2
    IMAD.HI.U32 R6, R3, c[0x0][0x210], RZ
    IADD3 R5, -R6, RZ, RZ
    IMAD R0, R5, UR4, R7
    .L_count:
    IADD3 R8, R8, 0x1, RZ
    ISETP.LT.U32.AND P0, PT, R8, R6, PT
    @P0 BRA `(.L_count)
    EXIT
    """
    for a, b in ((4096, 64), (14336, 128), (5000, 7), (99, 100)):
        counts, _ = walk(text, a, b)
        # One more where the quotient is mended later, as the code after it would.
        assert counts[12] in (max(a // b, 1), max(a // b - 1, 1))


def test_lanes_part_and_meet_again():
    counts, _ = walk("""
    S2R R0, SR_TID.X
    ISETP.LT.U32.AND P0, PT, R0, 0x4, PT
    @!P0 BRA `(.L_join)
    IADD3 R1, R1, 0x1, RZ
    .L_join:
    SHFL.IDX PT, R2, R0, 0x3, 0x1f
    ISETP.NE.AND P1, PT, R2, 0x3, PT
    @P1 BRA `(.L_wrong)
    EXIT
    .L_wrong:
    BPT.TRAP 0x1
    """)
    assert counts[3] == counts[4] == 1 and counts[8] == 0


def test_what_cannot_be_known_is_said_with_its_reason():
    with pytest.raises(Unreadable, match=r"BRA .* hangs on ISETP.* <- FADD R1, R2, R3"):
        walk("""
        FADD R1, R2, R3
        ISETP.NE.AND P0, PT, R1, RZ, PT
        .L_here:
        @P0 BRA `(.L_here)
        EXIT
        """)
    with pytest.raises(Unreadable, match="no end after"):
        walk("""
        .L_forever:
        IADD3 R0, R0, 0x1, RZ
        BRA `(.L_forever)
        """)


def test_a_way_to_a_trap_is_not_taken():
    counts, _ = walk("""
    LDG.E R0, [R2.64]
    ISETP.NE.AND P0, PT, R0, RZ, PT
    @P0 BRA `(.L_trap)
    EXIT
    .L_trap:
    BPT.TRAP 0x1
    """)
    assert counts[3] == 1


def test_a_grid_stands_where_each_generation_reads_it():
    """sm_100 reads the number of blocks at 0x370, with 16 bytes to each size."""
    words = lambda bank, at: [int.from_bytes(bank[at + 4 * k :][:4], "little") for k in range(3)]  # noqa: E731
    old = LAYOUT.bank((bytes(4), bytes(4)), (7, 5, 3), 128)
    assert words(old, 0) == [128, 1, 1] and words(old, 12) == [7, 5, 3]
    new = dataclasses.replace(LAYOUT, base=0x380).bank((bytes(4), bytes(4)), (7, 5, 3), 128)
    assert words(new, 0x360) == [128, 1, 1] and words(new, 0x370) == [7, 5, 3]


def test_control_codes():
    # `S2R R9, SR_TID.X` of a kernel for sm_90: it frees scoreboard 2 and waits for none.
    control = control_of(0x000EA20000002100)
    assert (control.writes, control.reads, control.waits) == (2, 7, 0)
    assert control_of(0x044FE400000006FF).waits == 4
    assert control_of(0x000FF00000000800).stall == 8


PRODUCTS = """
MOV R0, RZ
.L_loop:
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR36], R24
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR36], R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, {left}
IADD3 R0, R0, 0x1, RZ
ISETP.LT.AND P0, PT, R0, 0x8, PT
@P0 BRA `(.L_loop)
WARPGROUP.DEPBAR.LE gsb0, 0x0
EXIT
"""


def test_products_take_the_tensor_cores_peak():
    """m64n256k16 is 64 * 256 * 16 * 2 FLOP at 4096 a clock: 128 clocks."""
    _, line = walk(PRODUCTS.format(left="0x1"))
    assert line.totals.tensor == 16 * 128
    # With two warp groups, each product twice; only the first wait to the end is a drain.
    assert line.end == pytest.approx(16 * 128, abs=16) and line.drains == 1
    _, twice = walk(PRODUCTS.format(left="0x1"), warps=8)
    assert twice.end == pytest.approx(2 * line.end, abs=16)


def test_a_wait_to_the_end_in_a_loop_leaves_the_pipe_empty():
    _, kept = walk(PRODUCTS.format(left="0x1"))
    _, drained = walk(PRODUCTS.format(left="0x0"))
    assert drained.drains == 8 and drained.end > kept.end + 7 * 4


def test_the_port_of_shared_memory_limits_narrow_products():
    """m64n64k16 reads 4096 bytes of shared memory, 32 clocks, as long as it multiplies; with two
    warp groups and TMA's writes in between the port takes longer than the tensor cores."""
    text = """
    UMOV UR4, 0x100
    MOV R1, 0x4000
    SYNCS.ARRIVE.TRANS64 RZ, [UR4], R1
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR36], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    EXIT
    """
    _, line = walk(text)
    assert line.totals.once == 0x4000
    assert line.end == pytest.approx(0x4000 / 128 + 32, abs=8)


def test_a_load_that_is_waited_for_at_once_costs_its_latency():
    """Real encodings: LDS that frees scoreboard 0, and its user that waits for it or does not."""
    load = "/*0000*/ LDS R0, [R1] ; /* 0x0000000001007984 */\n /* 0x000e220000000800 */\n"
    user = "/*0010*/ IADD3 R2, R0, 0x1, RZ ; /* 0x0000000100027810 */\n /* {} */\n"
    end = "/*0020*/ EXIT ; /* 0x000000000000794d */\n /* 0x000fea0003800000 */\n"
    times = []
    for waits in ("0x001fe20007ffe0ff", "0x000fe20007ffe0ff"):
        (read,) = parse(load + user.format(waits) + end)
        given = Launched(LAYOUT, (bytes(4), bytes(4)), (1, 1, 1), 128)
        _, line = Walk(read, H100).run(given, 0, 4)
        times.append((line.end, line.exposed))
    (waited, exposed), (free, hidden) = times
    assert exposed == 1 and hidden == 0 and waited >= free + H100.latency.shared - 3


def test_pipes():
    assert dict(pipes_of("MUFU", H100)) == {"special": 8}
    assert dict(pipes_of("IMAD", H100)) == {"fp32": 1, "multiply": 2}
    assert dict(pipes_of("FFMA", MACHINES["sm_80"])) == {"fp32": 2}
    assert not pipes_of("UIADD3", H100)


def test_roles_run_side_by_side_and_share_pipes():
    one = Passed({"order": 700.0, "tensor": 512.0}, {"drains": 1})
    both = together([one, Passed({"order": 900.0, "tensor": 512.0}, {"drains": 0})])
    assert both.clocks == {"order": 900.0, "tensor": 1024.0}


BOUND = Bound(
    "sm_90", "gated_linear_fwd", "triton", "128x128x64", "train", (128, 128, 64), products=2,
    warps=8, persistent=True, launch={"order": 0.0},
    each={"order": 2500.0, "tensor": 0.0, "L2": 100.0},
    step={"order": 1024.0, "tensor": 1024.0, "L2": 768.0},
)  # fmt: skip


def test_share_limit_and_waves():
    assert BOUND.ideal(4096) == 64 * 1024
    assert BOUND.share(4096) == pytest.approx(65536 / (65536 + 2500))
    assert BOUND.limit(4096) == "epilogue"
    # 133 tiles on 132 multiprocessors take two waves.
    one = BOUND.milliseconds(128, 128 * 132, 4096)
    assert BOUND.milliseconds(128, 128 * 133, 4096) == pytest.approx(2 * one)
    assert BOUND.share_of(128, 128 * 132, 4096) == pytest.approx(BOUND.share(4096))
    assert BOUND.share_of(128, 128 * 133, 4096) < 0.51


def test_two_persistent_blocks_share_a_multiprocessor_and_take_turns():
    """Of 1, 2 and 3 tiles a multiprocessor; one block's own order is 68,036 clocks a tile."""
    two = dataclasses.replace(BOUND, blocks=2, step={**BOUND.step, "tensor": 100.0, "L2": 0.0})
    one, both, three = (two.milliseconds(128, 128 * 132 * n, 4096) for n in (1, 2, 3))
    own = 2500 + 64 * 1024
    assert one == both == pytest.approx(own / (two.machine.clock_ghz * 1e6))
    assert three == pytest.approx(2 * one)


def test_the_ratchet(tmp_path):
    worse = dataclasses.replace(BOUND, each={**BOUND.each, "order": 5000.0})
    little = dataclasses.replace(BOUND, each={**BOUND.each, "order": 2700.0})
    lost = dataclasses.replace(BOUND, why="its loop hangs on R1")
    assert not table.fallen([BOUND, little], [BOUND])
    assert "was 96.3%" in "\n".join(table.fallen([worse], [BOUND]))
    assert table.fallen([BOUND], [])[0].endswith(
        "not in the table; `gate bound --update` enters it"
    )
    assert table.fallen([lost], [BOUND])[0].endswith("not derived: its loop hangs on R1")
    assert not table.fallen([BOUND], [worse])
    path = tmp_path / "table.json"
    table.write([BOUND, lost], {"triton": "3.9.0"}, path)
    assert json.loads(path.read_text())["source"] == table.COMPUTED
    again = {b.why: b for b in table.read(path)}
    assert again[""].share(1536) == BOUND.share(1536) and again[lost.why].why
    text = table.markdown(list(again.values()))
    assert "computed" in text and "not derived" in text and "| 96% |" in text


@pytest.mark.parametrize(
    "arch, kernel, variant",
    [
        ("sm_80", "linear_act_fwd", "train"),
        ("sm_90", "gated_linear_fwd", "infer"),
        ("sm_90", "gated_linear_bwd", "train"),
        ("sm_100", "gated_linear_fwd", "train"),
    ],
)
def test_no_bound_falls(arch, kernel, variant):
    """The whole table is `gate bound`'s, which .ci/run runs."""
    worse, (found,) = in_compiler(bounded.fallen, arch, kernel, variant)
    assert not worse
    # A tile of depth 64 n has n steps, and each multiplies what a tile's products ask for.
    assert found.step_counts["trips"] == pytest.approx(1)
    m, n, k = found.block
    machine = MACHINES[arch]
    assert found.step["tensor"] * machine.tensor == pytest.approx(2 * found.products * m * n * k)
    assert 0.3 < found.share(1536) < found.share(4096) < 1


def test_kernels_by_cutlass_are_rows_without_a_bound():
    """Where they are built, and as the schedules of their sources have it."""
    assert not list(cutlass.rows({"gated_linear_sm90": Path()}))
    rows = list(cutlass.rows({"cutlass_sm90": Path(), "cutlass_sm100": Path()}))
    assert len({row.key for row in rows}) == len(rows) == 8
    assert all(row.why == cutlass.WHY and "not derived" in table.cells(row) for row in rows)


def test_every_tile_of_16_bits_has_a_row():
    """And no tile that there is no more."""
    rows = {(b.arch, b.kernel, b.tile) for b in table.read() if b.source == "triton"}
    tabled = {
        (name, kernel, str(tile))
        for name in MACHINES
        for (kernel, size), tiles in ARCHES[name].tiles.items()
        if size == 2
        for tile in tiles
    }
    assert {row for row in rows if not row[1].startswith("hyper")} == tabled
    assert not [b.key for b in table.read() if b.why and b.source == "triton"]
