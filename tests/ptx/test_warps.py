"""What lanes do together, and how they part: exchanges, branches, barriers."""

import numpy as np
import pytest
from ptx_kernels import ORDERS, STORE, WHENS, lanes, launch, loaded, only

from fusedmlp.bench.gate.ptx.library import machine, operands_of

RANDOM = np.random.default_rng
MASKS = (0xFFFFFFFF, 0x0F0F00FF, 0x80000001)
# ---- exchanges


def shuffled(mode, x, by, c, mask):
    """The pseudocode of shfl.sync: result and predicate of the lanes in the mask."""
    clamp, segment = c & 31, c >> 8 & 31
    result, inside = np.full(32, 0xAAAA, np.uint32), np.zeros(32, bool)
    for lane in (k for k in range(32) if mask >> k & 1):
        low = lane & segment
        high = low | clamp & ~segment & 31
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by,
                  "idx": low | by & ~segment & 31}[mode]  # fmt: skip
        inside[lane] = source >= high if mode == "up" else source <= high
        result[lane] = x[source if inside[lane] else lane]
    return result, inside


@pytest.mark.parametrize("c", [0x1F, 0, 0x181F, 0x1C1F, 0x1800, 0x1E1F, 0x100F])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, c):
    x = RANDOM(0).integers(0, 1 << 32, 32, np.uint32)
    for by in (0, 1, 5, 16, 31):
        result, inside = shuffled(mode, x, by, c, 0xFFFFFFFF)
        code = f"{loaded()} shfl.sync.{mode}.b32 %r0|%p0, %r1, {by}, {c}, 0xffffffff;"
        assert (lanes(code, x=x) == result).all()
        assert (lanes(code + "selp.b32 %r0, 1, 0, %p0;", x=x) == inside).all()


def test_shfl_of_some_lanes_leaves_the_others():
    x = RANDOM(0).integers(0, 1 << 32, 32, np.uint32)
    code = f"{loaded()} {only(0x00FF)} @%p9 shfl.sync.bfly.b32 %r0, %r1, 3, 31, 0xff;"
    assert (lanes(code, x=x) == shuffled("bfly", x, 3, 31, 0xFF)[0]).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("yes", [0, 1 << 31, 0x0F0F00FF, 0xFFFFFFFF])
def test_vote(mask, yes):
    here = np.array([mask >> k & 1 for k in range(32)], bool)
    test = f"shr.u32 %r1, {yes}, %lane; and.b32 %r1, %r1, 1; setp.ne.s32 %p1, %r1, 0; {only(mask)}"
    for mode, value in (("any", yes & mask != 0), ("all", yes & mask == mask)):
        code = f"@%p9 vote.sync.{mode}.pred %p2, %p1, {mask}; @%p9 selp.b32 %r0, 1, 0, %p2;"
        assert (lanes(test + code) == np.where(here, value, 0xAAAA)).all()
    code = f"@%p9 vote.sync.ballot.b32 %r0, %p1, {mask};"
    assert (lanes(test + code) == np.where(here, yes & mask, 0xAAAA)).all()


FOLDS = {
    "add": np.add.reduce, "max": np.max, "min": np.min, "or": np.bitwise_or.reduce,
    "and": np.bitwise_and.reduce, "xor": np.bitwise_xor.reduce,
}  # fmt: skip
REDUX = [n for n in sorted(machine().ptx_names().decode().split()) if n.startswith("redux")]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", REDUX)
def test_redux(name, mask):
    _, op, kind = name.split(".")
    typed = {"s32": np.int32, "f32": np.float32}.get(kind, np.uint32)
    x = RANDOM(1).integers(0, 1 << 32, 32, np.uint32)
    if kind == "f32":
        x = RANDOM(1).normal(size=32).astype(np.float32)
        x[3] = np.nan
    here = np.array([mask >> k & 1 for k in range(32)], bool)
    picked = x[here].view(typed)
    with np.errstate(all="ignore"):
        value = FOLDS[op](picked[picked == picked]).astype(typed).view(np.uint32)
    synced = name.replace("redux", "redux.sync")
    got = lanes(f"{loaded()} {only(mask)} @%p9 {synced} %r0, %r1, {mask};", x=x.view(np.uint32))
    assert (got == np.where(here, value, 0xAAAA)).all()


@pytest.mark.parametrize("mask", MASKS)
def test_match_and_elect(mask):
    x = RANDOM(2).integers(0, 5, 32, np.uint32)
    here = np.array([mask >> k & 1 for k in range(32)], bool)
    equal = [sum(1 << o for o in range(32) if here[o] and x[o] == x[k]) for k in range(32)]
    got = lanes(f"{loaded()} {only(mask)} @%p9 match.any.sync.b32 %r0, %r1, {mask};", x=x)
    assert (got == np.where(here, equal, 0xAAAA)).all()
    leader = int(np.flatnonzero(here)[0])
    code = f"{only(mask)} mov.pred %p1, 0; @%p9 elect.sync %r0|%p1, {mask};"
    assert (lanes(code) == np.where(here, leader, 0xAAAA)).all()
    elected = lanes(code + "selp.b32 %r0, 1, 0, %p1;")
    assert elected.tolist() == [int(k == leader) for k in range(32)]


