"""The tool that puts faults into the code: its tables, and what it draws from them."""

from functools import cache
from pathlib import Path

import mutants_draw as draw
import pytest
from mutants_base import ROOT, MutantError
from mutants_cuda import cuda_mutants
from mutants_lists import EQUIVALENT, FAULTS, Equivalent, Fault
from mutants_python import changes, python_mutants
from mutants_rooms import NOT_DRAWN, ROWS

# ---- the tables


def test_every_source_file_has_its_tests():
    rows = {path: draw.row_of(path) for path in draw.files()}
    assert len(rows) > 150
    assert set(ROWS) <= set(rows.values())
    left_out = [path for path, row in rows.items() if row is None]
    for glob in NOT_DRAWN:
        assert any(Path(path).match(glob) for path in left_out), glob
    with pytest.raises(MutantError, match="csrc/new.cu: must be in a row of mutants_rooms.py"):
        draw.row_of("csrc/new.cu")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.sources[0])
def test_what_a_row_names_is_there(row):
    assert all(any(ROOT.glob(glob)) for glob in row.sources)
    assert all((ROOT / file).is_file() for file in row.tests)


def test_the_hand_list_is_of_todays_code():
    assert len(list(draw.by_hand(list(ROWS)))) == len(FAULTS)


@pytest.mark.parametrize("old, count", [("no such text", 0), ("import", "[0-9]+")])
def test_a_fault_whose_text_is_not_there_once_is_refused(old, count):
    fault = Fault("fusedmlp/packing.py", old, "", "")
    with pytest.raises(
        MutantError, match=f"packing.py: must hold .* holds it {count} times; .*{old}"
    ):
        list(draw.by_hand(list(ROWS), [fault]))


@cache
def mutants_in(path):
    text = (ROOT / path).read_text()
    return text, draw.mutants_of(path, text)


@pytest.mark.parametrize("row", EQUIVALENT, ids=lambda row: f"{row.path} {row.after}")
def test_an_equivalent_is_still_drawn(row):
    """In one place: a row must not speak for another line of the same words."""
    text, found = mutants_in(row.path)
    assert len({m.line(text) for m in found if draw.reason(m, text, [row])}) == 1
    assert row.reason


def test_a_reason_is_found_by_both_lines():
    (mutant,) = python_mutants("a.py", "if 1:\n    y = a < b\n")[-1:]
    row = Equivalent("a.py", "y = a < b", "y = a <= b", "never equal")
    assert mutant.lines("if 1:\n    y = a < b\n") == (row.before, row.after)
    assert draw.reason(mutant, "if 1:\n    y = a < b\n", [row]) == "never equal"
    assert draw.reason(mutant, "if 1:\n    y = a < b\n", [row._replace(path="b.py")]) is None


# ---- what is drawn


def test_a_seed_repeats_and_another_differs():
    rows = draw.rows_of(["ops", "csrc"])
    mine, again, other = (list(draw.drawn(rows, 4, seed)) for seed in (1, 1, 2))
    assert mine == again and len(mine) == len(set(mine)) == 8
    assert mine != other
    barriers = list(draw.drawn(draw.rows_of(["csrc"]), 5, 1, "statement dropped"))
    assert [mutant.operator for mutant in barriers] == 5 * ["statement dropped"]
    files = list(draw.drawn(rows, 3, 1, globs=["ops/m*.py", "gemm.cuh"]))
    assert {m.path for m in files if m.path.startswith("csrc")} == {"csrc/gemm.cuh"}
    assert {Path(m.path).name[0] for m in files if m.path.endswith(".py")} == {"m"}
    with pytest.raises(MutantError, match="--file must match a file .*, got ops/nothing.py"):
        list(draw.drawn(rows, 9, 1, globs=["gemm.cuh", "ops/nothing.py"]))
    alone = list(draw.drawn(draw.rows_of(["ops"]), 4, 1))
    assert alone == [mutant for mutant in mine if draw.row_of(mutant.path).room == "ops"]


