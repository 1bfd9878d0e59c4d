"""Bounds of calls of many kernels: hyper_attention's pieces of work, its rows, its whole calls."""

import dataclasses

import bounded
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compiled import in_compiler

from fusedmlp.bench import predict
from fusedmlp.bench.gate.bound import calls, table
from fusedmlp.bench.gate.bound.calls import BATCH, PARTS, VARIANTS, Size, time_of
from fusedmlp.bench.gate.bound.machine import MACHINES
from fusedmlp.bench.gate.bound.row import Bound
from fusedmlp.bench.work import Work, case_of
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.kernels.hyper.chunks import Chunk, segment_place

HOPPER = ARCHES["sm_90"]
NAMED = {part.row: part for parts in PARTS.values() for part in parts}


@triton.jit
def _places(out, work, heads, high, SUBS: tl.constexpr):
    for index in tl.range(0, work):
        sub, head, j, segment = segment_place(index, heads, high, SUBS)
        tl.store(out + index * 4, sub)
        tl.store(out + index * 4 + 1, head)
        tl.store(out + index * 4 + 2, j)
        tl.store(out + index * 4 + 3, segment)


def test_segments_come_in_the_order_of_the_kernels():
    """The last rows of a head of 40 tiles: three segments each, of which a row may lack one."""
    low, high, heads, subs = 30, 40, 1, 2
    pieces = NAMED["hyper_attention_gate"].pieces(low, high)
    places = torch.zeros(len(pieces) * heads * subs, 4, dtype=torch.int32)
    _places[(1,)](places, len(places), heads, high, subs)
    for k, (_, _, j, segment) in enumerate(places.tolist()):
        visits = max(0, min(16, j + 1 - 16 * segment))
        assert pieces[k // (heads * subs)] == (visits, segment > 0), k


@pytest.mark.parametrize("name", [n for n, part in NAMED.items() if part.looped])
def test_pieces_make_up_a_triangle(name):
    part = NAMED[name]
    whole = sum(visits for visits, _ in part.pieces(0, 40))
    assert whole == 40 * 41 // 2
    # Cut in two along the rows.
    halves = [sum(visits for visits, _ in part.pieces(*cut)) for cut in ((0, 20), (20, 40))]
    assert halves == [20 * 21 // 2, whole - 20 * 21 // 2]


def test_a_piece_for_each_part_of_a_width():
    few, many = Size(HOPPER, BATCH * 4096, 2), Size(HOPPER, BATCH * 4096, 16)
    assert few.shapes["v"][-1] == 512 and many.shapes["v"][-1] == 64
    dv, dq, gate = (NAMED[f"hyper_attention_{n}"] for n in ("dv", "dq", "gate"))
    assert few.copies(dv, 2) == 2 * 4 and many.copies(dv, 2) == 2
    assert few.copies(dq, 2) == 2 * 2 and few.copies(gate, 2) == 2


def test_blocks_that_stay_take_rows_in_turns():
    """8 heads of 64 rows to 264 blocks: each second turn from its end, as the kernel has it."""
    size, part = Size(HOPPER, BATCH * 4096, 2), NAMED["hyper_attention_out"]
    chunk = Chunk(0, 8, 0, 64)
    pieces = size.pieces(part, chunk)
    taken, blocks = size.work(part, chunk)
    assert blocks == 264 and taken[:blocks] == pieces[:blocks]
    assert taken[blocks:] == pieces[blocks:][::-1]
    # The longest way is the longest row's and the shortest's, where it was 64 and 31 tiles.
    assert max(sum(v for v, _ in taken[k::blocks]) for k in range(blocks)) == 65


ROW = Bound(
    "sm_90", "hyper_attention_gate", "triton", "64x128x32", "glu, H 2", (64, 40, 64), products=1,
    blocks=2, warps=4, persistent=True, launch={"order": 100.0},
    each={"order": 1000.0, "tensor": 0.0, "issue": 500.0, "L2": 0.0},
    step={"order": 2000.0, "tensor": 160.0, "issue": 900.0, "L2": 0.0},
    triangle=True, segment=16, further={"order": 300.0},
)  # fmt: skip


def test_a_triangles_tile_has_the_mean_of_its_rows():
    # 64 tiles: 32.5 steps, and 16 rows each with one to four pieces.
    assert ROW.steps(4096) == 32.5 and ROW.pieces(4096) == 2.5 and ROW.steps(64) == 1
    assert ROW.clocks(4096)["order"] == (1000 + 32.5 * 2000 + 1.5 * 300) / 2
    assert ROW.ideal(4096) == 2 * 64 * 40 * 4097 / 2 / 4096
    assert ROW.piece(0) == dict.fromkeys(ROW.each, 0.0)
    # Without products: of the memory's bandwidth.
    idle = dataclasses.replace(ROW, products=0, triangle=False, segment=0, moved=1e6)
    assert idle.share(4096) == 1 and idle.limit(4096) == "device memory"
    assert "100% of bandwidth" in table.cells(idle)


def test_blocks_take_pieces_in_turn_and_slots_take_blocks():
    slots = 132 * 2
    one = time_of(ROW, [(4, False)] * slots, slots).waves
    assert one == pytest.approx((100 + 1000 + 4 * 2000) / 1.83e9)
    assert time_of(ROW, [(4, False)] * (slots + 1), slots + 1).waves > 1.9 * one
    # One block that takes two pieces is as long; what is none takes no time.
    assert time_of(ROW, [(4, False)] * (slots + 1), slots).waves > 1.9 * one
    assert time_of(ROW, [(4, False)] * slots + [(0, True)], slots).waves == one
    # Rows that fall in length, by two blocks in turn: the first has the longest of each pair.
    few = dataclasses.replace(ROW, blocks=1, launch={"order": 0.0}, each={"order": 0.0})
    few = dataclasses.replace(few, step={"order": 132e4})
    assert time_of(few, [(4, False), (3, False), (2, False), (1, False)], 2).waves == (
        pytest.approx(6 * 132e4 / 1.83e9)
    )
    assert time_of(few, [(4, False), (3, False)], 2).full == pytest.approx(7e4 / 1.83e9)
    # No launch is shorter than a way to memory and back.
    assert time_of(few, [(0, False)], 1).waves == calls.LATENCY_S


def test_every_kernel_of_a_call_has_a_row():
    rows = {(b.arch, b.variant, b.kernel, b.tile): b for b in table.read()}
    for name in MACHINES:
        for variant in VARIANTS:
            for kernel, part in NAMED.items():
                tile = str(calls.tile_of(ARCHES[name], part))
                row = rows[name, variant, kernel, tile]
                assert not row.why and (row.products > 0) == part.looped
                assert 0.02 < row.share(1536) <= 1, row.key
    # And every tile of the table is that of a kernel.
    tiles = {kernel.removeprefix("hyper_attention_") for kernel, _ in HOPPER.hyper}
    assert tiles - {"step"} == {part.tile for part in NAMED.values()}
    made = calls.calls(table.read())
    assert len(made) == len(MACHINES) * len(VARIANTS) * 2
    for call in made:
        assert not call.why and call.share(1536) > 0.01
        assert call.share(4096) <= call.full_share(4096) < 0.5
        # A forward's busiest unit may be busy to the end; backward's chunks end one by one.
        assert call.half == "forward" or call.share(4096) < 0.9 * call.full_share(4096)
    text = table.markdown(table.read())
    assert text.count("hyper_attention's forward") == text.count("hyper_attention's backward") == 6


def test_the_ratchet_on_a_call():
    rows = [b for b in table.read() if b.arch == "sm_90" and b.variant == "glu, H 2"]
    assert not table.fallen(rows, rows)
    # Blocks that start a clock in a thousand later: no row falls by 2 %, the call does.
    late = [dataclasses.replace(b, launch={**b.launch, "order": 8000.0}) for b in rows]
    (forward, backward) = table.fallen(late, rows)[0::2]
    assert "hyper_attention's forward" in forward and "hyper_attention's backward" in backward
    # A part of a call is no call; one whose kernel cannot be read has no bound, and says so.
    assert not calls.calls(rows[1:2])
    lost = [dataclasses.replace(b, why="hangs") if "gate" in b.kernel else b for b in rows]
    worse = "\n".join(table.fallen(lost, rows))
    assert "hyper_attention's backward, glu, H 2: not derived" in worse
    (call,) = (c for c in calls.calls(lost) if c.half == "backward")
    assert "not derived" in table.cells(call) and "hyper_attention_gate is not" in call.why


def test_what_is_derived_and_a_planted_slow_down():
    """The forward at two heads: as the table has it; slower with an accumulator half as wide; and
    pieces of another length take what the row says."""
    worse, found, slower, lengths = in_compiler(bounded.forward_of_two_heads)
    assert not worse and len(found) == 2
    for row in found:
        m, n, k = row.block
        assert row.step["tensor"] * H100.tensor == pytest.approx(2 * m * n * k, rel=1e-3)
        assert row.step_counts["trips"] == 1
    (_, out), (planted,) = found, slower
    for visits, clocks in lengths.items():
        assert clocks == pytest.approx(out.launch["order"] + out.piece(visits)["order"], rel=0.01)
    lines = table.fallen([dataclasses.replace(planted, tile=out.tile)], [out])
    assert len(lines) == 2 and all("at most" in line for line in lines)


H100 = MACHINES["sm_90"]


@pytest.mark.parametrize("phase", ("forward", "backward", "both"))
def test_predict_sums_a_call(phase):
    def least(tokens=16384, width=1024, heads=2, dtype="bfloat16", case="hyper_attention-layer"):
        work = Work(case_of(case), "identity", dtype, tokens, width, heads)
        found = {r["gpu"]: r for r in predict.predict(work, phase)}
        return found["H100"]["least_ms"], found["H100"]["roofline_ms"]

    rows = {c.half: c for c in calls.calls(table.read()) if c.key.startswith("sm_90")
            and c.variant == "glu, H 2"}  # fmt: skip
    halves = ("forward", "backward") if phase == "both" else (phase,)
    expected = sum(rows[half].seconds(16384) for half in halves) * 1e3
    found, roof = least()
    assert found == pytest.approx(expected) and found > roof
    assert least(2 * 16384)[0] > 3 * found
    # What no row says.
    assert least(heads=4)[0] is least(width=512)[0] is least(dtype="float32")[0] is None
    assert least(case="hyper_attention", heads=64)[0] is None


def test_numbers_of_a_row_are_kept(tmp_path):
    """A row that is written again is the same line, but for what was not there."""
    path = tmp_path / "table.json"
    table.write([ROW], {}, path)
    once = path.read_text()
    (again,) = table.read(path)
    table.write([again], {}, path)
    assert path.read_text() == once and again.further == ROW.further
    assert np.isclose(again.share(4096), ROW.share(4096))
    plain = dataclasses.replace(ROW, triangle=False, segment=0, further={})
    assert not set(table.record(plain)) & {"triangle", "segment", "further", "moved"}
