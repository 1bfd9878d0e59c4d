"""Loads, stores, atomics, and cp.async in every space, of every width."""

import mmap
import resource

import numpy as np
import pytest
import torch
from ptx_kernels import WHENS, Launch, aligned, lanes, launch, only

from fusedmlp.bench.gate.ptx import Finding, load
from fusedmlp.bench.gate.ptx.library import machine
from fusedmlp.bench.gate.ptx.memory import Fresh, Regions

RANDOM = np.random.default_rng

SPACES = {  # what is declared, and the register of the address
    "global": ("", "%d6"),
    "generic global": ("", "%d6"),
    "shared": (".shared .align 16 .b8 room[2048];", "%r9"),
    "generic shared": (".shared .align 16 .b8 room[2048];", "%d9"),
    "local": (".local .align 16 .b8 mine[64];", "%d8"),
    "generic local": (".local .align 16 .b8 mine[64];", "%d9"),
}
FIND = {
    "generic shared": "mov.u32 %r9, room; mad.lo.u32 %r9, %lane, 32, %r9; cvt.u64.u32 %d8, %r9;"
    "cvta.shared.u64 %d9, %d8;",
    "shared": "mov.u32 %r9, room; mad.lo.u32 %r9, %lane, 32, %r9;",
    "local": "mov.u64 %d8, mine;",
    "generic local": "mov.u64 %d8, mine; cvta.local.u64 %d9, %d8;",
}
WIDTHS = [(8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (64, 1),
          (64, 2)]  # fmt: skip
WIDEST = [(32, 8), (64, 4)]  # of global memory only


@pytest.mark.parametrize(
    "space, bits, count",
    [(space, *width) for space in SPACES for width in WIDTHS]
    + [("global", *width) for width in WIDEST],
)
def test_stores_and_loads(space, bits, count):
    """Loaded from global memory, stored to a space, loaded from there, stored to global memory."""
    declared, target = SPACES[space]
    x, middle, out = (aligned((32, 32), np.uint8) for _ in range(3))
    x[:] = RANDOM(3).integers(0, 256, x.shape)
    register = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits]
    first, second = ([f"{register}{k}" for k in range(n, n + count)] for n in (10, 20))
    shape = f".v{count}.b{bits}" if count > 1 else f".b{bits}"
    both = [f"{{{', '.join(v)}}}" if count > 1 else v[0] for v in (first, second)]
    where = "" if space.startswith("generic") else f".{space}"
    launch(
        f"""{declared} mul.wide.u32 %d0, %lane, 32; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %out;
        add.s64 %d6, %d0, %middle; {FIND.get(space, "")}
        ld.global{shape} {both[0]}, [%d1];
        st{where}{shape} [{target}], {both[0]};
        ld{where}{shape} {both[1]}, [{target}];
        st.global{shape} [%d2], {both[1]};""",
        x=x, middle=middle, out=out,
    )  # fmt: skip
    wide = bits * count // 8
    assert (out[:, :wide] == x[:, :wide]).all() and not out[:, wide:].any()


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "b16", "u32", "s32"])
def test_a_load_extends_to_its_register(kind):
    x = RANDOM(4).integers(0, 1 << 63, 32, np.uint64)
    out = np.zeros(32, np.uint64)
    launch(
        f"""mul.wide.u32 %d0, %lane, 8; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %out;
        ld.global.{kind} %d3, [%d1]; st.global.b64 [%d2], %d3;""",
        x=x, out=out,
    )  # fmt: skip
    typed = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    expected = x.view(np.uint8).reshape(32, 8)[:, : typed.itemsize].copy().view(typed)[:, 0]
    assert (out == expected.astype(np.int64).view(np.uint64)).all()


def test_parameters_and_constants():
    """A value parameter, its generic address, and an initialised array."""
    code = """ld.param.b32 %r1, [in_n]; mov.b64 %d1, in_n; cvta.param.u64 %d2, %d1;
    ld.b32 %r2, [%d2]; sub.s32 %r3, %r1, %r2; add.s32 %r0, %r3, %r1;"""
    assert (lanes(code, n=-5) == 0xFFFFFFFB).all()


def test_cvta_to_shared_and_back():
    code = """.shared .align 4 .b8 room[128]; mov.u64 %d1, room; cvta.shared.u64 %d2, %d1;
    cvta.to.shared.u64 %d3, %d2; sub.s64 %d4, %d3, %d1; cvt.u32.u64 %r0, %d4;"""
    assert not lanes(code).any()


