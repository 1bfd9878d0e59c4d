"""Matrices: ldmatrix and stmatrix, mma.sync, wgmma, tcgen05, against NumPy."""

import numpy as np
import pytest
from ptx_kernels import ORDERS, WHENS, aligned, launch
from ptx_layouts import (
    close,
    descriptor,
    fragment_a,
    fragment_b,
    fragment_d,
    gathered,
    image,
    numbers,
    scattered,
)

from fusedmlp.bench.gate.ptx.library import machine


def listed(register, first, count):
    return ", ".join(f"%{register}{k}" for k in range(first, first + count))


# ---- ldmatrix, stmatrix


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("what", ["ldmatrix", "stmatrix"])
def test_matrices_of_8_by_8(what, count, turned):
    """Rows lie in no order; each lane's own address is row lane % 8 of matrix lane / 8."""
    x = np.random.default_rng(0).integers(0, 1 << 16, (32, 8), np.uint16)
    row_of = (5 * np.arange(32) + 3) % 32
    tiles = x[row_of].reshape(4, 8, 8)[:count]
    held = tiles.transpose(0, 2, 1) if turned else tiles
    registers = np.array([[held[k, n // 4, 2 * (n % 4) : 2 * (n % 4) + 2] for n in range(32)]
                          for k in range(count)]).view(np.uint32)[..., 0]  # fmt: skip
    op = f"{what}.sync.aligned.m8n8.x{count}{'.trans' if turned else ''}.shared.b16"
    vector, quad = f"{{{listed('r', 10, count)}}}", f"{{{listed('r', 30, 4)}}}"
    code = """.shared .align 16 .b8 room[512]; mov.u32 %r8, room; mad.lo.u32 %r1, %lane, 16, %r8;
        mad.lo.u32 %r2, %lane, 5, 3; and.b32 %r2, %r2, 31; mad.lo.u32 %r2, %r2, 16, %r8;
        mul.wide.u32 %d0, %lane, 16; mul.wide.u32 %d1, %lane, 4; add.s64 %d2, %d0, %x;
        add.s64 %d3, %d1, %x; add.s64 %d4, %d0, %out; add.s64 %d5, %d1, %out;"""
    if what == "ldmatrix":
        out = np.zeros((count, 32), np.uint32)
        code += f"""ld.global.v4.b32 {quad}, [%d2]; st.shared.v4.b32 [%r1], {quad}; bar.sync 0;
            {op} {vector}, [%r2];"""
        code += "".join(f"st.global.b32 [%d5+{128 * k}], %r{10 + k};" for k in range(count))
        launch(code, x=x, out=out)
        assert (out == registers).all()
        return
    out = np.zeros_like(x)
    code += "".join(f"ld.global.b32 %r{10 + k}, [%d3+{128 * k}];" for k in range(count))
    code += f"""st.shared.v4.b32 [%r1], {{0, 0, 0, 0}}; bar.sync 0;
        {op} [%r2], {vector}; bar.sync 0;
        ld.shared.v4.b32 {quad}, [%r1]; st.global.v4.b32 [%d4], {quad};"""
    launch(code, x=np.ascontiguousarray(registers), out=out)
    expected = np.zeros_like(x)
    expected[row_of[: 8 * count]] = x[row_of[: 8 * count]]
    assert (out == expected).all()


# ---- mma.sync

MMA = sorted(n for n in machine().ptx_names().decode().split() if n.startswith("mma."))


@pytest.mark.parametrize("order", WHENS)
@pytest.mark.parametrize("name", MMA)
def test_mma(name, order):
    _, shape, kind = name.split(".")
    depth, each = int(shape.rpartition("k")[2]), 1 if kind == "tf32" else 2
    a, a_values = numbers(kind, (16, depth), 1)
    b, b_values = numbers(kind, (8, depth), 2)
    c = np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32)
    na, nb = depth // (2 * each), depth // (4 * each)
    full = f"{shape}.tf32" if kind == "tf32" else shape
    x = np.concatenate([
        gathered(a, lambda lane, i: fragment_a(full, lane, i), na),
        gathered(b.T.copy(), lambda lane, i: fragment_b(full, lane, i), nb),
        gathered(c.view(np.uint32), fragment_d, 4),
    ])  # fmt: skip
    out = np.zeros((4, 32), np.uint32)
    code = "mul.wide.u32 %d0, %lane, 4; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %out;"
    code += "".join(f"ld.global.b32 %r{10 + k}, [%d1+{128 * k}];" for k in range(len(x)))
    code += f"""mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32
        {{{listed("r", 30, 4)}}}, {{{listed("r", 10, na)}}}, {{{listed("r", 10 + na, nb)}}},
        {{{listed("r", 10 + na + nb, 4)}}};"""
    code += "".join(f"st.global.b32 [%d2+{128 * k}], %r{30 + k};" for k in range(4))
    launch(code, x=x, out=out, order=order)
    assert close(scattered(out, 16, 8), a_values, b_values, c)


# ---- operands in shared memory

FILL = """.shared .align 1024 .b8 room[{size}];
    mov.u32 %r8, room; mov.u32 %r3, %tid; cvt.u64.u32 %d9, %r8; shr.u64 %d9, %d9, 4;
    FILL: mad.lo.u32 %r1, %r3, 16, %r8; mul.wide.u32 %d1, %r3, 16; add.s64 %d1, %d1, %x;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1]; st.shared.v4.b32 [%r1], {{%r4, %r5, %r6, %r7}};
    add.s32 %r3, %r3, 128; setp.lt.u32 %p0, %r3, {chunks}; @%p0 bra FILL;
    fence.proxy.async.shared::cta; bar.sync 0;
"""


def shared(*layouts):
    """(PTX that fills shared memory, the array it takes, where each layout begins)."""
    places, parts, at = [], [], 0
    for data, *_ in layouts:
        places.append(at)
        parts += [data, np.zeros(-data.size % 1024, np.uint8)]
        at += data.size + parts[-1].size
    x = aligned(at, np.uint8)
    x[:] = np.concatenate(parts)
    return FILL.format(size=at, chunks=at // 16), x, places


CANONICAL = [(mode, inner) for mode in range(4) for inner in (False, True)]
WGMMA = [
    (kind, a, b)
    for kind in ("bf16", "f16", "tf32")
    for a in [*CANONICAL, None]
    for b in CANONICAL
    if kind != "tf32" or not (b[1] or a and a[1])  # only 16-bit types may be transposed
]


@pytest.mark.parametrize("kind, a_layout, b_layout", WGMMA)
def test_wgmma(kind, a_layout, b_layout):
    """Twice the product: the second adds to the first. None: A in registers."""
    check_wgmma(kind, a_layout, b_layout, 64, ORDERS[0])


@pytest.mark.parametrize("order", WHENS)
@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_wgmma_of_any_width(n, order):
    check_wgmma("bf16", (3, False), (0, False), n, order)


def check_wgmma(kind, a_layout, b_layout, n, order):
    depth = 8 if kind == "tf32" else 16
    a, a_values = numbers(kind, (64, depth), 1)
    b, b_values = numbers(kind, (n, depth), 2)
    b_image = image(b, *b_layout)
    a_image = image(a, *(a_layout or (0, False)))
    fill, x, (a_at, b_at) = shared(a_image, b_image)
    first = np.array([gathered(a[16 * w : 16 * w + 16], _a_place(kind), 4) for w in range(4)])
    out = np.zeros((4, n // 2, 32), np.uint32)
    turned = [int(layout[1]) for layout in (a_layout, b_layout) if layout]
    signs = ", ".join(map(str, [1, 1, *(turned if kind != "tf32" else [])]))
    if a_layout:
        of_a = "%d2"
        get_a = f"add.s64 %d2, %d9, {descriptor(a_image, a_layout[0], a_at)};"
    else:
        of_a = "{%r10, %r11, %r12, %r13}"
        get_a = "mad.lo.u32 %r9, %warp, 512, 0; mad.lo.u32 %r9, %lane, 4, %r9;"
        get_a += "cvt.u64.u32 %d4, %r9; add.s64 %d4, %d4, %first;"
        get_a += "".join(f"ld.global.b32 %r{10 + k}, [%d4+{128 * k}];" for k in range(4))
    op = f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind}"
    products = "".join(f"{op} {{{listed('r', 100, n // 2)}}}, {of_a}, %d3, {p}, {signs};"
                       for p in ("%p1", "%p2"))  # fmt: skip
    code = f"""{fill} {get_a} add.s64 %d3, %d9, {descriptor(b_image, b_layout[0], b_at)};
        mov.pred %p1, 0; mov.pred %p2, 1;
        wgmma.fence.sync.aligned; {products}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mad.lo.u32 %r9, %warp, {64 * n}, 0; mad.lo.u32 %r9, %lane, 4, %r9;
        cvt.u64.u32 %d5, %r9; add.s64 %d5, %d5, %out;"""
    code += "".join(f"st.global.b32 [%d5+{128 * k}], %r{100 + k};" for k in range(n // 2))
    launch(code, threads=128, x=x, first=first, out=out, order=order)
    got = np.concatenate([scattered(registers, 16, n) for registers in out])
    assert close(got, 2 * a_values, b_values, depth=4 * depth)


def _a_place(kind):
    """A wgmma's A in registers lies as that of mma.sync."""
    shape = "m16n8k8.tf32" if kind == "tf32" else "m16n8k16"
    return lambda lane, i: fragment_a(shape, lane, i)


# ---- tcgen05

ALLOCATE = """.shared .align 8 .b8 gate[8]; .shared .align 4 .b8 base[4];
    mov.u32 %r20, gate; mov.u32 %r21, base; setp.eq.u32 %p5, %tid, 0; setp.ne.u32 %p6, %warp, 0;
    @%p6 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r21], {columns};
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    ALLOCATED: @%p5 mbarrier.init.shared::cta.b64 [%r20], 1;
    bar.sync 0; ld.shared.b32 %r22, [%r21]; mad.lo.u32 %r23, %warp, 2097152, %r22;
"""
FREE = """bar.sync 0; @%p6 bra FREED;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r22, {columns};
    FREED: mov.b32 %r9, 0;
"""


@pytest.mark.parametrize("kind, rows", [("bf16", 128), ("f16", 64)])
@pytest.mark.parametrize("a_layout", CANONICAL)
@pytest.mark.parametrize("b_layout", CANONICAL)
def test_tcgen05_mma(kind, a_layout, b_layout, rows):
    check_tcgen05(kind, a_layout, b_layout, rows, ORDERS[0])


@pytest.mark.parametrize("order", ORDERS[1:], ids=lambda order: order.when)
def test_tcgen05_mma_in_other_orders(order):
    check_tcgen05("bf16", (3, True), (2, False), 128, order)


def check_tcgen05(kind, a_layout, b_layout, rows, order):
    n, depth, columns = 64, 16, 64
    a, a_values = numbers(kind, (rows, depth), 1)
    b, b_values = numbers(kind, (n, depth), 2)
    a_image, b_image = image(a, *a_layout), image(b, *b_layout)
    fill, x, (a_at, b_at) = shared(a_image, b_image)
    out = np.zeros((128, n), np.float32)
    code = int(kind == "bf16")
    shape = 1 << 4 | code << 7 | code << 10 | a_layout[1] << 15 | b_layout[1] << 16
    shape |= n // 8 << 17 | rows // 16 << 24
    mma = "@%p5 tcgen05.mma.cta_group::1.kind::f16 [%r22], %d2, %d3, %r24,"
    text = f"""{fill} {ALLOCATE.format(columns=columns)} mov.b32 %r24, {shape};
        add.s64 %d2, %d9, {descriptor(a_image, a_layout[0], a_at, tensor=True)};
        add.s64 %d3, %d9, {descriptor(b_image, b_layout[0], b_at, tensor=True)};
        mov.pred %p1, 0; mov.pred %p2, 1; {mma} %p1; {mma} %p2;
        @%p5 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r20];
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r20], 0; @!%p4 bra WAIT;
        tcgen05.fence::after_thread_sync;
        tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {{{listed("r", 100, n)}}}, [%r23];
        tcgen05.wait::ld.sync.aligned;
        mul.wide.u32 %d5, %tid, {4 * n}; add.s64 %d5, %d5, %out;"""
    text += "".join(f"st.global.b32 [%d5+{4 * k}], %r{100 + k};" for k in range(n))
    text += FREE.format(columns=columns)
    launch(text, threads=128, x=x, out=out, order=order, options={"strict": True})
    lanes = np.arange(rows) if rows == 128 else 32 * (np.arange(64) // 16) + np.arange(64) % 16
    assert close(out[lanes], 2 * a_values, b_values, depth=4 * depth)


@pytest.mark.parametrize("half", [None, 16, 32, "matrix"])
def test_tensor_memory_holds_what_is_stored(half):
    """Stored by 32 lanes of a warp; read so, or by 16 lanes, two columns of each `half` apart, or
    as an mma's result lies: four registers of 16 lanes and 8 columns."""
    x = np.random.default_rng(4).integers(0, 1 << 32, (128, 64), np.uint32)
    out = np.zeros((128, 16), np.uint32)
    shape, offset = ("32x32b", "") if half is None else ("16x32bx2", f", {half}")
    shape, offset = ("16x256b", "") if half == "matrix" else (shape, offset)
    count = 4 if half == "matrix" else 16
    text = f"""{ALLOCATE.format(columns=64)}
        mul.wide.u32 %d1, %tid, 256; add.s64 %d1, %d1, %x; mul.wide.u32 %d2, %tid, 64;
        add.s64 %d2, %d2, %out;"""
    text += "".join(f"ld.global.b32 %r{100 + k}, [%d1+{4 * k}];" for k in range(64))
    text += f"""tcgen05.st.sync.aligned.32x32b.x64.b32 [%r23], {{{listed("r", 100, 64)}}};
        tcgen05.wait::st.sync.aligned;
        tcgen05.ld.sync.aligned.{shape}.x{count}.b32 {{{listed("r", 200, 16)}}}, [%r23+4]{offset};
        tcgen05.wait::ld.sync.aligned;"""
    text += "".join(f"st.global.b32 [%d2+{4 * k}], %r{200 + k};" for k in range(16))
    launch(text + FREE.format(columns=64), threads=128, x=x, out=out)
    if half == "matrix":
        t, k = np.arange(128)[:, None] % 32, np.arange(16)
        rows = np.arange(128)[:, None] // 32 * 32 + t // 4 + 8 * (k // 2 % 2)
        assert (out == x[rows, 4 + 8 * (k // 4) + 2 * (t % 4) + k % 2]).all()
        return
    for lane in range(128):
        row, column = lane, 4
        if half is not None:
            row, column = lane // 32 * 32 + lane % 16, 4 + (half if lane % 32 >= 16 else 0)
        assert (out[lane] == x[row, column : column + 16]).all()
