"""The scripts of examples/: each runs, and what it prints shows that it did what it says."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedmlp

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LOSS = re.compile(r"^step +\d+  loss (\d+\.\d+)", re.MULTILINE)


def run(name, *arguments):
    """What the script prints. It finds this checkout, and no interpreter of Triton, as a user's
    shell has none."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(printed):
    found = [float(loss) for loss in LOSS.findall(printed)]
    assert len(found) > 2, printed
    return found


def number(before, printed):
    return float(re.search(re.escape(before) + r" *([\d.e+-]*\d)", printed).group(1))


def test_finetune_patched(device):
    printed = run("finetune_patched", "--device", device, "--steps", "60")
    assert printed.startswith("2 patched, 0 left"), printed
    loss = losses(printed)
    assert loss[-1] < loss[0] / 2
    assert number("logits differ by", printed) < 1e-4


def test_lora_patched(device):
    printed = run("lora_patched", "--device", device, "--steps", "30")
    assert printed.startswith("2 patched, 0 left"), printed
    loss = losses(printed)
    assert loss[-1] < 0.9 * loss[0]
    assert number("losses differ by", printed) < 1e-4
    plain, ours = (
        float(number(before, printed.replace(",", "")))
        for before in ("saved for backward: unpatched", "bytes patched")
    )
    assert ours <= plain if device == "cpu" else ours < plain
    assert number("logits differ by", printed) < 1e-4


def test_moe_fsdp2(device):
    printed = run("moe_fsdp2", "--device", device, "--steps", "20", "--rows", "256")
    loss = losses(printed)
    # Guessing costs 4.16; nothing can do much better than the least loss.
    assert number("least loss", printed) * 0.7 < loss[-1] < loss[0] / 2
    if device == "cpu":
        assert "w_gate (4, 128, 64): rank 0 of 2 holds (2, 128, 64)" in printed


@pytest.mark.parametrize("masks", [1, 2])
def test_decode_frozen_masks(device, masks):
    printed = run(
        "decode_frozen_masks", "--device", device, "--steps", "40", "--length", "24",
        "--masks", str(masks),
    )  # fmt: skip
    loss = losses(printed)
    assert loss[-1] < loss[0] / 2
    assert "decoded: the quick brown fox jumps over t" in printed
    assert "same text with masks as logits: True" in printed
    weights = 2 * 128 * 512
    assert number("masks as bfloat16 logits:", printed) == 2 * (1 + masks) * weights
    assert number("masks frozen:", printed) == (16 + masks) * weights / 8
    assert number("bfloat16 weights of this width:", printed) == 4 * weights


def test_one_bit_gguf(device, tmp_path):
    file = tmp_path / "mlps.gguf"
    printed = run("one_bit_gguf", "--device", device, "--out", str(file))
    assert printed.startswith("2 MLPs in q1_0: 2.25 MiB -> 0.16 MiB (14.2 times smaller)")
    assert "the same numbers from the file: True" in printed
    weights = fusedmlp.read_gguf(file)
    assert number("wrote", printed) == len(weights) == 6
    assert weights["blk.1.ffn_down.weight"].shape == (256, 768)


def test_hyperglu_lm(device):
    printed = run("hyperglu_lm", "--device", device, "--steps", "40", "--context", "32")
    loss = losses(printed)
    assert loss[-1] < loss[0] / 2
    assert "written: ann sees a " in printed
    assert "decoded step by step as by one forward: True" in printed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_documented_tested_and_public(path):
    tree = ast.parse(path.read_text())
    text = ast.get_docstring(tree)
    assert f"python examples/{path.name} " in text and "--device cpu" in text
    assert f"test_{path.stem}" in globals()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fusedmlp":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not any(name.startswith("_") for name in names), names
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr.startswith("__"), node.attr
