"""Faults of asynchronous code: right kernels, each with one line dropped or changed.

A fault is found in every order, unless only what comes late shows it.
"""

import numpy as np
import pytest
from ptx_kernels import ORDERS, WHENS, aligned, finds, launch

from fusedmlp.bench.gate.ptx.tensor_map import TensorMap

COPY = """
    .shared .align 16 .b8 room[512]; mov.u32 %r8, room; mad.lo.u32 %r1, %lane, 4, %r8;
    mul.wide.u32 %d0, %lane, 4; add.s64 %d1, %d0, %x;
    cp.async.ca.shared.global [%r1], [%d1], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r0, [%r1];
"""
STORE = """
    .shared .align 128 .b8 room[512]; mov.u32 %r8, room; mad.lo.u32 %r1, %tid, 4, %r8;
    setp.eq.u32 %p0, %tid, 0; mov.b64 %d4, box; cvta.param.u64 %d4, %d4;
    st.shared.b32 [%r1], %tid;
    fence.proxy.async.shared::cta;
    bar.sync 0; // first
    @%p0 cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%d4, {0}], [%r8];
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
    bar.sync 0; // second
    st.shared.b32 [%r1], 0;
"""
LOAD = """
    .shared .align 128 .b8 room[512]; mov.u32 %r8, room; mad.lo.u32 %r1, %tid, 4, %r8;
    .shared .align 8 .b8 gate[8]; mov.u32 %r2, gate;
    setp.eq.u32 %p0, %tid, 0; mov.b64 %d4, box; cvta.param.u64 %d4, %d4;
    @%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
    bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;
    @%p0 cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r8], [%d4, {0}], [%r2];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0;
    @!%p1 bra WAIT;
    ld.shared.b32 %r0, [%r1];
"""  # noqa: E501
_FILL = """
    .shared .align 1024 .b8 room[4096]; mov.u32 %r8, room; mad.lo.u32 %r1, %tid, 16, %r8;
    cvt.u64.u32 %d9, %r8; shr.u64 %d9, %d9, 4;
    st.shared.v4.b32 [%r1], {0, 0, 0, 0}; st.shared.v4.b32 [%r1+2048], {0, 0, 0, 0};
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""
# A of 64 x 16 at 0 and B of 8 x 16 behind it, without a swizzle.
_A, _B = 128 >> 4 << 32 | 1024 >> 4 << 16, 128 >> 4 << 32 | 128 >> 4 << 16 | 2048 >> 4
_D = "{%r10, %r11, %r12, %r13}"
WGMMA = f"""{_FILL} add.s64 %d2, %d9, {_A}; add.s64 %d3, %d9, {_B}; mov.pred %p1, 0;
    mov.b32 %r10, 0; mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {_D}, %d2, %d3, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.f32 %r10, %r10, %r11;
"""
_FROM_REGISTERS = ("%d2, %d3, %p1, 1, 1, 0, 0", "{%r20, %r21, %r22, %r23}, %d3, %p1, 1, 1, 0")
_SHAPE = 1 << 4 | 1 << 7 | 1 << 10 | 8 // 8 << 17 | 64 // 16 << 24
TENSOR = f"""{_FILL} .shared .align 8 .b8 gate[8]; .shared .align 4 .b8 base[4];
    mov.u32 %r2, gate; mov.u32 %r3, base; setp.eq.u32 %p0, %tid, 0; setp.ne.u32 %p3, %warp, 0;
    add.s64 %d2, %d9, {_A | 1 << 46}; add.s64 %d3, %d9, {_B | 1 << 46}; mov.pred %p1, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
    @%p3 bra TAKEN;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 32;
    TAKEN: bar.sync 0;
    ld.shared.b32 %r4, [%r3]; mad.lo.u32 %r5, %warp, 2097152, %r4; mov.b32 %r6, {_SHAPE};
    @%p0 tcgen05.mma.cta_group::1.kind::f16 [%r4], %d2, %d3, %r6, %p1;
    @%p0 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra WAIT;
    tcgen05.ld.sync.aligned.32x32b.x4.b32 {_D}, [%r5];
    tcgen05.wait::ld.sync.aligned;
    add.f32 %r10, %r10, %r11;
    st.shared.v4.b32 [%r1], {{0, 0, 0, 0}};
    bar.sync 0; // last
    @%p3 bra FREED;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 32;
    FREED: mov.b32 %r9, 0;
