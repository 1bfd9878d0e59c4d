"""Comments and docstrings are sentences."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fusedmlp", "kernels", "bench", "csrc", "tests", "examples")
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp"}
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and path.resolve() == path
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_comment_is_a_genitive_without_its_noun(folder):
    """In "Of each tile, its parts" a reader looks for the noun, so it comes first."""
    opening = re.compile(r'^\s*(#|//|"""|\*) ?Of [a-z`]', re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}: {match[0].strip()}"
        for path in FILES
        if path.is_relative_to(ROOT / folder) and path != Path(__file__)
        for match in opening.finditer(path.read_text())
    ]
    assert not found
