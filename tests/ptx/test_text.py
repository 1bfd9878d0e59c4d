"""PTX text: parsed, refused where it is not known, branches and where they meet."""

import numpy as np
import pytest
from ptx_kernels import kernel, lanes, launch

from fusedmlp.bench.gate.ptx import Finding, Unknown, load
from fusedmlp.bench.gate.ptx.flow import meeting_points
from fusedmlp.bench.gate.ptx.lower import plain
from fusedmlp.bench.gate.ptx.lowering import addresses_of
from fusedmlp.bench.gate.ptx.memory import Regions
from fusedmlp.bench.gate.ptx.tensor_map import TensorMap
from fusedmlp.bench.gate.ptx.text import parse, split

WHOLE = """// a comment { with a brace
.version 8.7
.file 1 "/home/someone/kernels/silu.py"
.global .align 16 .b8 table[8] = {1, 2, 3, 255};
.const .align 4 .u32 five = 5;
.extern .shared .align 16 .b8 dynamic[];
.visible .func helper() { ret; }
.visible .entry kernel(
    .param .u64 .ptr .global .align 16 kernel_param_0,
    .param .u32 kernel_param_1, .param .u64 kernel_param_2,
    .param .align 64 .b8 kernel_param_3[128]
)
.reqntid 128, 1, 1
.reqnctapercluster 2, 1, 1
.maxnreg 255
{
    .reg .pred %p<2>;
    .reg .b32 %r<3>, %extra;
    .shared .align 8 .b64 gate;
    /* a block
       of comments */
    .loc 1 7 3
    mov.u32 %r0, %tid.x;
    {
        .reg .b32 %r1, inner;
        .loc 1 8 1
        mov.b32 inner, 1;
        mov.b32 %r1, inner; // bound to the scope
        { .reg .b32 inner; mov.b32 inner, %r1; }
        again: @!%p0 bra again;
    }
    @%p1 bra $end;
    mov.b32 %r1, %extra;
again: st.shared.v2.b32 [gate + 4],
        {%r0, %r1};
    bra.uni again;
$end: ret;
}
.visible .entry other() { ret; }
"""


def test_a_whole_file():
    k = parse(WHOLE, "kernel")
    assert (k.name, k.threads, k.cluster) == ("kernel", 128, (2, 1, 1))
    assert k.param_sizes == [8, 4, 8, 128] and k.param_bytes == 192
    assert k.params == {f"kernel_param_{n}": at for n, at in enumerate((0, 8, 16, 64))}
    assert k.variables["table"].data == bytes([1, 2, 3, 255, 0, 0, 0, 0])
    assert k.variables["five"].data == bytes([5, 0, 0, 0]) and k.variables["five"].space == "const"
    assert k.variables["gate"].size == 8 and k.variables["dynamic"].size == 0
    assert k.registers["%extra"] == "b32" and k.registers["%p1"] == "pred"
    assert {"%r0", "%r1", "%r2"} < k.registers.keys() and "%r3" not in k.registers


def test_lines_and_sources_survive_comments_and_scopes():
    k = parse(WHOLE, "kernel")
    lines = WHOLE.splitlines()
    for i in k.instructions:
        assert i.opcode in lines[i.line - 1], i
    assert [i.source for i in k.instructions[:2]] == ["silu.py:7", "silu.py:8"]
    store = next(i for i in k.instructions if i.opcode.startswith("st"))
    assert store.operands == ["[gate + 4]", "{%r0, %r1}"]
    assert store.text == "st.shared.v2.b32 [gate + 4], {%r0, %r1}"


def test_scopes_rename_what_they_declare():
    k = parse(WHOLE, "kernel")
    first, second, third, loop, *_ = k.instructions[1:]
    inner, own = first.operands[0], second.operands[0]
    assert inner != "inner" and own != "%r1" and second.operands[1] == inner
    assert third.operands[1] == own and third.operands[0] not in ("inner", inner)
    assert (loop.guard, loop.negated) == ("%p0", True)
    assert k.labels[loop.operands[0]] == k.instructions.index(loop)
    last = k.instructions[-2]
    assert last.opcode == "bra.uni" and last.operands == ["again"]
    assert k.labels["again"] != k.labels[loop.operands[0]]


