"""tests/long.txt and tests/nightly.txt: what they list is there, and runs where it is asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTED = [
    line
    for mark in ("long", "nightly")
    for line in (ROOT / f"tests/{mark}.txt").read_text().splitlines()
    if line and line[0] != "#"
]


ELSEWHERE = [
    f"--ignore={path.relative_to(ROOT)}"
    for path in (ROOT / "tests").iterdir()
    if path.is_dir() and path.name not in ("hub", "prove", "kernels")
]


@pytest.mark.parametrize("line", LISTED)
def test_a_listed_test_is_there(line):
    file, _, test = line.partition("::")
    text = (ROOT / file).read_text()
    assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE)
    assert LISTED.count(line) == 1 and (not test or file not in LISTED)


@pytest.mark.parametrize(
    ("asked", "runs"),
    [
        (["tests", *ELSEWHERE], set()),
        (["tests/hub", "tests/prove/test_prove.py", "tests/kernels"], {"hub", "prove", "kernels"}),
        (["-m", "long", "tests", *ELSEWHERE], {"hub", "prove"}),
        (["-m", "nightly", "tests", *ELSEWHERE], {"kernels"}),
        (["-m", "not slow and not long and not nightly", "tests/hub", "tests/kernels"], set()),
    ],
)
def test_they_run_where_their_file_folder_or_mark_is_named(asked, runs):
    # Without xdist, since no option of it may stand in pyproject.toml: a GPU's machine may lack it.
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", *asked]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    of = {"hub": "::test_its_own_tests_pass", "prove": "::test_a_tool_that_does_not_install",
          "kernels": "::test_a_damaged_result_fails"}  # fmt: skip
    assert {room for room, test in of.items() if test in out} == runs
