"""The command line, and what the package says of itself."""

import re
from pathlib import Path

import pytest
import torch
from patch_models import build

import fusedmlp
from fusedmlp import cli

ROOT = Path(__file__).parents[2]


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"fusedmlp {fusedmlp.__version__}" in text and "torch 2" in text
    assert text.count("forward and backward: right") == 3


def test_bench_is_the_bench(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0 and "usage: fusedmlp bench" in capsys.readouterr().out


def test_patch_report(tmp_path, capsys):
    config = build("llama").config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert cli.main(["patch-report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "LlamaForCausalLM: 2 patched, 0 left\nmodel.layers.0.mlp (LlamaMLP): gated_mlp (on"
    )
    assert cli.main(["patch-report", str(tmp_path / "nowhere")]) == 2
    assert "MODEL_DIR must hold a config.json, got" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["patch_report"])
    assert stop.value.code == 2


def test_patch_report_of_a_quantised_checkpoint(tmp_path, capsys):
    """What the report says is what patch() would say of the loaded model."""
    config = build("llama").config
    config.architectures = ["LlamaForCausalLM"]
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    assert cli.main(["patch-report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("LlamaForCausalLM: 2 patched (2 in part), 0 left")
    assert text.count("gated_act (on") == 2 and text.count("gate_proj is a gptq.Linear") == 2
    config.quantization_config = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["model.layers.1.mlp"],
    }
    config.save_pretrained(tmp_path)
    assert cli.main(["patch-report", str(tmp_path)]) == 0
    assert "LlamaForCausalLM: 2 patched (1 in part), 0 left" in capsys.readouterr().out


def test_patch_report_in_the_checkpoints_dtype(tmp_path, capsys):
    config = build("llama").config
    config.dtype = torch.float64
    config.save_pretrained(tmp_path)
    assert cli.main(["patch-report", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("left, its dtypes are torch.float64") == 2


@pytest.mark.parametrize(
    "text",
    (
        "{not json",
        "[1]",
        '{"model_type": "nosuch"}',
        '{"hidden_size": 4}',
        '{"model_type": "llama", "hidden_size": "abc"}',
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}',
    ),
)
def test_patch_report_of_what_is_no_configuration(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "mine.py").write_text("raise SystemExit('code beside a configuration was run')")
    assert cli.main(["patch-report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "patch-report: config.json must describe a model of transformers, got " in line


def test_the_console_script_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'fusedmlp = "fusedmlp.cli:main"' in text


def test_versions_agree():
    version = fusedmlp.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_paper_is_cited():
    """Every arXiv number in the code and the docs stands in CITATION.cff."""
    files = [*(ROOT / "docs").glob("*.md"), *(ROOT / "fusedmlp").rglob("*.py")]
    texts = [p.read_text() for p in files if "bench" not in p.relative_to(ROOT).parts]
    number = re.compile(r"ar[xX]iv[\s:]+(\d{4}\.\d{5})")
    used = {n for text in texts for n in number.findall(text)}
    cited = set(re.findall(r"arxiv.org/abs/(\d{4}\.\d{5})", (ROOT / "CITATION.cff").read_text()))
    assert used and used <= cited