# ---- branches

NESTED = """
    mov.b32 %r0, 0;
    setp.lt.u32 %p1, %lane, 20; @!%p1 bra OUTER_ELSE;
    add.s32 %r0, %r0, 1;
    and.b32 %r1, %lane, 1; setp.eq.s32 %p2, %r1, 0; @%p2 bra EVEN;
    add.s32 %r0, %r0, 10; bra INNER_END;
EVEN: add.s32 %r0, %r0, 100;
INNER_END: add.s32 %r0, %r0, 1000; bra OUTER_END;
OUTER_ELSE: add.s32 %r0, %r0, 2;
OUTER_END: vote.sync.ballot.b32 %r2, %p1, 0xffffffff; add.s32 %r0, %r0, %r2;
"""


def test_nested_branches_meet_again():
    """The vote at the end needs all 32 lanes."""
    ballot = (1 << 20) - 1
    one = [(1001 + (10 if k & 1 else 100) if k < 20 else 2) + ballot for k in range(32)]
    assert lanes(NESTED).tolist() == one


LOOP = """
    mov.b32 %r0, 0; mov.b32 %r1, 0; and.b32 %r3, %lane, 7;
OUTER: mov.b32 %r2, 0;
INNER: add.s32 %r0, %r0, 1; add.s32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, %r3; @%p1 bra INNER;
    add.s32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, %lane; @%p2 bra OUTER;
    vote.sync.ballot.b32 %r4, %p1, 0xffffffff; add.s32 %r0, %r0, %r4;
"""


def test_loops_of_different_trip_counts():
    assert lanes(LOOP).tolist() == [max(k, 1) * max(k & 7, 1) for k in range(32)]


def test_lanes_that_return_early_are_not_waited_for():
    out = np.zeros(32, np.uint32)
    launch(
        f"""{only(0x00FF00FF)} @!%p9 ret; mov.pred %p1, 1;
        vote.sync.ballot.b32 %r0, %p1, 0xffffffff; bar.sync 0; {STORE}""",
        out=out,
    )
    assert out.tolist() == [0x00FF00FF if 0x00FF00FF >> k & 1 else 0 for k in range(32)]


def test_an_early_return_inside_of_a_branch():
    code = """setp.lt.u32 %p1, %lane, 8; @!%p1 bra REST;
    setp.lt.u32 %p2, %lane, 4; @%p2 ret; mov.b32 %r0, 1; bra END;
    REST: mov.b32 %r0, 2;
    END: add.s32 %r0, %r0, 10;"""
    assert lanes(code).tolist() == [0] * 4 + [11] * 4 + [12] * 24


# ---- barriers


@pytest.mark.parametrize("order", WHENS)
def test_bar_sync_orders_what_warps_wrote(order):
    """Each warp reads what the next one wrote, round after round."""
    out = np.zeros(128, np.uint32)
    launch(
        """.shared .align 4 .b8 room[512];
        mov.u32 %r8, room; mad.lo.u32 %r1, %tid, 4, %r8;
        add.s32 %r2, %tid, 32; and.b32 %r2, %r2, 127; mad.lo.u32 %r2, %r2, 4, %r8;
        mov.b32 %r0, %tid; mov.b32 %r3, 0;
        AGAIN: st.shared.b32 [%r1], %r0; bar.sync 0;
        ld.shared.b32 %r0, [%r2]; bar.sync 0;
        add.s32 %r3, %r3, 1; setp.lt.u32 %p0, %r3, 3; @%p0 bra AGAIN;
        mul.wide.u32 %d0, %tid, 4; add.s64 %d0, %d0, %out; st.global.b32 [%d0], %r0;""",
        threads=128, out=out, order=order,
    )  # fmt: skip
    assert out.tolist() == [(k + 96) % 128 for k in range(128)]


PIPE = """.shared .align 4 .b8 room[128];
    mov.u32 %r8, room; mad.lo.u32 %r1, %lane, 4, %r8; setp.ne.u32 %p0, %warp, 0;
    mov.b32 %r3, 0; mov.b32 %r0, 0; @%p0 bra CONSUME;
PRODUCE: bar.sync 2, 64; add.s32 %r0, %r0, %tid; st.shared.b32 [%r1], %r0; bar.arrive 1, 64;
    add.s32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 3; @%p1 bra PRODUCE; bra END;
CONSUME: bar.arrive 2, 64; bar.sync 1, 64; ld.shared.b32 %r2, [%r1]; add.s32 %r0, %r0, %r2;
    add.s32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 3; @%p1 bra CONSUME;
    mul.wide.u32 %d0, %lane, 4; add.s64 %d0, %d0, %out; st.global.b32 [%d0], %r0;
END: bar.sync 0;"""