def test_a_scope_is_used_as_inline_assembly_uses_it():
    """The same names twice, a loop in each."""
    once = """{ .reg .pred go; .reg .b32 n; mov.b32 n, 0;
        more: add.s32 n, n, 1; add.s32 %r0, %r0, 1; setp.lt.u32 go, n, %r5; @go bra more; }"""
    code = f"mov.b32 %r0, 0; mov.b32 %r5, 3; {once} add.s32 %r5, %lane, 1; {once}"
    assert lanes(code).tolist() == [4 + k for k in range(32)]


def test_split_heeds_brackets():
    assert split("{%r1, %r2}, [%d1, {%r3, 4}], %p0") == ["{%r1, %r2}", "[%d1, {%r3, 4}]", "%p0"]
    assert split("") == []


def test_what_makes_no_difference_is_taken_out_of_opcodes():
    assert plain("bra.uni") == "bra"
    assert plain("ld.relaxed.gpu.global.L1::evict_last.b32") == "ld.global.b32"
    assert plain("mbarrier.arrive.release.cluster.shared::cluster.b64").endswith("shared.b64")
    assert plain("shfl.sync.bfly.b32") == "shfl.bfly.b32"
    assert plain("cvt.rn.bf16x2.f32") == "cvt.rn.bf16x2.f32"


def test_variables_lie_one_behind_the_other():
    text = kernel(".shared .b8 a[3]; .shared .align 16 .b8 b[4]; .local .b32 c;", {})
    places, ends = addresses_of(parse(text))
    assert (places["a"], places["b"], places["c"]) == (1024, 1040, 0)
    assert ends == {"shared": 1044, "local": 4}


def test_dynamic_shared_memory_begins_behind_all_variables():
    """Its size is the launch's, so that nothing can lie behind it."""
    text = kernel(".shared .b8 a[3];", {})
    text = ".extern .shared .align 16 .b8 dynamic[];\n" + text
    places, ends = addresses_of(parse(text))
    assert (places["a"], places["dynamic"]) == (1024, 1040)
    assert ends["shared"] == 1040


def test_many_constants_stay_below_the_tensors():
    declared = "".join(f".global .align 4 .u32 c{k} = {k};\n" for k in range(40))
    rows = load(declared + kernel("", {})).constants.rows
    assert len(rows) == 40
    assert all(end <= after for (_, end, *_), (after, *_) in zip(rows, rows[1:], strict=False))
    assert rows[-1][1] < Regions().first


def test_initialised_variables_are_read():
    """As a global and as a constant; each has a place of its own."""
    out = np.zeros(2, np.uint32)
    text = kernel(
        """mov.b64 %d0, table; ld.global.b32 %r0, [%d0]; ld.const.u32 %r1, [five];
        st.global.v2.b32 [%out], {%r0, %r1};""",
        {"out": out},
    )
    text = (
        ".global .align 4 .b8 table[4] = {1, 2, 3, 255};\n.const .align 4 .u32 five = 5;\n" + text
    )
    regions = Regions()
    at = regions.add("out", out.ctypes.data, out.nbytes)
    load(text).run((1,), [at.to_bytes(8, "little")], regions)
    assert out.tolist() == [0xFF030201, 5]


def test_one_of_several_kernels_is_named():
    with pytest.raises(Unknown, match="2 kernels named anything in this PTX, not one"):
        load(WHOLE)
    with pytest.raises(Unknown, match="0 kernels named missing"):
        load(WHOLE, "missing")
    assert load(WHOLE, "other").lowered.kernel.name == "other"


