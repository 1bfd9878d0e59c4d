"""TMA: boxes of one to five dimensions, at every edge, with every swizzle, both ways."""

import numpy as np
import pytest
from ptx_kernels import WHENS, aligned, finds, launch
from ptx_layouts import BYTES, chunks_moved

from fusedmlp.bench.gate.ptx.tensor_map import TensorMap

SIZES = (40, 5, 4, 3, 2)  # of the tensor, the innermost dimension first
BOX = (16, 3, 2, 2, 2)

LOAD = """.shared .align 1024 .b8 room[{room}]; .shared .align 8 .b8 gate[8];
    mov.u32 %r8, room; mov.u32 %r1, gate; setp.eq.u32 %p0, %tid, 0;
    mov.b64 %d4, box; cvta.param.u64 %d4, %d4;
    @%p0 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {bytes};
    @%p0 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
        [%r8], [%d4, {{{at}}}], [%r1];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0; @!%p1 bra WAIT;
"""
# All bytes of the box, 16 of a lane at a time.
DUMP = """mov.u32 %r3, %lane;
    DUMP: setp.ge.u32 %p2, %r3, {chunks}; @%p2 bra DUMPED;
    mad.lo.u32 %r2, %r3, 16, %r8; mul.wide.u32 %d1, %r3, 16; add.s64 %d1, %d1, %out;
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2]; st.global.v4.b32 [%d1], {{%r4, %r5, %r6, %r7}};
    add.s32 %r3, %r3, 32; bra DUMP;
    DUMPED:
"""
STORE = """mov.b64 %d5, other; cvta.param.u64 %d5, %d5;
    @%p0 cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group
        [%d5, {{{at}}}], [%r8];
    @%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group 0;
"""


def made(sizes, dtype=np.uint16, seed=0):
    """Random elements; a row of the innermost dimension takes a multiple of 16 bytes."""
    shape = sizes[::-1]
    pad = -shape[-1] * np.dtype(dtype).itemsize % 16 // np.dtype(dtype).itemsize
    held = aligned((*shape[:-1], shape[-1] + pad), dtype)
    held[...] = np.random.default_rng(seed).integers(1, 200, held.shape)
    return held


def mapped(array, sizes, box, swizzle, nan=False):
    """How a tensor map over `array` is made once its address is known."""
    strides = array.strides[::-1][1 : len(sizes)]
    floating = array.dtype != np.uint8
    return lambda at: TensorMap(at, sizes, strides, box, array.itemsize, swizzle, nan, floating)


def expected_box(array, sizes, box, at, fill=0):
    """The box as an array of its own, `fill` outside of the tensor."""
    out = np.full(box[::-1], fill, array.dtype)
    for index in np.ndindex(*out.shape):
        where = [i + c for i, c in zip(index, reversed(at), strict=True)]
        if all(0 <= w < n for w, n in zip(where, reversed(sizes), strict=True)):
            out[index] = array[tuple(where)]
    return out


def corners(rank):
    """Inside; over the far edge; before the near one, in one dimension and in all."""
    inside = [1] * rank
    far = [n - 1 for n in SIZES[:rank]]
    near = [1 - n for n in BOX[:rank]]
    mixed = [near[d] if d % 2 else far[d] for d in range(rank)]
    beyond = [*SIZES[: rank - 1], 5] if rank > 1 else [SIZES[0] + 3]
    return [inside, far, near, mixed, beyond]