ATOMICS = [n for n in sorted(machine().ptx_names().decode().split()) if n.startswith("atom.")]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name, space):
    """Eight lanes on each of four places: in the order of lanes. The mask leaves out a quarter."""
    _, op, kind = name.split(".")
    typed = np.dtype({"f32": "f4", "u64": "u8", "s32": "i4"}.get(kind, "u4"))
    x = RANDOM(5).integers(0, 1 << 31, 32).astype(typed)
    if op in ("cas", "exch"):
        x = (x % 3).astype(typed)
    start = np.array([5, 1, 2, 0], typed)
    places, olds = start.copy(), np.full(32, 0xAAAA).astype(typed)
    mask = 0x77777777 | 0xF
    apply = {"add": lambda o, v: o + v, "exch": lambda o, v: v, "max": max, "min": min,
             "cas": lambda o, v: v + 1 if o == v else o, "or": lambda o, v: o | v,
             "and": lambda o, v: o & v}[op]  # fmt: skip
    with np.errstate(all="ignore"):
        for lane in (k for k in range(32) if mask >> k & 1):
            olds[lane] = places[lane % 4]
            places[lane % 4] = apply(places[lane % 4], x[lane])
    size, bits = typed.itemsize, 8 * typed.itemsize
    value, old = ("%d4", "%d5") if size == 8 else ("%r4", "%r5")
    operand = f"{value}, {'%r6' if op == 'cas' else ''}".rstrip(", ")
    room = "%d6" if space == "global" else "%r7"
    given = {"x": x, "places": start.copy(), "out": np.zeros(32, typed)}
    launch(
        f""".shared .align 8 .b8 room[32];
        mul.wide.u32 %d0, %lane, {size}; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %out;
        and.b32 %r1, %lane, 3; mul.wide.u32 %d3, %r1, {size}; add.s64 %d6, %d3, %places;
        mov.u32 %r7, room; mad.lo.u32 %r7, %r1, {size}, %r7; setp.lt.u32 %p0, %lane, 4;
        ld.global.b{bits} {value}, [%d6]; @%p0 st.shared.b{bits} [%r7], {value};
        bar.sync 0;
        ld.global.b{bits} {value}, [%d1]; mov.b{bits} {old}, {olds[7].view(f"u{size}")};
        add.s32 %r6, %r4, 1; {only(mask)}
        @%p9 atom.{space}.{op}.{kind} {old}, [{room}], {operand};
        st.global.b{bits} [%d2], {old};
        bar.sync 0;
        @%p0 ld.{space}.b{bits} {value}, [{room}]; @%p0 st.global.b{bits} [%d6], {value};""",
        **given,
    )
    same = np.array_equal if kind != "f32" else np.allclose
    assert same(given["places"], places) and same(given["out"], olds)


def test_red_is_an_atomic_without_a_result():
    total = np.zeros(1, np.uint32)
    launch("red.global.add.u32 [%total], %tid;", threads=64, grid=3, total=total)
    assert total[0] == 3 * sum(range(64))


@pytest.mark.parametrize("order", WHENS)
@pytest.mark.parametrize("bytes_", [4, 8, 16])
def test_cp_async_copies_and_fills_with_zeros(bytes_, order):
    """Lanes read none to all of their bytes; the older of two groups is waited for first."""
    x = RANDOM(6).integers(1, 256, (64, 16), np.uint8)
    out = np.zeros_like(x)
    cache = "cg" if bytes_ == 16 else "ca"
    copy = f"cp.async.{cache}.shared.global"
    launch(
        f""".shared .align 16 .b8 room[1024];
        mov.u32 %r8, room; mad.lo.u32 %r1, %lane, 16, %r8; mul.wide.u32 %d0, %lane, 16;
        add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %out; rem.u32 %r2, %lane, {bytes_ + 1};
        {copy} [%r1], [%d1], {bytes_}, %r2; cp.async.commit_group;
        {copy} [%r1+512], [%d1+512], {bytes_}; cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r3, [%r1]; st.global.b32 [%d2], %r3;
        cp.async.wait_all;
        ld.shared.b32 %r3, [%r1+512]; st.global.b32 [%d2+512], %r3;""",
        x=x, out=out, order=order,
    )  # fmt: skip
    for lane in range(32):
        n = lane % (bytes_ + 1)
        assert out[lane, :4].tolist() == [*x[lane, : min(n, 4)], *[0] * (4 - min(n, 4))]
    assert (out[32:, :4] == x[32:, :4]).all()


# ---- tensors


def reads(t, byte, fresh=None):
    """What the machine says of a load of 4 bytes of a tensor; nothing where it is right."""
    regions = Regions(fresh)
    at = regions.tensor("t", t)
    text = Launch(f"ld.global.b32 %r0, [%x+{byte}];", {"x": np.zeros(1, np.uint32)}).text
    try:
        load(text).run((1,), [at.to_bytes(8, "little")], regions)
    except Finding as found:
        return found.what
    return ""


def test_a_fresh_tensor_knows_what_pytorch_wrote():
    fresh = Fresh()
    t = torch.empty(32, dtype=torch.int32)
    fresh.note(t)
    t[:16] = 7
    assert not reads(t, 60, fresh)
    assert reads(t, 64, fresh) == "global load: byte 64 of t, which nothing has written"
    assert reads(t[12:], 16, fresh) == "global load: byte 16 of t, which nothing has written"
    assert not reads(t, 64) and not reads(torch.zeros(32), 64, fresh)
    t[16] = 0
    assert not reads(t, 64, fresh)


def test_a_tensor_reaches_from_its_first_to_its_last_element():
    held = torch.zeros(4, 8)
    assert not reads(held[:3, :5], 4 * (2 * 8 + 4))
    assert reads(held[:3, :5], 4 * (2 * 8 + 5)).endswith("ends 4 bytes past the end of t")
    assert reads(held[1:], -4).endswith("begins 4 bytes before t")
    assert reads(held[:0], 0).endswith("past the end of t")
    assert not reads(held.T, 4 * 31) and reads(held.T, 4 * 32)
    assert not reads(held[:1].expand(4, 8), 4 * 7) and reads(held[:1].expand(4, 8), 4 * 8)


def test_what_lies_between_two_weights_costs_nothing():
    """One tensor map reaches both, wherever the host's memory has them."""
    apart = 1 << 28
    pages = mmap.mmap(-1, apart + 4096)
    both = torch.frombuffer(pages, dtype=torch.int32).as_strided((2, 8), (apart // 4, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not reads(both, 0) and not reads(both, apart + 4 * 7)
    assert reads(both, apart + 4 * 8).endswith("past the end of t")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
