"""One fact, one place: the tree has the shape the README draws, and says so when it does not."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import fusedmlp
from fusedmlp.backends.op import OPS, public_ops
from fusedmlp.kernels.arch import ARCHES, INTERPRETER
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.testing import CASES

ROOT = Path(__file__).parents[2]
FILES = {p.stem for p in (ROOT / "fusedmlp/ops").glob("*.py") if not p.stem.startswith("_")}


def missing(op):
    """What an op still lacks beside its row, as places to write it in."""
    row, places = OPS[op], []
    if op not in fusedmlp.reference.__all__:
        places.append(f"fusedmlp/reference/__init__.py: {op}")
    if row.public and op not in typed_names():
        places.append(f"fusedmlp/typed_ops.py: {op}")
    if row.public and row.within not in OPS and not any(c.op == op for c in CASES.values()):
        places.append(f"fusedmlp/testing/: a Case of {op}")
    if row.public:
        places += [f"{file}: {line}" for file, line in listed(op) if line not in lines_of(file)]
        said = {file: how for file, how in SAID.items() if not row.within or file != "README.md"}
        places += [f"{file}: {how}" for file, how in said.items() if f"`{op}`" not in text_of(file)]
    own = [c for c in CASES.values() if c.op == op]
    if own and not all(c.flops(64, 32, 48) > 0 for c in own):
        remedy = "what is useful; counted=no_products, where none of it is a product"
        places.append(f"{row.function.__module__}: flops above 0: {remedy}")
    if not row.function.__doc__:
        places.append(f"{row.function.__module__}: what {op} computes, as its docstring")
    return places


# Pages that name every op, and what writes it there.
SAID = {
    "README.md": "make it again, by fusedmlp bench report",
    "CHANGELOG.md": "what the new op is",
}


def listed(op):
    """(file, the line of `op` in it) of the lists that no row is read for."""
    yield "docs/api/*.md", f"::: fusedmlp.{op}"
    signature = inspect.signature(OPS[op].function).parameters.values()
    given = [f"{p.name}={p.default!r}" for p in signature if p.default is not p.empty]
    if given:
        yield "tests/house/defaults.txt", f"{op}({', '.join(given)})"


def text_of(pattern):
    return "".join(path.read_text() for path in sorted(ROOT.glob(pattern)))


def lines_of(pattern):
    return text_of(pattern).splitlines()


def typed_names():
    tree = ast.parse((ROOT / "fusedmlp/typed_ops.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname for node in nodes for alias in node.names}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_places(op):
    assert not missing(op)


def test_every_file_of_ops_has_a_row_and_type_checkers_see_no_other():
    assert OPS.keys() >= FILES
    assert typed_names() == set(public_ops())
    assert set(public_ops()) <= set(fusedmlp.__all__)


def test_ops_are_listed_by_their_names():
    """Whichever file was imported first."""
    assert list(OPS) == sorted(OPS) and public_ops() == sorted(public_ops())


def test_linked_folders():
    """kernels/ and bench/ are imported through symlinks, docs/ and examples/ are read
    through them; kernels/ must not be a package of its own."""
    for name in ("kernels", "bench", "docs", "examples"):
        link = ROOT / "fusedmlp" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
        assert not (ROOT / "kernels/__init__.py").exists()


def sources():
    return [p for d in ("fusedmlp", "kernels", "bench") for p in sorted((ROOT / d).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_through_the_package(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not {n.partition(".")[0] for n in names} & {"kernels", "bench"}


def test_activation_names_stand_in_one_table():
    """No other file lists them: a new row must be enough."""
    for path in sources():
        if path.name == "activations.py" and "reference" in path.parts:
            continue
        listed = [n for n in ACTIVATIONS if re.search(rf"[\"']{n}[\"']", path.read_text())]
        assert len(listed) < len(ACTIVATIONS), path


def test_every_arch_has_tiles_for_every_kernel():
    kernels = INTERPRETER.tiles.keys()
    for arch in ARCHES.values():
        assert arch.tiles.keys() == kernels
        for (kernel, size), tiles in arch.tiles.items():
            loads = [t.loads for t in tiles if not t.skinny]
            assert "element" in loads and len(set(loads)) == 2, (arch.name, kernel)
            # An expert's rows are the depth of moe_wgrad, where TMA would read the next one's too.
            assert ("tma" in loads) == (arch.tma and size == 2 and kernel != "moe_wgrad")


def test_no_gpu_code_outside_kernels():
    for path in sources():
        if "kernels" not in path.parts:
            assert "\n@triton.jit" not in path.read_text(), path
