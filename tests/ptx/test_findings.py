"""What the machine must find in ordinary code, with its message, PTX line, block and warp.

The right kernel beside each wrong one passes. Asynchronous code: test_asynchronous_errors.py.
"""

import numpy as np
import pytest
from ptx_kernels import ORDERS, WHENS, Launch, finds, launch

from fusedmlp.bench.gate.ptx import Finding, Order, load

AT = "mul.wide.u32 %d0, %tid, 4; add.s64 %d1, %d0, %x;\n"
LOAD = "ld.global.b32 %r0, [%d1]; // here"
ROOM = ".shared .align 16 .b8 room[512]; mov.u32 %r8, room; mad.lo.u32 %r1, %lane, 4, %r8;\n"
FIRST = "setp.ne.u32 %p0, %warp, 0; setp.eq.u32 %p1, %warp, 0;\n"


def words(n=32):
    return np.zeros(n, np.uint32)


# ---- addresses


def test_past_the_end():
    launch(AT + LOAD, x=words())
    finds("load of 4 bytes ends 4 bytes past the end of x", AT + LOAD, x=words(31), warp=0, block=0)
    finds("store of 4 bytes ends 4 bytes past the end of x", AT + "st.global.b32 [%d1], 1; // here",
          x=words(), threads=64, warp=1)  # fmt: skip


def test_before_the_start():
    body = "ld.global.b32 %r0, [%y-8]; // here"
    finds("load of 4 bytes begins 8 bytes before y", body, x=words(), y=words())
    body = "mov.b64 %d0, 8; ld.global.b32 %r0, [%d0]; // here"
    finds("load of 4 bytes at 0x8, where no tensor is", body, x=words())


def test_what_lies_behind_in_memory_is_another_argument():
    """y begins where x ends, but not for the machine."""
    both = words(64)
    launch(AT + LOAD, x=both[:32], y=both[32:])
    code = AT + "ld.global.b32 %r0, [%d1+4]; // here"
    finds("past the end of x", code, x=both[:32], y=both[32:])


def test_a_finding_reads_as_one():
    found = finds("past the end of x", AT + LOAD, x=words(0), grid=3, warp=0, block=0)
    lines = str(found).splitlines()
    assert lines[0] == "kernel: global load of 4 bytes ends 4 bytes past the end of x"
    assert lines[1].endswith(f"PTX line {found.line}: ld.global.b32 %r0, [%d1]")
    assert lines[2] == "  block (0, 0, 0), warp 0"


def test_the_source_line_is_named():
    one = Launch(AT + ".loc 1 42 7\nld.global.b32 %r0, [%d1];", {"x": words(1)})
    text = one.text + '.file 1 "/somewhere/silu.py"\n'
    with pytest.raises(Finding) as caught:
        load(text).run((1,), one.params, one.regions)
    assert caught.value.source == "silu.py:42"


@pytest.mark.parametrize("width, offset", [(16, 1), (32, 2), (64, 4)])
def test_misaligned(width, offset):
    register = {16: "%h0", 32: "%r0", 64: "%d5"}[width]
    body = f"ld.global.b{width} {register}, [%x+{offset}]; // here"
    finds(f"misaligned load of {width // 8} bytes", body, x=np.zeros(32, np.uint64))
    body = f"st.shared.b{width} [%r8+{offset}], {register}; // here"
    finds(f"misaligned store of {width // 8} bytes", ROOM + body)


def test_a_vector_is_aligned_to_all_of_it():
    finds("misaligned load of 16 bytes", "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%x+8]; // here",
          x=np.zeros(64, np.uint64))  # fmt: skip


def test_past_the_end_of_shared_local_and_parameters():
    read, write = "ld.shared.b32 %r0, [%r8+512]; // here", "st.shared.b32 [%r8+-4], 0; // here"
    finds("shared load of 4 bytes at offset 512 of 512", ROOM + read)
    finds("shared store of 4 bytes at offset -4", ROOM + write)
    local = ".local .align 4 .b8 mine[8]; mov.u64 %d0, mine;\n"
    finds("local store past the end of 8", local + "st.local.b32 [%d0+8], 0; // here")
    finds("parameter load past the end", "ld.param.b32 %r0, [in_n+64]; // here", n=1)
    stored = "mov.b64 %d0, in_n; cvta.param.u64 %d0, %d0;\nst.b32 [%d0], 0; // here"
    finds("a store to parameters", stored, n=1)