"""
KERNELS = {"copy": COPY, "store": STORE, "load": LOAD, "wgmma": WGMMA, "tensor": TENSOR}


def given(name):
    """The other arguments of a kernel's launch."""
    x = aligned(64, np.uint32)
    box = {"box": ("x", lambda at: TensorMap(at, [64], [], [64], 4))}
    more = {"maps": box} if name in ("store", "load") else {}
    return {"x": x, "threads": {"copy": 32, "store": 64, "load": 64}.get(name, 128), **more}


@pytest.mark.parametrize("order", WHENS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_right_kernel_passes(name, order):
    launch(KERNELS[name], order=order, options={"strict": True}, **given(name))


def drop(line):
    return line, ""


UNREAD = "written while something asynchronous still reads it"
COMING = "read while an asynchronous copy still writes it"
LATE = f"{COMING}|not ordered after the write of a TMA load|nothing has written"
FLIGHT = "operand 0 is a register that an instruction in flight still writes"
INIT = "@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;"
READ = "ld.shared.b32 %r0, [%r1];"
GROUP = "    @%p0 cp.async.bulk.commit_group;\n"
WAITED = "    @%p0 cp.async.bulk.wait_group 0;\n"
AGAIN = "st.shared.b32 [%r1], 0;"
SPIN = "    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0;\n"
SUM = "add.f32 %r10, %r10, %r11;"
FENCE = "    fence.proxy.async.shared::cta;\n"
ONE_FENCE = "    setp.lt.u32 %p3, %tid, 32; @%p3 fence.proxy.async.shared::cta;\n"
PROXY = "the async proxy reads shared offset .*, which warp . wrote with no fence.proxy.async"
STORED = "st.shared.v4.b32 [%r1], {0, 0, 0, 0};"
COMMIT = "@%p0 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];"

# kernel, what is changed, what is found, the line
FAULTS = {
    "cp.async: no wait": ("copy", [drop("cp.async.wait_group 0;")], COMING, READ),
    "cp.async: no commit": ("copy", [drop("cp.async.commit_group;")], COMING, READ),
    "cp.async: one group may stay": ("copy", [("wait_group 0", "wait_group 1")], COMING, READ),
    "cp.async: at the exit": ("copy", [drop("cp.async.wait_group 0;"), drop(READ)],
                              "a warp exits with a cp.async that it does not wait for", "ret;"),
    "cp.async: at the exit, in no group": (
        "copy", [drop("cp.async.wait_group 0;"), drop("cp.async.commit_group;"), drop(READ)],
        "a warp exits with a cp.async that it does not wait for", "ret;"),
    "cp.async: overwritten": (
        "copy", [("cp.async.wait", "st.shared.b32 [%r1], 0;\ncp.async.wait")],
        "written while an asynchronous copy still writes it", AGAIN),
    "cp.async: misaligned": ("copy", [("[%d1], 4", "[%d1+2], 4")], "of 4 bytes is misaligned", "cp.async.ca"),
    "cp.async: reads more than it writes": ("copy", [("[%d1], 4", "[%d1], 4, 8")],
                                            "cp.async reads 8 bytes of 4", "cp.async.ca"),
    "store: no proxy fence": ("store", [drop(FENCE)], PROXY, "1d.global"),
    "store: one warp's fence before the barrier": ("store", [(FENCE, ONE_FENCE)], PROXY, "1d.global"),
    "store: no barrier before": ("store", [drop("bar.sync 0; // first")],
                                 "not ordered after the write of warp 1|nothing has written", "1d.global"),
    "store: no wait": ("store", [drop(WAITED)], UNREAD, AGAIN),
    "store: no commit": ("store", [drop(GROUP)], UNREAD, AGAIN),
    "store: no barrier after": ("store", [drop("bar.sync 0; // second")],
                                f"{UNREAD}|not ordered after the", ""),
    "store: at the exit": ("store", [drop(WAITED), drop(AGAIN)],
                           "a warp exits while a TMA store may still read", "ret;"),
    "store: at the exit, in no group": ("store", [drop(GROUP), drop(AGAIN)],
                                        "a warp exits with a TMA store that is in no group", "ret;"),
    "store: another lane waits": (
        "store", [("@%p0 cp.async.bulk.wait", "@!%p0 cp.async.bulk.wait")],
        "the lane that issued a TMA store does not wait for it", "wait_group"),
    "load: no mbarrier": ("load", [drop(INIT)], "no mbarrier at shared offset 512", "mbarrier."),
    "load: two inits": ("load", [(INIT, f"{INIT}\n{INIT}")], "an mbarrier is initialised twice", INIT),
    "load: init is not ordered": ("load", [drop("bar.sync 0;")],
                                  "used, not ordered after its init by warp 0|no mbarrier at", "WAIT:"),
    "load: no wait": ("load", [drop(SPIN), drop("@!%p1 bra WAIT;")], LATE, READ),
    "load: wrong parity": ("load", [("%p1, [%r2], 0", "%p1, [%r2], 1")],
                           f"{LATE}|for parity 1, 1 arrivals", ""),
    "load: too many bytes expected": ("load", [("[%r2], 256", "[%r2], 260")],
                                      "for parity 0, 0 arrivals and 4 bytes missing", "WAIT:"),
    "load: too few bytes expected": ("load", [("[%r2], 256", "[%r2], 252")],
                                     "for parity 0, 0 arrivals and -4 bytes missing", "WAIT:"),
    "load: nothing expected": ("load", [("@%p0 mbarrier.arrive", "@!%p0 bra WAIT; // mbarrier.arrive")],
                               "1 arrivals and -256 bytes missing", "WAIT:"),
    "load: more to arrive": ("load", [("[%r2], 1;", "[%r2], 2;")], "1 arrivals and 0 bytes missing", "WAIT:"),
    "load: more than arrive": (
        "load", [("bar.sync 0;", "bar.sync 0; @%p0 mbarrier.arrive.shared::cta.b64 _, [%r2], 2;")],
        "more arrivals at an mbarrier than its 1", "bar.sync 0; @%p0"),
    "load: an unaligned mbarrier": ("load", [("mov.u32 %r2, gate;", "mov.u32 %r2, gate; add.s32 %r2, %r2, 4;")],
                                   "an mbarrier is not aligned to 8 bytes", INIT),
    "load: far outside": ("load", [("{0}", "{1000}")],
                          "dimension 0 of the box is 1000 to 1064, far outside of 64", "1d.shared"),
    "load: wholly before": ("load", [("{0}", "{-64}")],
                            "dimension 0 of the box is -64 to 0, far outside of 64", "1d.shared"),
    "load: of another rank": ("load", [("tensor.1d", "tensor.2d"), ("{0}", "{0, 0}")],
                              "TMA load of rank 2 through a map of rank 1", "2d.shared"),
    "load: to an unaligned place": ("load", [("mov.u32 %r8, room;", "mov.u32 %r8, room; add.s32 %r8, %r8, 64;")],
                                    "a shared address is not aligned to 128 bytes", ""),
    "load: no generic address": ("load", [drop("cvta.param.u64 %d4, %d4;")],
                                 "a tensor map outside the parameters", "1d.shared"),
    "load: inside of the map": ("load", [drop("cvta.param.u64 %d4, %d4;"),
                                         ("%d4, box;", "%d4, box; cvta.param.u64 %d4, %d4; add.s64 %d4, %d4, 8;")],
                                "a tensor map", "1d.shared"),
    "wgmma: no proxy fence": ("wgmma", [drop(FENCE)], PROXY, "wgmma.mma"),
    "wgmma: no fence": ("wgmma", [drop("wgmma.fence.sync.aligned;")],
                        "no wgmma.fence since accumulator 0 was written, or at all", "wgmma.mma"),
    "wgmma: written after the fence": (
        "wgmma", [("wgmma.mma", "mov.b32 %r11, 0;\nwgmma.mma")],
        "no wgmma.fence since accumulator 1 was written", "wgmma.mma"),
    "wgmma: A written after the fence": (
        "wgmma", [_FROM_REGISTERS, ("wgmma.mma", "mov.b32 %r22, 0;\nwgmma.mma")],
        "no wgmma.fence since a register of A was written", "wgmma.mma"),
    "wgmma: A written in flight": (
        "wgmma", [_FROM_REGISTERS, ("wgmma.wait", "mov.b32 %r22, 0;\nwgmma.wait")],
        "operand 0 is a register that a wgmma in flight still reads", "mov.b32 %r22, 0;"),
    "wgmma: no commit": ("wgmma", [drop("wgmma.commit_group.sync.aligned;")], FLIGHT, SUM),
    "wgmma: no wait": ("wgmma", [drop("wgmma.wait_group.sync.aligned 0;")], FLIGHT, SUM),
    "wgmma: its operand overwritten": (
        "wgmma", [("wgmma.wait", "st.shared.b32 [%r8+2064], 0;\nwgmma.wait")], UNREAD, "[%r8+2064]"),
    "wgmma: at the exit": ("wgmma", [drop("wgmma.wait_group.sync.aligned 0;"), drop(SUM)],
                           "a warp exits with a wgmma or a tcgen05.ld in flight", "ret;"),
    "wgmma: outside of shared memory": ("wgmma", [(str(_B), str(_B + 128))],
                                        "a matrix operand at shared offset 4096 of 4096", "wgmma.mma"),
    "tensor: no proxy fence": ("tensor", [drop(FENCE)], PROXY, "tcgen05.mma"),
    "tensor: no commit": ("tensor", [drop(COMMIT)], "1 arrivals and 0 bytes missing", "WAIT:"),
    "tensor: no wait for the registers": ("tensor", [drop("tcgen05.wait::ld.sync.aligned;")],
                                          "a register that an instruction in flight still writes", SUM),
    "tensor: no dealloc": ("tensor", [drop("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 32;")],
                           "a block ends without tcgen05.dealloc", ""),
    "tensor: 48 columns": ("tensor", [("[%r3], 32", "[%r3], 48")], "tcgen05.alloc of 48 columns", "alloc"),
    "tensor: columns of nobody": ("tensor", [("32x32b.x4.b32 " + _D + ", [%r5]", "32x32b.x4.b32 " + _D + ", [%r5+30]")],
                                  "columns 30 to 34 of 32 allocated", "tcgen05.ld"),
    "tensor: a product's columns of nobody": ("tensor", [("kind::f16 [%r4]", "kind::f16 [%r4+30]")],
                                              "tcgen05.mma to columns 30 to 38 of 32", "tcgen05.mma"),
    "tensor: another warp's lanes": ("tensor", [("%warp, 2097152", "%warp, 0")],
                                     "lane 0 is not warp [123]'s", "tcgen05.ld"),
    "tensor: other products": ("tensor", [(str(_SHAPE), str(_SHAPE | 1 << 13))],
                               "instruction descriptor .* is not modelled", "tcgen05.mma"),
    "tensor: its operand overwritten": (
        "tensor", [("WAIT:", "@%p0 st.shared.b32 [%r8+16], 0;\nWAIT:")],
        f"{UNREAD}|not ordered after the read of a tcgen05 product", "[%r8+16], 0;"),
}  # fmt: skip
# What only the late order shows: at once, these are as if they had been waited for.
ONLY_LATE = {
    "load: no second look": ("load", [drop("@!%p1 bra WAIT;")], LATE, READ),
    "load: at the exit": ("load", [drop(SPIN), drop("@!%p1 bra WAIT;"), drop(READ)],
                          "a block ends with a TMA load or a product in flight", "ret;"),
    "tensor: no wait": ("tensor", [drop("    @!%p2 bra WAIT;\n"), (STORED + "\n    bar", "bar")],
                        "still written by a product", "tcgen05.ld"),
    "tensor: freed too early": ("tensor", [(COMMIT, COMMIT + "\nbar.sync 0; @%p3 bra FREED; tcgen05.dealloc"
                                            ".cta_group::1.sync.aligned.b32 %r4, 32; // early\n")],
                                "tcgen05.dealloc while a product or a commit is in flight", "// early"),
}  # fmt: skip


def check(fault, order):
    name, changes, what, at = fault
    text = KERNELS[name]
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    finds(what, text, at=at, order=order, options={"strict": True}, **given(name))


@pytest.mark.parametrize("order", WHENS)
@pytest.mark.parametrize("fault", FAULTS)
def test_is_found_in_every_order(fault, order):
    check(FAULTS[fault], order)


@pytest.mark.parametrize("order", WHENS)
def test_one_warp_may_fence_for_all_after_a_barrier(order):
    first = "bar.sync 0; // first\n"
    text = STORE.replace(FENCE, "").replace(first, first + ONE_FENCE)
    launch(text, order=order, **given("store"))


@pytest.mark.parametrize("fault", ONLY_LATE)
def test_is_found_late(fault):
    check(ONLY_LATE[fault], ORDERS[0])


# ---- mbarriers and clusters used wrongly, in short kernels

GATE = """.shared .align 128 .b8 room[128]; .shared .align 8 .b8 gate[8];
    mov.u32 %r8, room; mov.u32 %r2, gate; setp.eq.u32 %p0, %lane, 0; mov.u32 %r9, %cluster_ctarank;
"""
ONE = "@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;\n"
BOTH = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n"
MISUSES = {
    "an mbarrier for 0 arrivals": ("@%p0 mbarrier.init.shared::cta.b64 [%r2], 0; // here", 1),
    "no mbarrier at shared offset 128": ("@%p0 mbarrier.arrive.shared::cta.b64 _, [%r2]; // here", 1),
    "an mbarrier that still expects bytes is invalidated": (
        f"{ONE}@%p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 16;\n"
        "@%p0 mbarrier.inval.shared::cta.b64 [%r2]; // here", 1),
    "lanes of one warp wait for different phases: not modelled": (
        f"{ONE}and.b32 %r3, %lane, 1;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], %r3; // here", 1),
    "a shared address of block 5 in a cluster of 2": (
        f"{ONE}{BOTH} mapa.shared::cluster.u32 %r3, %r2, 5;\n"
        "@%p0 mbarrier.arrive.shared::cluster.b64 _, [%r3]; // here", 2),
    "a load in another block's shared memory is not modelled": (
        f"xor.b32 %r9, %r9, 1; {BOTH} mapa.shared::cluster.u32 %r3, %r2, %r9;\n"
        "ld.shared::cluster.b32 %r4, [%r3]; // here", 2),
    "the mbarrier at shared offset 128 is used, not ordered after its init by warp 0": (
        f"{ONE}setp.ne.u32 %p1, %r9, 0; mapa.shared::cluster.u32 %r3, %r2, 0;\n"
        "@%p1 mbarrier.arrive.shared::cluster.b64 _, [%r3]; // here", 2),
    "TMA multicast to blocks 4 of a cluster of 2": (
        f"{ONE}{BOTH} mov.b64 %d4, box; cvta.param.u64 %d4, %d4; mov.b16 %h0, 4; mov.b32 %r3, 0;\n"
        "@%p0 cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%r8], [%d4, {%r3}], [%r2], %h0; // here", 2),
}  # fmt: skip


@pytest.mark.parametrize("what", MISUSES)
def test_a_misuse_is_found(what):
    body, blocks = MISUSES[what]
    more = {"maps": given("load")["maps"], "x": given("load")["x"]} if "multicast" in body else {}
    finds(what, GATE + body, grid=blocks, options={"cluster": (blocks, 1, 1)}, warp=0, **more)


def test_an_mbarrier_is_initialised_again_after_its_end():
    launch(f"{GATE}{ONE}@%p0 mbarrier.inval.shared::cta.b64 [%r2];\n{ONE}")
