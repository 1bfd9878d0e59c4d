"""Faults planted in what the compiler emits, and in what it compiles: the machine finds them.

Triton's interpreter runs the Python source, so of the faults in PTX it can see none, and of those
in Python not the ones marked below.
"""

import re
from dataclasses import dataclass

import planted
import pytest
from compiled import in_compiler

pytestmark = pytest.mark.slow  # .ci/run has them beside `gate execute`

GATED, SM90, SM100, SM80 = "gated_linear_fwd", "sm_90", "sm_100", "sm_80"
EVERY = (SM80, SM90, SM100)


@dataclass(frozen=True)
class Fault:
    """One line of PTX that a regular expression changes. all: each place is found; else some are
    redundant, as barriers that another one follows, and one is enough. message: what finds it."""

    what: str
    arches: tuple[str, ...]
    pattern: str
    to: str
    message: str
    all: bool = True


FAULTS = (
    Fault("barrier", EVERY, r"^\s*(bar|barrier)\.sync\s+0;", "", "race|shared offset", all=False),
    Fault("guard of a load", EVERY, r"@!?%p\d+ (ld\.global)", r"\1", "past the end", all=False),
    Fault("guard of a store", (SM80,), r"@!?%p\d+ (st\.global)", r"\1", "race|past the end"),
    Fault("a vector further", (SM80,), r"((?:ld|st)\.global\.v4\.b32.*\[ %rd\d+ \+ )0",
          r"\g<1>16", "."),
    Fault("wait of cp.async", (SM80,), r"cp\.async\.wait_group\s+\d+;", "", "."),
    Fault("wait of cp.async for too few", (SM80,), r"cp\.async\.wait_group\s+[1-9];",
          "cp.async.wait_group 15;", "."),
    Fault("commit of cp.async", (SM80,), r"cp\.async\.commit_group;", "",
          "asynchronous copy|written", all=False),
    Fault("zero fill", (SM80,), r"(cp\.async\.c[ga]\.shared\.global \[.*\], 0x10), %r\d+", r"\1",
          "past the end"),
    Fault("swizzle of a row", (SM80,), r"(xor\.b32\s+%r\d+, %r\d+, )32;", r"\1 64;", "numbers"),
    Fault("halves swapped", EVERY, r"(cvt\.rn\.bf16x2\.f32\s+%r\d+), (%r\d+), (%r\d+);",
          r"\1, \3, \2;", "numbers"),
    Fault("16 bytes further", (SM80, SM90), r"((?:ld|st)(?:matrix\.\S+|\.shared\.\S+).*\[%r\d+)\]",
          r"\1+16]", ".", all=False),
    Fault("proxy fence", (SM90, SM100), r"fence\.proxy\.async[^;]*;", "", "no fence.proxy.async"),
    Fault("wait of an mbarrier", (SM90, SM100), r"^\s*@!complete bra\.uni waitLoop;", "", ".",
          all=False),
    Fault("bytes to expect", (SM90, SM100), r"(expect_tx.*, )(\d+);", r"\1 16;", "deadlock"),
    Fault("parity", (SM90, SM100), r"(try_wait.*\], )(%r\d+);", r"\1 1;", ".", all=False),
    Fault("wait for a TMA store", (SM90, SM100), r"cp\.async\.bulk\.wait_group(\.read)?\s+0;", "",
          "still reads|may still read", all=False),
    Fault("commit of a TMA store", (SM90, SM100), r"cp\.async\.bulk\.commit_group;", "",
          "still reads|in no group"),
    Fault("TMA by every lane", (SM90, SM100),
          r"@%p\d+ (cp\.async\.bulk\.tensor\S*shared::cta\.global)", r"\1", "still writes"),
    Fault("box", (SM90, SM100), r"(cp\.async\.bulk\.tensor\.\dd\.shared.*\{)(%r\d+), (%r\d+)",
          r"\1\3, \2", "."),
    Fault("wait for a wgmma", (SM90,), r"wgmma\.wait_group\.sync\.aligned\s+1;",
          "wgmma.wait_group.sync.aligned 2;", "still reads"),
    Fault("wgmma.fence", (SM90,), r"wgmma\.fence[^;]*;", "", "no wgmma.fence"),
    Fault("commit of a wgmma", (SM90,), r"wgmma\.commit_group[^;]*;", "", "."),
    Fault("swizzle of a descriptor", (SM90,), r"\b4611686293305294848", "-9223371899415822336",
          "numbers|unwritten|written"),
    Fault("commit of tcgen05", (SM100,), r"@%p\d+ tcgen05\.commit[^;]*;", "", "deadlock"),
    Fault("dealloc of tcgen05", (SM100,), r".*tcgen05\.dealloc[^;]*;", "", "dealloc"),
)  # fmt: skip
PLACES = 3
ONE_BY_ONE = [(fault, arch) for fault in FAULTS for arch in fault.arches]