# ---- what nothing has written


def test_fresh_memory():
    x, marks = words(), np.zeros(128, np.uint8)
    finds("byte 0 of x, which nothing has written", AT + LOAD, x=(x, marks))
    launch(AT + "st.global.b32 [%d1], 1;\n" + LOAD, x=(x, marks))
    assert marks.all()
    launch(AT + LOAD, x=(x, marks))


def test_fresh_memory_is_not_added_to():
    add = "red.global.add.u32 [%x], 1; // here"
    fresh = words(1), np.zeros(4, np.uint8)
    finds("atomic: byte 0 of x, which nothing has written", add, x=fresh)


def test_fresh_shared_memory():
    read = "ld.shared.b32 %r0, [%r1]; // here"
    finds("shared offset 0 is read, which nothing has written", ROOM + read)
    launch(ROOM + "st.shared.b32 [%r1], 0;" + read)


# ---- races in shared memory

RACES = {
    "read at offset 0 by warp 1, not ordered after the write of warp 0": (
        "@%p1 st.shared.b32 [%r1], %tid;", "@%p0 ld.shared.b32 %r0, [%r1]; // here"),
    "write at offset 0 by warp 1, not ordered after the write of warp 0": (
        "@%p1 st.shared.b32 [%r1], 1;", "@%p0 st.shared.b32 [%r1], 2; // here"),
    "write at offset 0 by warp 0, not ordered after the read of warp 1": (
        "@%p1 st.shared.b32 [%r1], 1;\nbar.sync 0;\n@%p0 ld.shared.b32 %r0, [%r1];",
        "@%p1 st.shared.b32 [%r1], 7; // here"),
}  # fmt: skip


@pytest.mark.parametrize("what", RACES)
def test_shared_races(what):
    before, after = RACES[what]
    warp = int(what.partition("warp ")[2][0])
    finds(f"race: shared {what}", f"{ROOM}{FIRST}{before}\n{after}", threads=64, warp=warp)
    for order in ORDERS:
        launch(f"{ROOM}{FIRST}{before}\nbar.sync 0;\n{after}", threads=64, order=order)


def test_warps_may_write_copies_of_one_value():
    launch(f"{ROOM} st.shared.b32 [%r1], %lane; ld.shared.b32 %r0, [%r1];", threads=64)


def test_an_arrival_orders_what_was_before_it_only():
    """The second store comes after the arrival that the other warp waits for."""
    body = f"""{ROOM}{FIRST} @%p0 bra READ;
        st.shared.b32 [%r1], 1;
        bar.arrive 1, 64;
        {{}} bra END;
        READ: bar.sync 1, 64;
        ld.shared.b32 %r0, [%r1{{}}]; // here
        END: bar.sync 0;"""
    launch(body.format("st.shared.b32 [%r1+128], 1;", ""), threads=64)
    late = body.format("st.shared.b32 [%r1+128], 1;", "+128")
    finds("not ordered after the write of warp 0", late, threads=64, warp=1)


def test_who_only_arrives_learns_nothing():
    body = f"""{ROOM}{FIRST} @%p0 bra OTHER;
        st.shared.b32 [%r1], 1;
        bar.sync 1, 64; {{}} bra END;
        OTHER: bar.arrive 1, 64; {{}}
        ld.shared.b32 %r0, [%r1]; // here
        END: ret;"""
    finds("not ordered after the write of warp 0", body.format("", ""), threads=64, warp=1)
    launch(body.format("bar.sync 0;", "bar.sync 0;"), threads=64)


# ---- races in global memory