@pytest.mark.parametrize("swizzle", range(4))
@pytest.mark.parametrize("rank", range(1, 6))
def test_a_box_is_loaded(rank, swizzle):
    """Coordinates of every corner; what lies outside is 0."""
    sizes = SIZES[:rank]
    box = (max(BYTES[swizzle], 32) // 2, *BOX[1:rank])
    x = made(sizes)
    for at in corners(rank):
        expected = expected_box(x, sizes, box, at)
        out = np.zeros(expected.nbytes, np.uint8)
        coordinates = ", ".join(map(str, at))
        code = LOAD.format(room=4096, bytes=expected.nbytes, rank=rank, at=coordinates)
        code += DUMP.format(chunks=expected.nbytes // 16)
        launch(code, x=x, out=out, maps={"box": ("x", mapped(x, sizes, box, swizzle))})
        rows = expected.view(np.uint8).reshape(-1, 2 * box[0])
        assert (out == chunks_moved(rows, BYTES[swizzle]).ravel()).all(), at


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64])
def test_elements_of_other_sizes(dtype):
    sizes, box, at = (48, 5), (16, 4), (36, 2)
    x = made(sizes, dtype)
    expected = expected_box(x, sizes, box, at)
    out = np.zeros(expected.nbytes, np.uint8)
    code = LOAD.format(room=1024, bytes=expected.nbytes, rank=2, at="36, 2")
    code += DUMP.format(chunks=expected.nbytes // 16)
    launch(code, x=x, out=out, maps={"box": ("x", mapped(x, sizes, box, 0))})
    assert (out == expected.view(np.uint8).ravel()).all()


def test_outside_may_read_as_nan():
    sizes, box = (40, 5), (16, 3)
    x = made(sizes)
    expected = expected_box(x, sizes, box, (30, 3), 0xFFFF)
    out = np.zeros(expected.nbytes, np.uint8)
    code = LOAD.format(room=1024, bytes=expected.nbytes, rank=2, at="30, 3")
    code += DUMP.format(chunks=expected.nbytes // 16)
    launch(code, x=x, out=out, maps={"box": ("x", mapped(x, sizes, box, 0, nan=True))})
    assert (out == expected.view(np.uint8).ravel()).all()


@pytest.mark.parametrize("order", WHENS)
@pytest.mark.parametrize("swizzle", range(4))
@pytest.mark.parametrize("rank", range(1, 6))
def test_a_box_goes_there_and_back(rank, swizzle, order):
    """What was loaded is stored to another tensor: its inside is the source's, its outside is left
    as it was, and padding between rows too."""
    sizes = SIZES[:rank]
    box = (max(BYTES[swizzle], 32) // 2, *BOX[1:rank])
    for at in corners(rank)[:4]:
        x, y = made(sizes), made(sizes, seed=1)
        expected = y.copy()
        loaded = expected_box(x, sizes, box, at)
        for index in np.ndindex(*loaded.shape):
            where = [i + c for i, c in zip(index, reversed(at), strict=True)]
            if all(0 <= w < n for w, n in zip(where, reversed(sizes), strict=True)):
                expected[tuple(where)] = loaded[index]
        coordinates = ", ".join(map(str, at))
        code = LOAD.format(room=4096, bytes=loaded.nbytes, rank=rank, at=coordinates)
        code += STORE.format(rank=rank, at=coordinates)
        maps = {"box": ("x", mapped(x, sizes, box, swizzle)),
                "other": ("y", mapped(y, sizes, box, swizzle))}  # fmt: skip
        launch(code, x=x, y=y, maps=maps, order=order, options={"elements": 2})
        assert (y == expected).all(), at


@pytest.mark.parametrize("order", WHENS)
def test_multicast_reaches_every_block_of_its_mask(order):
    """Each block of the cluster asks for half of the box, for both of them."""
    sizes, box = (16, 8), (16, 4)
    x = made(sizes)
    out = np.zeros((2, 256), np.uint8)
    launch(
        """.shared .align 1024 .b8 room[256]; .shared .align 8 .b8 gate[8];
        mov.u32 %r8, room; mov.u32 %r1, gate; setp.eq.u32 %p0, %tid, 0; mov.b64 %d4, box; cvta.param.u64 %d4, %d4;
        mov.u32 %r10, %cluster_ctarank; mov.b16 %h0, 3;
        @%p0 mbarrier.init.shared::cta.b64 [%r1], 1;
        @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256;
        barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
        mad.lo.u32 %r11, %r10, 128, %r8; mul.lo.u32 %r12, %r10, 4; mov.b32 %r13, 0;
        @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
            [%r11], [%d4, {%r13, %r12}], [%r1], %h0;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0; @!%p1 bra WAIT;
        mul.wide.u32 %d6, %r10, 256; add.s64 %out, %out, %d6;"""  # noqa: E501
        + DUMP.format(chunks=16)
        + "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
        grid=2, x=x, out=out, order=order, options={"cluster": (2, 1, 1)},
        maps={"box": ("x", mapped(x, sizes, box, 0))},
    )  # fmt: skip
    assert (out == x.view(np.uint8).reshape(1, 256)).all()


def test_a_row_wider_than_its_swizzle_is_found():
    """The driver refuses such a map; the machine does too, should one come another way."""
    sizes, box = (32, 5), (32, 2)
    x = made(sizes)
    code = LOAD.format(room=1024, bytes=128, rank=2, at="0, 0")
    finds("a box row of 64 bytes is wider than its swizzle", code, x=x,
          maps={"box": ("x", mapped(x, sizes, box, 1))})  # fmt: skip