@pytest.mark.parametrize("order", WHENS)
def test_named_barriers_make_a_pipe(order):
    out = np.zeros(32, np.uint32)
    launch(PIPE, threads=64, out=out, order=order)
    assert out.tolist() == [6 * k for k in range(32)]


@pytest.mark.parametrize("order", WHENS)
def test_a_cluster_meets_and_arrives_at_each_others_mbarriers(order):
    """Block 0 waits for both blocks' arrivals; mapa gives its mbarrier's address to the other."""
    out = np.zeros(2, np.uint32)
    launch(
        """.shared .align 8 .b8 gate[8];
        mov.u32 %r1, gate; setp.eq.u32 %p0, %tid, 0; mov.u32 %r2, %cluster_ctarank;
        @%p0 mbarrier.init.shared::cta.b64 [%r1], 2;
        barrier.cluster.arrive.aligned; bar.sync 0; barrier.cluster.wait.aligned;
        mapa.shared::cluster.u32 %r3, %r1, 0;
        @%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];
        setp.ne.u32 %p1, %r2, 0; @%p1 bra END;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra WAIT;
        END: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
        mul.wide.u32 %d0, %r2, 4; add.s64 %d0, %d0, %out; add.s32 %r0, %r2, 7;
        @%p0 st.global.b32 [%d0], %r0;""",
        grid=2, threads=64, out=out, order=order, options={"cluster": (2, 1, 1)},
    )  # fmt: skip
    assert out.tolist() == [7, 8]


@pytest.mark.parametrize("order", WHENS)
def test_an_mbarrier_goes_through_its_phases(order):
    """A ring of one place: the producer waits until it is empty, the consumer until it is full."""
    out = np.zeros(32, np.uint32)
    launch(
        """.shared .align 8 .b8 full[8]; .shared .align 8 .b8 empty[8];
        .shared .align 4 .b8 room[128];
        mov.u32 %r8, room; mad.lo.u32 %r1, %lane, 4, %r8; mov.u32 %r5, full; mov.u32 %r6, empty;
        setp.eq.u32 %p0, %tid, 0; @%p0 mbarrier.init.shared::cta.b64 [%r5], 32;
        @%p0 mbarrier.init.shared::cta.b64 [%r6], 1; bar.sync 0;
        mov.b32 %r0, 0; mov.b32 %r3, 0; setp.eq.u32 %p3, %lane, 0;
        AGAIN: and.b32 %r4, %r3, 1; setp.ne.u32 %p1, %warp, 0; @%p1 bra CONSUME;
        xor.b32 %r7, %r4, 1;
        FREE: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r6], %r7; @!%p2 bra FREE;
        mad.lo.u32 %r2, %r3, 100, %lane; st.shared.b32 [%r1], %r2;
        mbarrier.arrive.shared::cta.b64 _, [%r5]; bra NEXT;
        CONSUME:
        FULL: mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], %r4; @!%p2 bra FULL;
        ld.shared.b32 %r2, [%r1]; add.s32 %r0, %r0, %r2;
        @%p3 mbarrier.arrive.shared::cta.b64 _, [%r6];
        NEXT: add.s32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 5; @%p2 bra AGAIN;
        @!%p1 bra END; mul.wide.u32 %d0, %lane, 4; add.s64 %d0, %d0, %out;
        st.global.b32 [%d0], %r0;
        END: bar.sync 0; @%p0 mbarrier.inval.shared::cta.b64 [%r5];""",
        threads=64, out=out, order=order,
    )  # fmt: skip
    assert out.tolist() == [1000 + 5 * k for k in range(32)]


def test_orders_leave_a_kernel_without_faults_as_it_is():
    outs = []
    for order in ORDERS:
        outs.append(np.zeros(32, np.uint32))
        launch(PIPE, threads=64, out=outs[-1], order=order)
    assert all((out == outs[0]).all() for out in outs)


WHERE = {
    "test_warps.py": "shfl vote redux match elect bra ret bar.sync bar.arrive cluster mbarrier",
    "test_memory.py": "ld st atom cp",
    "test_lanes.py": "pack unpack",
    "test_matrices.py": "ldmatrix stmatrix mma wgmma tcgen05 tma fence.proxy nothing",
    "test_findings.py": "trap bar.warp",
}


def test_every_instruction_of_warps_has_its_file():
    known = tuple(n for names in WHERE.values() for n in names.split())
    names = machine().ptx_names().decode().split()
    assert not [n for n in names if operands_of(n) == "" and not n.startswith(known)]