BLOCKS = "setp.ne.u32 %p0, %block, 0; setp.eq.u32 %p1, %block, 0; setp.eq.u32 %p2, %tid, 0;\n"
GLOBAL_RACES = {
    "store by block 1 at byte 0 of x, which block 0 writes": (
        "st.global.b32 [%x], %block; // here", 1),
    "load by block 1 at byte 0 of x, which block 0 writes": (
        "@%p1 st.global.b32 [%x], 5;\n@%p0 ld.global.b32 %r0, [%x]; // here", 1),
    "store by block 1 at byte 0 of x, which block 0 reads": (
        "@%p1 ld.global.b32 %r0, [%x];\n@%p0 st.global.b32 [%x], 5; // here", 1),
    "store by block 2 at byte 0 of x, which several blocks read": (
        "setp.eq.u32 %p3, %block, 2; ld.global.b32 %r0, [%x];\n"
        "@%p3 st.global.b32 [%x], 5; // here", 2),
    "atomic by block 1 at byte 0 of x, which block 0 writes": (
        "@%p1 st.global.b32 [%x], 5;\n@%p0 red.global.add.u32 [%x], 1; // here", 1),
    "load by block 1 at byte 0 of x, which block 0 writes ": (
        "@%p1 red.global.add.u32 [%x], 1;\n@%p0 ld.global.b32 %r0, [%x]; // here", 1),
}  # fmt: skip


@pytest.mark.parametrize("what", GLOBAL_RACES)
def test_blocks_are_in_no_order(what):
    body, block = GLOBAL_RACES[what]
    finds(f"race: global {what.strip()}", BLOCKS + body, grid=3, block=block, x=words(3))
    launch(BLOCKS + body, grid=1, x=words(3))


def test_every_block_may_read_and_add_and_write_its_own():
    launch("ld.global.b32 %r0, [%x]; red.global.add.u32 [%y], 1;" + AT.replace("%tid", "%block")
           + "st.global.b32 [%d1+4], 3;", grid=3, x=words(4), y=words(1))  # fmt: skip


def test_warps_of_a_block_race_in_global_memory():
    first, second = "@%p1 st.global.b32 [%x], 5;\n", "@%p0 ld.global.b32 %r0, [%x]; // here"
    finds("race: global load by warp 1 at byte 0 of x, not ordered after warp 0's write",
          FIRST + first + second, threads=64, warp=1, x=words())  # fmt: skip
    launch(FIRST + first + "bar.sync 0;\n" + second, threads=64, x=words())


# ---- lanes that are missing

HALF = "setp.lt.u32 %p0, %lane, 16;\n"
SYNCED = [
    "vote.sync.ballot.b32 %r0, %p0, 0xffffffff;",
    "shfl.sync.idx.b32 %r0, %r0, 0, 31, 0xffffffff;",
    "redux.sync.add.u32 %r0, %lane, 0xffffffff;",
    "match.any.sync.b32 %r0, %lane, 0xffffffff;",
    "elect.sync %r0|%p1, 0xffffffff;",
    "bar.warp.sync 0xffffffff;",
]


@pytest.mark.parametrize("line", SYNCED)
def test_named_lanes_must_come(line):
    what = "lanes ffffffff are named and live, but only 0000ffff are here"
    finds(what, f"{HALF}@!%p0 bra END;\n{line} // here\nEND: mov.b32 %r1, 0;")
    launch(f"{HALF}@!%p0 bra END;\n{line.replace('0xffffffff', '0xffff')}\nEND: mov.b32 %r1, 0;")
    launch(f"{HALF}@!%p0 ret;\n{line.replace('0xffffffff', '0xffff')}")


@pytest.mark.parametrize("line", SYNCED)
def test_a_lane_that_comes_must_be_named(line):
    what = "lanes ffffffff are here, but only 0000ffff are named"
    finds(what, HALF + line.replace("0xffffffff", "0xffff") + " // here")


def test_shfl_from_a_lane_that_is_away():
    line = "@%p0 shfl.sync.idx.b32 %r0, %lane, 20, 31, 0xffff; // here"
    finds("shfl reads lane 20, which is not there", HALF + line)


