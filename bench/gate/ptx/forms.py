"""Instructions of warps: from their operands in PTX to rows of the machine.

One function a form, found by the opcode's beginning; the longest that fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .lowering import WAITS, WINDOWS, Lowering
from .text import WIDTH, Unknown, split

__all__ = ["FORMS", "find", "vector"]

Form = Callable[[Lowering, str, list[str], list[str]], None]
FORMS: dict[str, Form] = {}
SPACES = {"global": 0, "shared": 1, "param": 2, "local": 3, "generic": 4, "const": 0}
ELEMENTS = {"bf16": 0, "f16": 1, "tf32": 2}


def form(*beginnings: str) -> Callable[[Form], Form]:
    def enter(f: Form) -> Form:
        FORMS.update(dict.fromkeys(beginnings, f))
        return f

    return enter


def find(op: str) -> Form | None:
    """The form of an opcode: of its longest known beginning, in whole parts."""
    parts = op.split(".")
    for n in range(len(parts), 0, -1):
        found = FORMS.get(".".join(parts[:n]))
        if found is not None:
            return found
    return None


def vector(text: str) -> list[str]:
    text = text.strip()
    return split(text[1:-1]) if text.startswith("{") else [text]


# ---- memory


def _space(parts: list[str]) -> str:
    return next((p for p in parts if p in SPACES), "generic")


@form("ld", "st")
def _transfer(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    load, space, kind = parts[0] == "ld", _space(parts), parts[-1]
    names = vector(o[0] if load else o[1])
    wide = space not in ("shared",)
    at, offset = low.address(o[1] if load else o[0], 8 if wide else 4)
    bytes_ = WIDTH[kind]
    own = next((w for w in map(low.width_of, names) if w is not None), None)
    width = max(bytes_, 2) if own is None else own
    if not load:
        low.stored(space, bytes_ * len(names))
    imms = [SPACES[space], bytes_, len(names), width, int(kind[0] == "s"), int(wide), offset]
    low.emit(parts[0], [*low.operands(names, width), at], imms, writes=len(names) if load else 0)


@form("atom", "red")
def _atomic(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    space, kind = _space(parts), parts[-1]
    wide = space != "shared"
    result, rest = (vector(o[0])[0], o[1:]) if parts[0] == "atom" else ("_", o)
    at, offset = low.address(rest[0], 8 if wide else 4)
    what = next(p for p in parts[1:] if p not in (*SPACES, "noftz"))
    width = WIDTH[kind]
    values = [low.operand(vector(v)[0], width) for v in rest[1:]]
    low.stored(space, width)
    imms = [SPACES[space], width, 1, width, 0, int(wide), offset]
    low.emit(f"atom.{what}.{kind}", [low.operand(result, width), at, *values], imms)


@form("cvta")
def _cvta(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    window = next((WINDOWS[p] for p in parts if p in WINDOWS), 0)
    value = low.operand(o[1], 8)
    if not window:
        return low.emit("mov.b64", [o[0], value])
    if "to" in parts:
        return low.emit("and.b64", [o[0], value, low.constant((1 << 56) - 1, 8)])
    return low.emit("or.b64", [o[0], value, low.constant(window, 8)])


@form("mapa")
def _mapa(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    # The address of the same place in block o[2] of the cluster: its rank + 1 stands above.
    if parts[-1] != "u32":
        raise Unknown("mapa of generic addresses")
    rank = f"{o[0]}/rank"
    low.kernel.registers[rank] = "b32"
    low.emit("add.u32", [rank, low.operand(o[2], 4), low.constant(1, 4)])
    low.emit("mad.lo.u32", [o[0], rank, low.constant(1 << 24, 4), low.operand(o[1], 4)])


@form("mov")
def _mov(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    kind = parts[-1]
    if kind == "pred":
        return low.emit("mov.pred", [low.predicate(o[0]), low.predicate(o[1])])
    width = WIDTH[kind]
    to, of = vector(o[0]), vector(o[1])
    n = max(len(to), len(of))
    if n == 1:
        return low.emit(op, [low.operand(to[0], width), low.operand(of[0], width)])
    piece = max(width // n, 2)
    name = f"pack.b{8 * width}" + (f".{n}" if width == 8 else "")
    if len(to) > 1:
        ops = [*low.operands(to, piece), low.operand(of[0], width)]
        return low.emit(f"un{name}", ops, writes=n)
    return low.emit(name, [to[0], *low.operands(of, piece)])


# ---- exchanges between lanes


def _with_predicate(text: str) -> tuple[str, list[str]]:
    """d|p: the result, and the predicate if there is one."""
    d, _, p = text.partition("|")
    return d.strip(), [p.strip()] if p else []


@form("shfl")
def _shfl(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    d, p = _with_predicate(o[0])
    mask = o[4] if len(o) > 4 else "-1"
    ops = [*low.operands([d, *o[1:4], mask], 4), *p]
    low.emit(f"shfl.{parts[1]}", ops)


@form("vote")
def _vote(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    result = low.operand(o[0], 4) if parts[1] == "ballot" else low.predicate(o[0])
    mask = low.operand(o[2] if len(o) > 2 else "-1", 4)
    low.emit(f"vote.{parts[1]}", [result, low.predicate(o[1]), mask])


@form("redux", "match.any")
def _redux(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit(op, low.operands([*o[:2], o[2] if len(o) > 2 else "-1"], 4))


@form("elect")
def _elect(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    d, p = _with_predicate(o[0])
    low.emit("elect", [low.operand(d, 4), *p, low.operand(o[1], 4)], writes=2)


@form("ldmatrix", "stmatrix")
def _matrices(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    load = parts[0] == "ldmatrix"
    if parts[-1] != "b16" or "m8n8" not in parts:
        raise Unknown(op)
    names = vector(o[0] if load else o[1])
    at, offset = low.address(o[1] if load else o[0], 4)
    ops = [*low.operands(names, 4), at]
    imms = [len(names), int("trans" in parts), offset]
    low.emit(parts[0], ops, imms, writes=len(names) if load else 0)


# ---- barriers and fences


@form("bar", "barrier")
def _bar(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    if "warp" in parts:
        return low.emit("bar.warp", low.operands(o, 4), writes=0)
    if "cluster" in parts:
        return low.emit(f"cluster.{parts[2]}", [], writes=0)
    if "red" in parts:
        raise Unknown(op)
    name = "bar.arrive" if "arrive" in parts else "bar.sync"
    return low.emit(name, low.operands(o, 4), writes=0)


@form("fence.proxy.async")
def _fence_proxy(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("fence.proxy", [], writes=0)


@form("fence", "membar", "prefetch", "griddepcontrol", "setmaxnreg", "nanosleep", "discard")
def _nothing(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    # Orders of memory between blocks, hints, numbers of registers: no result depends on them here.
    low.emit("nothing", [], writes=0)


@form("mbarrier")
def _mbarrier(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    what = parts[1]
    if what in ("try_wait", "test_wait"):
        if "parity" not in parts:
            raise Unknown(op)
        at, offset = low.address(o[1], 4)
        ops = [low.predicate(o[0]), at, low.operand(o[2], 4)]
        return low.emit("mbarrier.try_wait", ops, [offset])
    if what in ("init", "inval"):
        at, offset = low.address(o[0], 4)
        low.stored("shared", 8)
        rest = low.operands(o[1:], 4)
        return low.emit(f"mbarrier.{what}", [at, *rest], [offset], writes=0)
    if what not in ("arrive", "expect_tx") or "noComplete" in parts:
        raise Unknown(op)
    expects = "expect_tx" in parts
    given = o if o[0].startswith("[") else o[1:]  # without the state that nobody reads
    if given is not o and o[0] != "_":
        raise Unknown(f"{op} with a state that is read")
    at, offset = low.address(given[0], 4)
    imms = [offset, int(what == "arrive"), int(not expects and len(given) > 1)]
    return low.emit("mbarrier.arrive", [at, *low.operands(given[1:], 4)], imms, writes=0)


# ---- asynchronous copies


@form("cp.async")
def _cp_async(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    if {"mbarrier", "bulk"}.intersection(parts) or len(o) > 4:
        raise Unknown(op)
    (to, to_offset), (of, of_offset) = low.address(o[0], 4), low.address(o[1], 8)
    bytes_ = int(o[2], 0)
    low.stored("shared", bytes_)
    ops = [to, of, *low.operands(o[3:], 4)]
    low.emit("cp.async", ops, [bytes_, to_offset, of_offset], writes=0)


@form("cp.async.commit_group")
def _cp_commit(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("cp.commit", [], writes=0)


@form("cp.async.wait_group", "cp.async.wait_all")
def _cp_wait(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    if not o:  # wait_all is a commit and a wait
        low.emit("cp.commit", [], writes=0)
    low.emit("cp.wait", [], [int(o[0], 0) if o else 0], writes=0)


@form("cp.async.bulk.commit_group")
def _bulk_commit(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("tma.commit", [], writes=0)


@form("cp.async.bulk.wait_group")
def _bulk_wait(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("tma.wait", [], [int(o[0], 0)], writes=0)


@form("cp.async.bulk.tensor")
def _box(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    rank = int(parts[4][0])
    how = {"tile", "mbarrier::complete_tx::bytes", "multicast::cluster", "bulk_group"}
    if not how.issuperset(parts[7:]):
        raise Unknown(op)

    def shared(text: str) -> int | str:
        at, offset = low.address(text, 4)
        if offset:
            raise Unknown(f"an offset in {text}")
        return at

    def map_and_coordinates(text: str) -> tuple[int | str, list[int | str]]:
        address, coordinates = split(text.strip()[1:-1])
        return low.operand(address, 8), low.operands(vector(coordinates), 4)

    if parts[5] == "shared":
        tensor, at = map_and_coordinates(o[1])
        ops = [shared(o[0]), tensor, shared(o[2]), *at]
        if "multicast::cluster" in parts:
            ops.append(low.operand(o[3], 2))
        return low.emit("tma.load", ops, [rank], writes=0)
    tensor, at = map_and_coordinates(o[0])
    return low.emit("tma.store", [tensor, shared(o[1]), *at], [rank], writes=0)


# ---- products


@form("mma")
def _mma(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    _, shape, a, b, *types = parts
    if (a, b) != ("row", "col") or types[0] != "f32" or types[3] != "f32" or types[1] != types[2]:
        raise Unknown(op)
    ops = [low.operand(x, 4) for v in o for x in vector(v)]
    low.emit(f"mma.{shape}.{types[1]}", ops, writes=4)


@form("wgmma.mma_async")
def _wgmma(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    shape, result, kind = re.fullmatch(r"m64n(\d+)k(\d+)", parts[2]), parts[3], parts[4]
    d, a = vector(o[0]), vector(o[1])
    in_registers = o[1].strip().startswith("{")
    rest = [int(x, 0) for x in o[4:]]  # signs of A and B, then whether A and B are transposed
    if shape is None or result != "f32" or rest[:2] != [1, 1] or parts[5:] != [kind]:
        raise Unknown(op)
    turned = rest[2:] or [0] if in_registers else rest[2:] or [0, 0]
    turned = [0, *turned] if in_registers else turned
    ops = [
        *low.operands(d, 4),
        *(low.operands(a, 4) if in_registers else low.operands(a, 8)),
        low.operand(o[2], 8),
        low.predicate(o[3]),
    ]
    imms = [int(shape[1]), ELEMENTS[kind], int(in_registers), *turned]
    low.emit("wgmma", ops, imms, writes=0, flags=WAITS)


@form("wgmma.fence")
def _wgmma_fence(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("wgmma.fence", [], writes=0, flags=WAITS)


@form("wgmma.commit_group")
def _wgmma_commit(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("wgmma.commit", [], writes=0, flags=WAITS)


@form("wgmma.wait_group")
def _wgmma_wait(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("wgmma.wait", [], [int(o[0], 0)], writes=0, flags=WAITS)


# ---- tensor memory


@form(
    "tcgen05.relinquish_alloc_permit",
    "tcgen05.fence::before_thread_sync",
    "tcgen05.fence::after_thread_sync",
    "tcgen05.wait::st",
)
def _tensor_nothing(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("nothing", [], writes=0)


@form("tcgen05.wait::ld")
def _tensor_wait(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    low.emit("tcgen05.wait", [], writes=0, flags=WAITS)


@form("tcgen05.alloc", "tcgen05.dealloc")
def _tensor_alloc(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    allocates = parts[1] == "alloc"
    if "cta_group::2" in parts:
        raise Unknown(op)
    low.stored("shared", 4)
    at = low.address(o[0], 4)[0] if allocates else low.operand(o[0], 4)
    low.emit(f"tcgen05.{parts[1]}", [at, low.operand(o[1], 4)], writes=0)


@form("tcgen05.commit")
def _tensor_commit(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    if "cta_group::2" in parts:
        raise Unknown(op)
    # Without a state space the address is generic; its low half is the shared one. Triton 3.6.
    wide = "shared" not in parts
    at, offset = low.address(o[0], 8 if wide else 4)
    if wide:
        at = low.narrowed(at)
    blocks = [low.operand(o[1], 2)] if "multicast::cluster" in parts else []
    low.emit("tcgen05.commit", [at, *blocks], [offset], writes=0)


@form("tcgen05.mma")
def _tensor_mma(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    if parts[3] != "kind::f16" or parts[2] != "cta_group::1" or len(o) != 5 or o[1][0] == "[":
        raise Unknown(op)
    at, offset = low.address(o[0], 4)
    a, b = low.operands(o[1:3], 8)
    ops = [at, a, b, low.operand(o[3], 4), low.predicate(o[4])]
    low.emit("tcgen05.mma", ops, [offset], writes=0)


@form("tcgen05.ld", "tcgen05.st")
def _tensor_move(low: Lowering, op: str, parts: list[str], o: list[str]) -> None:
    load, shape = parts[1] == "ld", parts[2]
    if (
        shape not in ("32x32b", "16x32bx2", "16x256b")
        or "pack::16b" in parts
        or "unpack::16b" in parts
    ):
        raise Unknown(op)
    names = low.operands(vector(o[0] if load else o[-1]), 4)
    at, offset = low.address(o[1] if load else o[0], 4)
    half = int(o[-1] if load else o[1], 0) if shape == "16x32bx2" else 0
    writes = len(names) if load else 0
    low.emit(
        f"tcgen05.{parts[1]}",
        [*names, at],
        [len(names), offset, half, int(shape == "16x256b")],
        writes=writes,
    )
