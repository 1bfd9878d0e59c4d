"""What imports what: no circle of files or of folders, no private name taken from another file."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINKED = ("kernels", "bench")  # imported as fusedmlp.kernels and fusedmlp.bench


def files():
    """module -> its file, of everything that is imported as fusedmlp."""
    found = {}
    for folder in ("fusedmlp", *LINKED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("fusedmlp", name) for name in LINKED):
                continue  # through a link
            parts = ("fusedmlp", *parts) if folder in LINKED else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def imports(module, path):
    """(module, name) of every import of ours, those inside functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - max(node.level - 1, 0)]
            source = ".".join(base if node.level else ()) + ("." if node.level else "")
            source = (source + (node.module or "")).rstrip(".")
            yield from ((source, alias.name) for alias in node.names)


def graph():
    """file -> files that it imports."""
    arrows = {module: set() for module in FILES}
    for module, path in FILES.items():
        for source, name in imports(module, path):
            target = next((m for m in (f"{source}.{name}", source) if m in FILES), None)
            if target not in (None, module):
                arrows[module].add(target)
    return arrows


def circle(arrows):
    """One circle, as the list of what it goes through; [] where there is none."""
    done, on_the_way = set(), []

    def visit(node):
        if node in on_the_way:
            return [*on_the_way[on_the_way.index(node) :], node]
        if node in done:
            return []
        on_the_way.append(node)
        for target in sorted(arrows.get(node, ())):
            if found := visit(target):
                return found
        done.add(on_the_way.pop())
        return []

    return next((found for node in sorted(arrows) if (found := visit(node))), [])


def room(module):
    """The folder of a file, as far as the second level; a file on the first level of fusedmlp or
    bench, which hold the lowest and the highest ones, is its own room."""
    parts = FILES[module].relative_to(ROOT).parts
    return "/".join(parts[:2]) if len(parts) > 2 or parts[0] != "kernels" else "kernels"


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_circle_of_files():
    arrows = graph()
    assert sum(map(len, arrows.values())) > 500, "imports were not read"
    assert circle(arrows) == []


def test_no_circle_of_folders():
    rooms = {}
    for module, targets in graph().items():
        for target in targets:
            if room(module) != room(target):
                rooms.setdefault(room(module), set()).add(room(target))
    assert {"kernels/dense", "kernels"} <= rooms.keys() | set().union(*rooms.values())
    assert circle(rooms) == []


def test_no_private_name_is_taken_from_another_file():
    """No private name of ours is imported; a file itself may be private to the package."""
    taken = [
        f"{path.relative_to(ROOT)}: {source}.{name}"
        for module, path in FILES.items()
        for source, name in imports(module, path)
        if name.startswith("_") and not name.startswith("__") and source.startswith("fusedmlp")
        if f"{source}.{name}" not in FILES
    ]
    assert not taken


def test_the_mathematics_imports_no_kernel():
    """fusedmlp/reference and what it imports of ours can be read and run without Triton."""
    arrows = graph()
    for module in FILES:
        if module.startswith("fusedmlp.reference"):
            others = {m for m in arrows[module] if not m.startswith("fusedmlp.reference")}
            allowed = {"fusedmlp.invariance", "fusedmlp.packing", "fusedmlp.transforms"}
            assert others <= allowed, module
            assert "triton" not in {
                source.partition(".")[0] for source, _ in imports(module, FILES[module])
            }