@pytest.mark.parametrize(
    ("fault", "arch"), ONE_BY_ONE, ids=[f"{fault.what}-{arch}" for fault, arch in ONE_BY_ONE]
)
def test_a_line_of_ptx(fault, arch):
    limit = PLACES if fault.all else 2 * PLACES
    found = in_compiler(planted.outcomes, arch, GATED, fault.pattern, fault.to, limit)
    assert found, "the pattern fits no line that is carried out"
    missed = [line for line, what in found if not what]
    assert not missed or (not fault.all and len(missed) < len(found)), missed
    assert any(re.search(fault.message, what) for _, what in found), found


@dataclass(frozen=True)
class Change:
    """One place of a kernel's Python. seen: by the interpreter too, whose memory has no bounds and
    whose programs run one after another."""

    what: str
    launch: str
    module: str
    kernel: str
    old: str
    new: str
    message: str
    seen: bool = True


DENSE, ACT, SKINNY = "dense.gated_linear", "dense.gated_act", "skinny"
CHANGES = (
    Change("rows and columns of tiles swapped", GATED, DENSE, "_fwd_kernel",
           "tile_m, tile_n = tile_at(index", "tile_n, tile_m = tile_at(index", "."),
    Change("a tile missed", GATED, DENSE, "_fwd_kernel",
           "tiles_m * tiles_n, tl.num_programs", "tiles_m * tiles_n - 1, tl.num_programs",
           "numbers"),
    Change("every tile by every program", GATED, DENSE, "_fwd_kernel",
           "tl.range(tl.program_id(0), tiles_m", "tl.range(tl.program_id(0) * 0, tiles_m",
           "race", seen=False),
    Change("strides swapped", GATED, DENSE, "_fwd_kernel",
           "stride_hm, stride_gm, stride_bg", "stride_hm, stride_bg, stride_gm", "."),
    Change("rows behind the last stored", "gated_act_fwd", ACT, "_fwd_kernel",
           "store_tile(h_ptr, stride_hm, m0, n0, M, H,",
           "store_tile(h_ptr, stride_hm, m0, n0, M + 1, H,", "past the end of h", seen=False),
    Change("rows behind the last loaded", "gated_act_fwd", ACT, "_fwd_kernel",
           "g_ptr, u_ptr, m0, n0, M, H,", "g_ptr, u_ptr, m0, n0, M + 1, H,",
           "past the end of g", seen=False),
    Change("another group of a split", "few rows", SKINNY, "_partial_kernel",
           "k_begin = part * depth", "k_begin = (part + 1) * depth", "."),
    Change("parts of a split on one another", "few rows", SKINNY, "_partial_kernel",
           "parts_ptr += part * size * (2 if GATED else 1)", "parts_ptr += part * size", "race"),
    Change("a part too many", "few rows", SKINNY, "reduce_kernel",
           "tl.range(0, splits)", "tl.range(0, splits + 1)", "past the end"),
    Change("a part too few", "few rows", SKINNY, "reduce_kernel",
           "tl.range(0, splits)", "tl.range(1, splits)", "numbers"),
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.what for change in CHANGES])
def test_a_line_of_python(change):
    found = in_compiler(
        planted.in_python, change.launch, change.module, change.kernel, change.old, change.new
    )
    assert re.search(change.message, found), found


def test_enough_is_planted():
    """What the interpreter cannot see is most of it: every fault of PTX is."""
    unseen = len(ONE_BY_ONE) + sum(not change.seen for change in CHANGES)
    assert len(ONE_BY_ONE) + len(CHANGES) >= 25
    assert unseen > len(ONE_BY_ONE)