@pytest.mark.parametrize("line, why", [
    ("frobnicate.b32 %r0, %r1;", "no model of frobnicate.b32"),
    ("add.b32 %r0, %r1, %r2;", "no model of add.b32"),
    ("add.sat.s32 %r0, %r1, %r2;", "no model of add.sat.s32"),
    ("fma.rz.f32 %r0, %r1, %r2, %r3;", "no model of fma.rz.f32"),
    ("setp.lt.and.s32 %p0, %r1, %r2, %p1;", "no model of setp.lt.and.s32"),
    ("add.s32 %r0, %r1;", "2 operands, not 3"),
    ("add.s32 %r0, %d1, %r2;", "%d1 is 8 bytes wide, not 4"),
    ("add.s32 %r0, %nothing, %r2;", "ValueError"),
    ("selp.b32 %r0, 1, 0, %r1;", "%r1 is no predicate"),
    ("bra nowhere;", "no label nowhere"),
    ("call.uni (%r0), helper, (%r1);", "no model of call"),
    ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0}, {%r1}, {%r2}, {%r3};", "mma.m16n8k32"),
    ("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r0,%r1,%r2,%r3}, %d0, %d1, %p0, 1, 1;",
     "e4m3"),
    ("tcgen05.mma.cta_group::2.kind::f16 [%r0], %d0, %d1, %r1, %p0;", "cta_group::2"),
    ("tcgen05.cp.cta_group::1.128x256b [%r0], %d0;", "no model of tcgen05.cp"),
    ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%d0], 16, [%r1];",
     "bulk"),
    ("cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
     " [%r0], [%d0, {%r1, %r1, %r1}], [%r2], {%h0};", "im2col"),
    ("cp.async.mbarrier.arrive.b64 [%r0];", "cp.async.mbarrier"),
    ("mbarrier.arrive.shared::cta.b64 %d0, [%r0];", "a state that is read"),
    ("mbarrier.arrive.noComplete.shared::cta.b64 _, [%r0], 1;", "noComplete"),
    ("mbarrier.try_wait.shared::cta.b64 %p0, [%r0], %d0;", "mbarrier.try_wait"),
    ("bar.red.popc.u32 %r0, 0, %p0;", "bar.red"),
    ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%r2];", "ldmatrix"),
    ("atom.global.inc.u32 %r0, [%d0], %r1;", "no model of atom.inc.u32"),
    ("mapa.u64 %d0, %d1, %r0;", "mapa of generic addresses"),
    ("bfe.u64 %d0, %d1, %r1, %r2;", "no model of bfe.u64"),
])  # fmt: skip
def test_an_unknown_instruction_names_itself_and_its_line(line, why):
    text = kernel(f"mov.b32 %r0, 1;\n{line}", {})
    number = next(n for n, held in enumerate(text.splitlines(), 1) if held == line)
    with pytest.raises(Unknown) as caught:
        load(text)
    message = str(caught.value)
    assert f"PTX line {number}: {' '.join(line.rstrip(';').split())}" in message
    assert why in message


@pytest.mark.parametrize("text, why", [
    (".alias one, two;", r"directive \.alias"),
    ("mov.b32 %r0, 1", r"PTX line \d+"),
    ("@%p0", r"PTX line \d+"),
    ("{ mov.b32 %r0, 1;", r"PTX line \d+"),
])  # fmt: skip
def test_malformed_text_is_refused(text, why):
    whole = kernel("", {}).replace("    ret;\n}\n", text + ("\n}" if text[0] != "{" else ""))
    with pytest.raises(Unknown, match=why):
        load(whole)


def test_odd_heads_are_refused():
    with pytest.raises(Unknown, match="blocks of several dimensions: .reqntid 32, 4"):
        load(kernel("", {}).replace(".reqntid 32", ".reqntid 32, 4"))
    with pytest.raises(Unknown, match="parameter '.param .texref t'"):
        load(".entry kernel(.param .texref t) { ret; }")
    with pytest.raises(Unknown, match="declaration '.global .texref t'"):
        load(".global .texref t;\n" + kernel("", {}))


# ---- where branches meet


def meets(body):
    """Line of a branch -> line where its ways meet, of labels only; the end is 'end'."""
    k = parse(f".entry kernel() {{ .reg .pred %p<9>; .reg .b32 %r<9>;\n{body}\n}}")
    names = {at: name for name, at in reversed(list(k.labels.items()))}
    names[len(k.instructions)] = "end"
    return {k.instructions[b].operands[0] + f"@{b}": names.get(m, m)
            for b, m in meeting_points(k).items()}  # fmt: skip


def test_an_if_meets_behind_itself():
    assert meets("@%p0 bra A; mov.b32 %r0, 1; A: ret;") == {"A@0": "A"}


