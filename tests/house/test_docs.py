"""docs/: every example runs, every link leads somewhere, every public name is in the reference."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import fusedmlp
from fusedmlp import cli
from fusedmlp.bench import cli as bench

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}
# Not about one family: they have sections of their own.
GENERAL = {"README.md", "device.md", "faq.md", "limits.md", "models.md"}
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


def test_the_readme_starts_with_an_example_that_runs():
    first = BLOCK.search((ROOT / "README.md").read_text()).group(1)
    exec(first.replace('"cuda"', '"cpu"').replace("512", "4"), {})


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
    for command in re.findall(r"`fusedmlp bench ([a-z]+)`", text):
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
