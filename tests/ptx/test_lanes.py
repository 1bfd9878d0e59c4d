"""Every instruction that lanes carry out for themselves, against NumPy.

One kernel runs them all, on every pair of edge values and on random ones.
"""

import functools

import numpy as np
import pytest
from ptx_kernels import ORDERS, launch
from ptx_lanes import bound, comparison, conversion, floats, halves, integers, is_float
from ptx_numbers import F32, KINDS

from fusedmlp.bench.gate.ptx.library import machine, operands_of

NAMES = [n for n in sorted(machine().ptx_names().decode().split()) if operands_of(n)]
PREDICATES = [n for n in NAMES if n.endswith(".pred") or n.startswith("selp")]
# The machine's own: what a narrow instruction takes from a wide register; test_text.py has them.
OWN = [n for n in NAMES if n.startswith("narrow.")]
TESTED = [n for n in NAMES if n not in (*PREDICATES, *OWN)]
BITS = {"2": 16, "4": 32, "8": 64}

_SMALL = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256)
_EDGES = {
    "2": (
        *_SMALL, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0xFFFE, 0xFF80, 0x7F80, 0x7FC0, 0x7C00, 0xFC00,
        0x3C00, 0x3C01, 0x3F80, 0x3F81, 0xBF80, 0x0400, 0x03FF, 0x7BFF, 0x0080, 0x7F7F, 0x4000,
    ),
    "4": (
        *_SMALL, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x7F800000, 0xFF800000,
        0x7FC00000, 0x7F7FFFFF, 0x00800000, 0x007FFFFF, 0x807FFFFF, 0x3F800000, 0xBF800000,
        0x3F000000, 0x3FC00000, 0x40200000, 0xBF000000, 0x4F000000, 0xCF000000, 0x4F800000,
        0x5F000000, 0x5F800000, 0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x7F000001,
        0x477FF000, 0x33000000, 0x80007FFF, 0x7FC03F80, 0xFC003C00, 0x3C018001, 0x4B800001,
    ),
    "8": (
        *_SMALL, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x80000000, 1 << 32,
        0xFFFFFFFF, 0x7F8000007FC00000, 0x00800000007FFFFF, 0x3F800000BF800000, (1 << 53) + 1,
        0x8000008000000001, 0xFFFFFFFF00000000, (1 << 40) + (1 << 15) + 1, 0x7F7FFFFF00000001,
    ),
}  # fmt: skip
COUNT = 96 * 32