def test_an_else_meets_behind_both():
    body = "@%p0 bra A; mov.b32 %r0, 1; bra B; A: mov.b32 %r0, 2; B: ret;"
    assert meets(body) == {"A@0": "B", "B@2": "B"}


def test_loops_meet_at_their_exits():
    body = """O: mov.b32 %r0, 0; I: mov.b32 %r0, 1; @%p0 bra I;
        X: @%p1 bra O; Y: ret;"""
    assert meets(body) == {"I@2": "X", "O@3": "Y"}


def test_a_break_meets_behind_the_loop():
    body = "L: @%p0 bra X; mov.b32 %r0, 1; @%p1 bra L; Y: mov.b32 %r0, 2; X: ret;"
    assert meets(body) == {"X@0": "X", "L@2": "X"}


def test_ways_that_end_apart_meet_at_the_end():
    assert meets("@%p0 bra A; ret; A: mov.b32 %r0, 1; ret;") == {"A@0": "end"}


def test_an_endless_loop_has_an_end_for_the_graph():
    assert meets("@%p0 bra X; L: bra L; X: ret;") == {"X@0": "X", "L@1": "end"}


def test_a_loop_exit_laid_out_first():
    """As compilers do: the way out stands above the loop."""
    body = "bra H; X: mov.b32 %r0, 1; ret; H: @%p0 bra X; mov.b32 %r0, 2; bra H;"
    assert meets(body) == {"H@0": "H", "X@3": "X", "H@5": "H"}


# ---- tensor maps that the driver refuses

RIGHT = {"base": 1 << 40, "sizes": (64, 8), "strides": (128,), "box": (64, 8), "element": 2}


@pytest.mark.parametrize("changed, why", [
    ({"sizes": (), "strides": (), "box": ()}, "its rank is 0, not 1 to 5"),
    ({"sizes": (8,) * 6, "strides": (16,) * 5, "box": (8,) * 6}, "its rank is 6, not 1 to 5"),
    ({"strides": (128, 128)}, "sizes, strides and box are of different ranks"),
    ({"box": (64,)}, "sizes, strides and box are of different ranks"),
    ({"element": 3, "box": (16, 8)}, "no data type has 3 bytes"),
    ({"base": (1 << 40) + 8}, "its base is not aligned to 16 bytes"),
    ({"sizes": (0, 8)}, "a size of 0 is not in 1 to 2^32"),
    ({"sizes": (64, (1 << 32) + 1)}, "a size of 4294967297 is not in 1 to 2^32"),
    ({"strides": (120,)}, "a stride of 120 bytes is no multiple of 16 below 2^40"),
    ({"strides": (1 << 40,)}, "a stride of 1099511627776 bytes is no multiple of 16 below 2^40"),
    ({"strides": (-16,)}, "a stride of -16 bytes is no multiple of 16 below 2^40"),
    ({"box": (64, 0)}, "a box of 0 elements is not in 1 to 256"),
    ({"box": (64, 257)}, "a box of 257 elements is not in 1 to 256"),
    ({"box": (60, 8)}, "a box row of 120 bytes is no multiple of 16"),
    ({"swizzle": 4}, "swizzle mode 4 is unknown"),
    ({"swizzle": 2}, "a box row of 128 bytes is wider than its swizzle of 64"),
    ({"nan": True, "floating": False}, "NaN is asked for outside of a tensor of integers"),
])  # fmt: skip
def test_a_map_that_the_driver_refuses(changed, why):
    assert TensorMap(**{**RIGHT, **changed}).refusals() == [why]


def test_maps_that_it_takes():
    for swizzle, row in ((0, 64), (1, 16), (2, 32), (3, 64)):
        assert not TensorMap(**{**RIGHT, "swizzle": swizzle, "box": (row, 256)}).refusals()
    assert len(TensorMap(**RIGHT).encoded()) == 128


def test_what_is_no_map_is_found():
    code = """.shared .align 128 .b8 room[128]; mov.u32 %r0, room; mov.b64 %d0, box;
    cvta.param.u64 %d0, %d0;
    cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%d0, {0}], [%r0];"""
    with pytest.raises(Finding, match="what should be a tensor map is none"):
        launch(code, box=bytes(128))
