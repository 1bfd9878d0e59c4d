"""The pages of docs/: every example runs, every link leads somewhere, the index is complete."""

import re
from pathlib import Path

import pytest

import fusedmlp

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
EXAMPLES = [
    (page, page.read_text()[: block.start()].count("\n") + 2, block.group(1))
    for page in PAGES
    for block in BLOCK.finditer(page.read_text())
]


@pytest.mark.parametrize(
    "page, line, code", EXAMPLES, ids=[f"{page.name}:{line}" for page, line, _ in EXAMPLES]
)
def test_example_runs(page, line, code):
    # Padded, so that a traceback shows the page's own line.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {})


def test_the_readme_starts_with_an_example_that_runs():
    first = BLOCK.search((DOCS.parent / "README.md").read_text()).group(1)
    exec(first.replace('"cuda"', '"cpu"').replace("512", "4"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page):
    text = page.read_text()
    for target in LINK.findall(text):
        assert (DOCS / target).exists(), target
    if page.name == "README.md":
        return
    for heading in ("## When", "## Cost", "## Example"):
        assert f"\n{heading}" in text, heading
    assert any(name == page for name, _, _ in EXAMPLES)
    assert f"]({page.name})" in (DOCS / "README.md").read_text()


def test_names_in_the_index_exist():
    table = [line for line in (DOCS / "README.md").read_text().splitlines() if "](" in line]
    names = {name for line in table for name in re.findall(r"`(\w+)`", line)}
    elsewhere = {"NormLinear", "Scale", "GMLPBlock", "SpatialGatingUnit"}
    elsewhere |= {"HyperGLU", "HyperMLP", "HyperGLUConfig"}
    assert names >= {"FeedForward", "NGPT", "GMLP", "ReluNelu"} | elsewhere
    for name in names - elsewhere:
        assert hasattr(fusedmlp, name), name