@pytest.mark.parametrize("line", [
    "bar.sync 0;", "bar.arrive 1, 64;",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r8];",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6},"
    " {%r0, %r1, %r2, %r3};",
    "wgmma.fence.sync.aligned;", "barrier.cluster.arrive.aligned;",
])  # fmt: skip
def test_aligned_instructions_need_every_live_lane(line):
    what = "only lanes 0000ffff of ffffffff are here"
    finds(what, f"{ROOM}{HALF}@!%p0 bra END;\n{line} // here\nEND: mov.b32 %r9, 0;")


# ---- barriers of a block


def test_barriers_with_wrong_counts():
    finds("barrier 1 for 48 threads, which are no whole warps", "bar.sync 1, 48; // here")
    finds("barrier 16: a block has 16", "bar.sync 16; // here")
    body = FIRST + "@%p1 bar.sync 1, 64;\n@%p0 bar.sync 1, 96; // here"
    finds("barrier 1 is asked for 96 threads and, before, for 64", body, threads=96, warp=1)
    twice = "bar.arrive 1, 96;\nbar.arrive 1, 96; // here"
    finds("a warp comes to barrier 1 twice", twice, threads=96, warp=0)
    finds("a block ends with warps that arrived at barrier 1 for nobody", "bar.arrive 1, 64;")


def test_a_barrier_that_one_warp_never_reaches():
    body = FIRST + "@%p0 bra END;\nbar.sync 1, 64; // here\nEND: mov.b32 %r0, 0;"
    found = finds("deadlock: warp 0 at barrier 1", body, threads=64, warp=0)
    assert f"(PTX line {found.line}); warp 1 done" in found.what


def test_cluster_barriers():
    finds("barrier.cluster.wait without an arrive", "barrier.cluster.wait.aligned; // here")
    body = "barrier.cluster.arrive.aligned;\nbarrier.cluster.arrive.aligned; // here"
    finds("arrives at the cluster's barrier twice", body)
    finds("the grid is no multiple of the cluster in dimension 0", "mov.b32 %r0, 0;", grid=3,
          options={"cluster": (2, 1, 1)})  # fmt: skip


def test_a_cluster_barrier_that_one_block_never_reaches():
    """Block 1 waits on its mbarrier instead."""
    body = (
        BLOCKS
        + """.shared .align 8 .b8 gate[8]; mov.u32 %r1, gate;
        @%p2 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0; @%p0 bra OTHER;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned; // here
        bra END;
        OTHER: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r1], 0; @!%p4 bra OTHER;
        END: mov.b32 %r0, 0;"""
    )
    what = r"warp 0 at the cluster's barrier .* warp 1 at mbarrier 0 for parity 0, 1 arrivals and 0"
    finds(what, body, grid=2, options={"cluster": (2, 1, 1)}, warp=0, block=0)


def test_an_endless_loop():
    finds("more instructions than allowed: an endless loop?", "AGAIN: bra AGAIN; // here",
          options={"budget": 1000})  # fmt: skip


def test_a_trap():
    finds("an assertion of the kernel failed", HALF + "@%p0 trap; // here", warp=0)


@pytest.mark.parametrize("order", WHENS)
def test_a_launch_names_its_block(order):
    """Only block 5 is wrong, in whatever order blocks run."""
    body = AT.replace("%tid", "%block") + LOAD
    finds("past the end of x", body, x=words(5), grid=6, block=5, order=order)


@pytest.mark.parametrize("threads", [0, 16, 40])
def test_parts_of_warps_are_refused(threads):
    one = Launch(".reg .b32 %unused;", {})
    text = one.text.replace(".reqntid 32", f".reqntid {threads}" if threads else "")
    with pytest.raises(ValueError, match=f"whole warps are asked for, got {threads} threads"):
        load(text).run((1,), one.params, one.regions)


def test_parameters_must_have_the_kernels_sizes():
    one = Launch("mov.b32 %r0, 0;", {"n": 1})
    with pytest.raises(ValueError, match=r"parameters of \[4\] bytes, got \[8\]"):
        load(one.text).run((1,), [bytes(8)], one.regions)


@pytest.mark.parametrize("wrong", [{"when": "soon"}, {"sums": "sorted"}, {"noise": 1.5}])
def test_an_order_that_there_is_not(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"Order: {name} is .*, got '?{value}"):
        Order(**wrong)