@functools.cache
def pools():
    """Values by width: three columns, of which two hold every pair of edges, the rest random."""
    random = np.random.default_rng(0)
    made = {}
    for width, edges in _EDGES.items():
        bits, e = BITS[width], np.array(edges, np.uint64)
        columns = random.integers(0, 1 << bits, (4, COUNT), np.uint64, endpoint=False)
        pairs = len(e) ** 2
        columns[0, :pairs], columns[1, :pairs] = np.repeat(e, len(e)), np.tile(e, len(e))
        columns[2, :pairs], columns[3, :pairs] = (random.choice(e, pairs) for _ in range(2))
        # Numbers of like size, so that sums cancel and round.
        like = columns[0, pairs:-400]
        columns[1, pairs:-400] = like ^ random.integers(0, 1 << bits // 3, like.size, np.uint64)
        made[width] = columns
    made["4"][0, -400:] = F32.encode(random.normal(0, 1000, 400)).astype(np.uint64)
    return made


def _register(width, k):
    return {"2": "%h", "4": "%r", "8": "%d"}[width] + str(k)


_PROLOGUE = """
    mul.wide.u32 %d20, %tid, 8;
    mul.wide.u32 %d21, %block, 256;
    add.s64 %d20, %d20, %d21;
    add.s64 %d22, %out, %d20;
"""


GUARDED = 0x5A5A33CC  # the lanes that a guard lets through
_BEFORE = {"2": 0x1234, "4": 0x12345678, "8": 0x123456789ABCDEF}  # what the others keep


def _one(name, places, guard):
    """The lines that run an instruction and store its results."""
    out, *ins = operands_of(name).split(",")
    two = ins[0] == "p"
    operands = ", ".join(_register(w, k) for k, w in enumerate(ins[1:] if two else ins))
    at = [8 * COUNT * places.setdefault((name, k), len(places)) for k in range(1 + two)]
    if out == "p":
        yield "mov.pred %p0, 1; mov.pred %p1, 1;"
        yield f"{guard}{name} {'%p0|%p1' if two else '%p0'}, {operands};"
        for k, where in enumerate(at):
            yield f"selp.b32 %r9, 1, 0, %p{k}; st.global.b32 [%d22+{where}], %r9;"
        return
    d = _register(out, 9)
    yield f"mov.b{BITS[out]} {d}, {_BEFORE[out]}; {guard}{name} {d}, {operands};"
    yield f"st.global.b{BITS[out]} [%d22+{at[0]}], {d};"


@functools.cache
def results(guard=""):
    """{(instruction, which result): its bits} of one launch of all."""
    inputs = {w: np.ascontiguousarray(p) for w, p in pools().items()}
    code = [_PROLOGUE, f"shr.u32 %r8, {GUARDED}, %lane; and.b32 %r8, %r8, 1;"]
    code.append("setp.ne.s32 %p9, %r8, 0;")
    for w in BITS:
        code.append(f"add.s64 %d23, %x{w}, %d20;")
        code += [
            f"ld.global.b{BITS[w]} {_register(w, k)}, [%d23+{8 * COUNT * k}];" for k in range(4)
        ]
    places = {}
    code += [line for name in TESTED for line in _one(name, places, guard)]
    out = np.zeros((len(places), COUNT), np.uint64)
    arguments = {f"x{w}": p for w, p in inputs.items()}
    launch("\n".join(code), grid=COUNT // 32, options={"races": False}, out=out, **arguments)
    return {key: out[k] for key, k in places.items()}


def _inputs(name):
    return [
        pools()[w][k] for k, w in enumerate(w for w in operands_of(name).split(",")[1:] if w != "p")
    ]


def _shown(name, wrong, got, expected):
    k = int(np.flatnonzero(wrong)[0])
    ins = ", ".join(f"{int(i[k]):#x}" for i in _inputs(name))
    return f"{name} {ins}: {int(got[k]):#x}, not {int(expected[k]):#x} ({wrong.sum()} wrong)"


def _same(name, got, expected):
    """Equal bits; any NaN for any other."""
    parts = name.split(".")
    kind = parts[-2] if parts[0] == "cvt" else parts[-1]
    exact = parts[0] in ("mov", "setp") or parts[0] in ("abs", "neg") and "f16" in kind
    if exact or kind.removesuffix("x2") not in KINDS:
        return got == expected
    if not kind.endswith("x2"):
        return (F32 if "f32" in parts[:-1] else KINDS[kind]).same(got, expected)
    same, up = KINDS[kind[:-2]].same, np.uint64(32 if kind == "f32x2" else 16)
    mask = np.uint64((1 << int(up)) - 1)
    return same(got & mask, expected & mask) & same(got >> up, expected >> up)


def _expected(name, operands):
    """NumPy's bits, and where the ISA defines them."""
    parts = name.split(".")
    kind, everywhere = parts[-1], np.ones(COUNT, bool)
    if parts[0] == "mov" or parts[0] in ("abs", "neg") and "f16" in kind:
        signs = np.uint64(0x80008000 if kind.endswith("x2") else 0x8000)
        how = {"mov": operands[0], "abs": operands[0] & ~signs, "neg": operands[0] ^ signs}
        return how[parts[0]], everywhere
    if parts[0] == "cvt":
        return conversion(name, operands), everywhere
    if not is_float(name):
        return integers(name, operands)
    if kind.endswith("x2"):
        return halves(name, operands, floats), everywhere
    return floats(name, operands)[0], everywhere


def _wrong(name, got):
    """Where an instruction's results differ from NumPy's, and what NumPy has."""
    operands = _inputs(name)
    expected, defined = _expected(name, operands)
    wrong = ~_same(name, got, expected) & defined
    if bound(name) is not None:
        exact, value = floats(name, operands)[1], F32.decode(got)
        near = np.abs(value - exact) <= bound(name) * np.abs(exact) + 2.0**-149
        wrong &= ~(near & np.isfinite(F32.decode(expected)))
        wrong &= ~((value == 0) & (F32.decode(expected) == 0))
    return wrong, expected


@pytest.mark.parametrize("name", [n for n in TESTED if not n.startswith("setp")])
def test_computes(name):
    got = results()[name, 0]
    with np.errstate(all="ignore"):
        wrong, expected = _wrong(name, got)
    assert not wrong.any(), _shown(name, wrong, got, expected)


@pytest.mark.parametrize("name", [n for n in TESTED if n.startswith("setp")])
def test_compares(name):
    with np.errstate(all="ignore"):
        for result, expected in enumerate(comparison(name, _inputs(name))):
            got = results()[name, result]
            assert not (got != expected).any(), _shown(name, got != expected, got, expected)


@pytest.mark.parametrize("guard", ["@%p9 ", "@!%p9 "])
def test_a_guard_leaves_other_lanes_alone(guard):
    through = (GUARDED >> np.arange(32) & 1).astype(bool) == (guard == "@%p9 ")
    through = np.tile(through, COUNT // 32)
    for (name, k), got in results(guard).items():
        kept = _BEFORE.get(operands_of(name)[0], 1)
        assert (got[~through] == kept).all(), name
        assert _same(name, got, results()[name, k])[through].all(), name


_MASKS = {
    "and.pred": lambda a, b: a & b, "or.pred": lambda a, b: a | b, "xor.pred": lambda a, b: a ^ b,
    "not.pred": lambda a, b: ~a, "mov.pred": lambda a, b: a,
}  # fmt: skip


@pytest.mark.parametrize("guard", ["", "@%p9 "])
@pytest.mark.parametrize("name", PREDICATES)
def test_predicates(name, guard):
    a, b, c = (int(n) for n in np.random.default_rng(1).integers(0, 1 << 32, 3))
    out = np.zeros(32, np.uint64)
    masks = "".join(
        f"shr.u32 %r0, {mask}, %lane; and.b32 %r0, %r0, 1; setp.ne.s32 {p}, %r0, 0;\n"
        for p, mask in (("%p1", a), ("%p2", b), ("%p3", c), ("%p9", GUARDED))
    )
    if name.startswith("selp"):
        width = operands_of(name)[0]
        bits, d = BITS[width], _register(width, 0)
        high = (1 << bits) - 2
        run = f"mov.b{bits} {d}, 7; {guard}{name} {d}, {high}, 1, %p1; cvt.u64.u{bits} %d9, {d};"
        expected = [high if a >> lane & 1 else 1 for lane in range(32)]
    else:
        operands = ", ".join(("%p3", "%p1", "%p2")[: operands_of(name).count("p")])
        run = f"{guard}{name} {operands}; selp.b64 %d9, 1, 0, %p3;"
        expected = [_MASKS[name](a, b) >> lane & 1 for lane in range(32)]
    store = "mul.wide.u32 %d0, %lane, 8; add.s64 %d0, %d0, %out; st.global.b64 [%d0], %d9;"
    launch(masks + run.replace("%d0", "%d5") + store, out=out)
    if guard:
        kept = [7 if name.startswith("selp") else c >> lane & 1 for lane in range(32)]
        expected = [(e if GUARDED >> k & 1 else kept[k]) for k, e in enumerate(expected)]
    assert out.tolist() == expected


@pytest.mark.parametrize("of", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_a_conversion_takes_wider_registers_on_both_sides(to, of):
    """What it reads is the low part; what it writes is extended by the sign of its type."""
    values = np.random.default_rng(2).integers(0, 1 << 64, 32, np.uint64)
    out = np.zeros(32, np.uint64)
    launch(
        f"""mul.wide.u32 %d0, %lane, 8; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %out;
        ld.global.b64 %d3, [%d1]; cvt.{to}.{of} %d4, %d3; st.global.b64 [%d2], %d4;""",
        x=values, out=out,
    )  # fmt: skip
    width = {k: int(k[1:]) // 8 for k in (to, of)}
    signed = {k: k[0] == "s" for k in (to, of)}
    for given, got in zip(values.tolist(), out.tolist(), strict=True):
        low = (given & (1 << 8 * width[of]) - 1).to_bytes(width[of], "little")
        value = int.from_bytes(low, "little", signed=signed[of])
        kept = (value & (1 << 8 * width[to]) - 1).to_bytes(width[to], "little")
        assert got == int.from_bytes(kept, "little", signed=signed[to]) & (1 << 64) - 1


@pytest.mark.parametrize("whole, pieces", [("b32", 2), ("b64", 2), ("b64", 4)])
def test_vectors_pack_and_unpack(whole, pieces):
    bits = int(whole[1:])
    part = bits // pieces
    values = np.random.default_rng(3).integers(0, 1 << bits, 32, np.uint64)
    out = np.zeros((2, 32), np.uint64)
    d, e = _register(str(bits // 8), 4), _register(str(bits // 8), 5)
    names = [_register(str(part // 8), 9 + k) for k in range(pieces)]
    launch(
        f"""mul.wide.u32 %d0, %lane, 8; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %out;
        ld.global.{whole} {d}, [%d1];
        mov.{whole} {{{", ".join(names)}}}, {d};
        mov.{whole} {e}, {{{", ".join(reversed(names))}}};
        mov.b64 %d6, 0; cvt.u64.u{part} %d6, {names[1]};
        st.global.{whole} [%d2], {e}; st.global.b64 [%d2+256], %d6;""",
        x=values, out=out,
    )  # fmt: skip
    for given, turned, second in zip(*map(np.ndarray.tolist, (values, *out)), strict=True):
        split = [given >> part * k & (1 << part) - 1 for k in range(pieces)]
        assert turned == sum(p << part * k for k, p in enumerate(reversed(split)))
        assert second == split[1]


@pytest.mark.parametrize("order", ORDERS[1:], ids=lambda order: f"noise {order.noise:+.0f}")
def test_noise_moves_approximations_within_their_bounds_only(order):
    names = [n for n in TESTED if bound(n) and n.endswith(".f32") and "ftz" not in n]
    code = [_PROLOGUE, "add.s64 %d23, %x, %d20; ld.global.b32 %r0, [%d23]; mov.b32 %r1, %r0;"]
    for k, name in enumerate(names):
        operands = ", ".join(["%r9", "%r0", "%r1"][: operands_of(name).count("4")])
        code.append(f"{name} {operands}; st.global.b32 [%d22+{8 * COUNT * k}], %r9;")
    x = F32.encode(np.exp(np.random.default_rng(4).normal(0, 1, COUNT))).astype(np.uint64)
    out = {}
    for one in (ORDERS[0], order):
        out[one] = np.zeros((len(names), COUNT), np.uint64)
        launch("\n".join(code), grid=COUNT // 32, order=one, x=x, out=out[one])
    for k, name in enumerate(names):
        exact, moved = (F32.decode(o[k]) for o in out.values())
        scale = 1 if name[:3] in ("sin", "cos") else np.abs(exact)
        error = np.abs(moved - exact) / scale
        assert 0 < error.max() <= bound(name) + 2.0**-23, name


@pytest.mark.parametrize("name", ["max", "min", "max.NaN", "min.NaN", "max.ftz"])
def test_the_extreme_of_three(name):
    """What the instruction of two operands makes of the first two, and of that and the third."""
    code = [_PROLOGUE, "add.s64 %d23, %x, %d20;"]
    code += [f"ld.global.b32 %r{k}, [%d23+{8 * COUNT * k}];" for k in range(3)]
    code.append(f"{name}.f32 %r4, %r0, %r1; {name}.f32 %r4, %r4, %r2; st.global.b32 [%d22], %r4;")
    # The result may lie where the third operand does.
    code.append(f"{name}.f32 %r2, %r0, %r1, %r2; st.global.b32 [%d22+{8 * COUNT}], %r2;")
    x = np.ascontiguousarray(pools()["4"][:3])
    out = np.zeros((2, COUNT), np.uint64)
    launch("\n".join(code), grid=COUNT // 32, x=x, out=out)
    assert (out[0] == out[1]).all()
    changed = [(out[1] != column.astype(np.uint32)).mean() for column in x]
    assert max(changed) < 1 and min(changed) > 0  # each of the three is the result somewhere


def test_every_instruction_of_lanes_is_tested():
    """The table's names are the tests' own parameters; an operand of a new kind shows here."""
    assert len(TESTED) + len(PREDICATES) + len(OWN) == len(NAMES) > 400
    assert {w for n in TESTED for w in operands_of(n).split(",")} == {"p", "2", "4", "8"}
    assert _MASKS.keys() == {n for n in PREDICATES if n.endswith(".pred")}
    assert OWN == ["narrow.4.2", "narrow.8.2", "narrow.8.4"]