@pytest.mark.parametrize(
    "code, operator, mutated",
    [
        ("y = a < b", "comparison", ["y = a <= b"]),
        ("y = a is not b", "comparison", ["y = a is b"]),
        ("y = (a) + (b)", "arithmetic", ["y = (a) - (b)"]),
        ("y += b", "arithmetic", ["y -= b"]),
        ("y = a and b", "and, or", ["y = a or b"]),
        ("y = a and b", "operand dropped", ["y = a"]),
        ("y = not a", "not dropped", ["y = a"]),
        ("y = -a", "sign dropped", ["y = a"]),
        ("y = n % 16", "constant off by one", ["y = n % 15", "y = n % 17"]),
        ("y = n % 16", "constant halved", ["y = n % 8"]),
        ("y = 0.5", "constant doubled", ["y = 1.0"]),
        ("y = True", "boolean", ["y = False"]),
        ("y = f(a, b=c)", "keyword dropped", ["y = f(a)"]),
        ("y = f(b=c, d=e)", "keyword dropped", ["y = f(b=c)", "y = f(d=e)"]),
        ("y = f(rtol=1e-9, by=0.5)", "constant doubled", ["y = f(rtol=1e-9, by=1.0)"]),
        ("y = f(a, b)", "arguments swapped", ["y = f(b, a)"]),
        ("y = min(a, b) + c.maximum(d, e)", "arguments swapped", []),
        ("y = t.amin(a)", "its neighbour", ["y = t.amax(a)"]),
        ("y = t.detach()", "call dropped", ["y = t"]),
        ("f(a)", "statement dropped", ["pass"]),
        ("if a: f()", "condition negated", ["if not (a): f()"]),
        ("if a: raise E()", "refusal dropped", ["if False: raise E()"]),
        ("y = [a for a in b if a]", "filter dropped", ["y = [a for a in b if True]"]),
        ("def f(): return a, b", "returns swapped", ["def f(): return b, a"]),
        ("def f(stride_a, stride_b): g(stride_a)", "another stride",
         ["def f(stride_a, stride_b): g(stride_b)"]),
        ("y = 'ä' + str(a < b)", "comparison", ["y = 'ä' + str(a <= b)"]),
    ],
)  # fmt: skip
def test_operators_of_python(code, operator, mutated):
    found = [m for m in python_mutants("a.py", code) if m.operator == operator]
    assert sorted(m.applied(code) for m in found) == mutated
    assert all(changes(code, mutant) for mutant in found)


@pytest.mark.parametrize(
    "code",
    [
        '"""1 + 1."""',
        "# 1 + 1",
        "def f(x: int | None = None) -> list[int]: return x",
        "raise ValueError(f'{a + 1}')",
        "y = warnings.warn(f'{a}', stacklevel=2)",
        "y = f'{a + 1}'",
        "__all__ = ['a'] + b",
        "__all__ += b",
        "y: int | None",
        "if TYPE_CHECKING: import a",
        "y = f(num_warps=4)",
        "y = zip(a, strict=True)",
        "y = 'a' + 'b'",
    ],
)
def test_what_changes_no_result_is_not_drawn(code):
    assert python_mutants("a.py", code) == []


@pytest.mark.parametrize(
    "code, operator, mutated",
    [
        ("  if (a < b) f(c);", "comparison", ["  if (a <= b) f(c);"]),
        ("  x = a + b;", "arithmetic", ["  x = a - b;"]),
        ("  x = a && b;", "and, or", ["  x = a || b;"]),
        ("  x = y % 16;", "constant halved", ["  x = y % 8;"]),
        ("  x[4] = y;", "constant off by one", ["  x[3] = y;", "  x[5] = y;"]),
        ("    __syncthreads();  // all", "statement dropped", ["    ;  // all"]),
        ("  if (a) wait<1>(b);", "statement dropped", ["  if (a) ;"]),
        ("  if (f(a) == b) {", "condition negated", ["  if (!(f(a) == b)) {"]),
    ],
)
def test_operators_of_cuda(code, operator, mutated):
    found = [m for m in cuda_mutants("a.cu", f"{code}\n") if m.operator == operator]
    assert sorted(m.applied(code) for m in found) == mutated


@pytest.mark.parametrize(
    "code",
    [
        "// a < b",
        '  fail("a < b");  // 1'.replace("fail", "x = y"),
        "template <int N = 1>",
        "  float x[4];",
        "int f(T* map, const uint64_t size[3],",
        "  const int y = a < b ? a : b;",
        "#ifdef __CUDA_ARCH__\n  x = a + b;\n#else\n  x = a - b;\n#endif",
        "#if 1 + 1",
    ],
)
def test_what_cannot_fail_on_the_host_is_not_drawn(code):
    assert cuda_mutants("a.cu", f"{code}\n") == []


def test_the_boundary_of_a_minimum_is_not_drawn():
    found = cuda_mutants("a.cu", "  y = a - c < b ? a - c : b;\n")
    assert {m.operator for m in found} == {"arithmetic"}
