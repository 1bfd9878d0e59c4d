"""docs/: every example runs, every link leads somewhere, every public name is in the reference."""

import ast
import importlib.util
import inspect
import pydoc
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import fusedmlp
from fusedmlp import cli
from fusedmlp.bench import cli as bench
from fusedmlp.reference.activations import resolve as resolve_activation

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}
# Not about one family: they have sections of their own.
GENERAL = {"README.md", "batch_invariance.md", "device.md", "faq.md", "limits.md", "models.md",
           "patch_sweep.md", "trainers.md"}  # fmt: skip
FAMILIES = [name for name in PAGES if "/" not in name and name not in GENERAL]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")
REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)
EXAMPLES = [
    (name, page.read_text()[: block.start()].count("\n") + 2, block.group(1))
    for name, page in PAGES.items()
    for block in BLOCK.finditer(page.read_text())
]


@pytest.mark.parametrize(
    "name, line, code", EXAMPLES, ids=[f"{name}:{line}" for name, line, _ in EXAMPLES]
)
def test_example_runs(name, line, code):
    # Padded, so that a traceback shows the page's own line.
    exec(compile("\n" * (line - 1) + code, str(PAGES[name]), "exec"), {})


def test_the_readmes_examples_run_as_they_stand():
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert len(blocks) > 1
    for code in blocks:
        exec(code, {})


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith("https:"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("name", FAMILIES)
def test_page_of_a_family(name):
    text = PAGES[name].read_text()
    for heading in ("## When", "## Cost", "## Example"):
        assert f"\n{heading}" in text, heading
    assert any(page == name for page, _, _ in EXAMPLES)
    assert f"]({name})" in PAGES["README.md"].read_text()


def test_guides_are_in_the_index_and_have_an_example():
    guides = [name for name in PAGES if name.startswith("guides/")]
    assert guides
    for name in guides:
        assert f"]({name})" in PAGES["README.md"].read_text(), name
        assert any(page == name for page, _, _ in EXAMPLES), name


def migrations(heading):
    """(theirs, ours) of each row below a heading of the page about other libraries."""
    text = PAGES["guides/migrating.md"].read_text()
    part = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return [(row[0], row[1]) for row in rows if len(row) == 3]


@pytest.mark.parametrize("library", ["Liger-Kernel", "QuACK", "mlp_utils"])
def test_names_to_migrate_to_exist_with_their_arguments(library):
    calls = [code for _, ours in migrations(library) for code in re.findall(r"`([^`]+)`", ours)]
    assert len(calls) > 5
    for code in calls:
        tree = ast.parse(code, mode="eval").body
        call = tree if isinstance(tree, ast.Call) else None
        found = pydoc.locate(f"fusedmlp.{ast.unparse(call.func if call else tree)}")
        assert callable(found), code
        for keyword in call.keywords if call else ():
            parameter = inspect.signature(found).parameters[keyword.arg]
            if library == "mlp_utils":  # the value shown is the default
                assert parameter.default == ast.literal_eval(keyword.value), code
            elif keyword.arg == "activation":
                resolve_activation(ast.literal_eval(keyword.value))


def test_every_name_of_mlp_utils_has_its_row():
    theirs = " ".join(row[0] for row in migrations("mlp_utils"))
    layers = {
        *("FastFeedForward", "FeedForward", "GatingMechanism", "GLU", "MGLU", "Bilinear"),
        *("BilinearMGLU", "GeGLU", "GeMGLU", "ReGLU", "ReMGLU", "SwiGLU", "SwiMGLU", "GMLP", "MLP"),
        *("NGPT", "PathWeightedFFF", "ResidualWrapper", "SwitchFFN", "L2Norm", "NormLinear"),
        *("Scale", "GMLPBlock", "SpatialGatingUnit"),
    }
    activations = {"ReluSquared", "Gelu2", "BSiLU", "NeLU", "StraightThroughEstimator", "Sugar"}
    initialisers = {"initialize_weights", "apply_initialization", "create_initializer"}
    for name in layers | activations | {"ReluNelu", "SugarReLU"} | initialisers:
        assert re.search(rf"\b{name}\b", theirs), name


def test_the_command_prints_the_pages(capsys):
    assert cli.main(["docs"]) == 0
    out = capsys.readouterr().out
    for name, page in PAGES.items():
        if not name.startswith("api/"):
            title = page.read_text().partition("\n")[0].removeprefix("# ")
            assert re.search(rf"^{page.stem} +{re.escape(title)}$", out, re.MULTILINE), name
    assert str(Path(fusedmlp.__file__).parent / "docs") in out
    assert cli.main(["docs", "saving"]) == 0
    assert capsys.readouterr().out == PAGES["guides/saving.md"].read_text()
    assert cli.main(["docs", "../../examples/one_bit_gguf.py"]) == 0
    assert capsys.readouterr().out == (ROOT / "examples/one_bit_gguf.py").read_text()
    assert cli.main(["docs", "nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fusedmlp docs: PAGE must be one of README, ") and "nowhere" in line


def test_the_command_takes_every_link_between_pages(capsys):
    for name, page in PAGES.items():
        for target, _ in LINK.findall(page.read_text()):
            file = (page.parent / target).resolve()
            if target and file.is_relative_to(DOCS) and not target.startswith("https:"):
                relative = file.relative_to(DOCS).as_posix()  # as a reader of any folder types it
                assert cli.main(["docs", relative]) == 0, (name, target)
    capsys.readouterr()


def test_the_command_prints_the_reference_with_docstrings(capsys):
    for name, page in PAGES.items():
        if paths := REFERENCE.findall(page.read_text()):
            assert cli.main(["docs", name]) == 0
            out = capsys.readouterr().out
            assert ":::" not in out
            for path in paths:
                assert f"## {path}" in out and inspect.getdoc(resolve(path)) in out, path


def test_names_in_the_index_exist():
    table = [line for line in PAGES["README.md"].read_text().splitlines() if "](" in line]
    names = {name for line in table for name in re.findall(r"`(\w+)`", line)}
    elsewhere = {"NormLinear", "Scale", "GMLPBlock", "SpatialGatingUnit"}
    elsewhere |= {"HyperGLU", "HyperMLP", "HyperGLUConfig"}
    assert names >= {"FeedForward", "NGPT", "GMLP", "ReluNelu"} | elsewhere
    for name in names - elsewhere:
        assert hasattr(fusedmlp, name), name


def test_the_site_has_every_page_and_no_other():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    listed = re.findall(r"(\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)


def resolve(path):
    """The object that a line `::: path` of the API reference stands for."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_api_reference_has_every_public_name():
    paths = [path for page in PAGES.values() for path in REFERENCE.findall(page.read_text())]
    assert len(paths) == len(set(paths))
    there = [resolve(path) for path in paths]
    for name in fusedmlp.__all__:
        value = getattr(fusedmlp, name)
        if value.__module__.startswith("torch."):  # torch.nn's own, named on the page
            assert f"`{name}`" in PAGES["api/activations.md"].read_text()
        else:
            assert any(value is other for other in there), f"no ::: line for fusedmlp.{name}"
    for name in importlib.import_module("fusedmlp.distributed").__all__:
        assert f"fusedmlp.distributed.{name}" in paths


def test_the_api_reference_is_documented():
    for page in PAGES.values():
        for path in REFERENCE.findall(page.read_text()):
            assert inspect.getdoc(resolve(path)), path


def test_every_command_is_on_its_page(capsys):
    text = PAGES["api/commands.md"].read_text()
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    ours = re.findall(r"^    ([a-z-]+)(?= |$)", capsys.readouterr().out, re.MULTILINE)
    assert {"doctor", "bench", "patch-report"} <= set(ours)
    commands = bench.parser()._subparsers._group_actions[0].choices
    for command in (*ours, *(f"bench {name}" for name in commands)):
        assert f"`fusedmlp {command}" in text, command
    for command in re.findall(r"`fusedmlp bench ([a-z-]+)`", text):
        assert command in commands


def test_links_out_of_docs_are_named_on_the_site():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)

    def shown(markdown, source):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
        return hooks.on_page_markdown(markdown, page=page)

    assert shown("[a](dense.md)", "moe.md") == "[a](dense.md)"
    assert shown("[a](../dense.md#cost)", "api/moe.md") == "[a](../dense.md#cost)"
    assert shown("[R](../README.md)", "moe.md") == "R (`README.md` in the repository)"
    assert shown("[bench/R.md](../bench/R.md)", "moe.md") == "`bench/R.md`"
