"""The command line, and what the package says of itself."""

import re
from pathlib import Path

import pytest
import torch
from patch_models import build
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

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
        "LlamaForCausalLM: 2 patched, 0 left\nmodel.layers.0.mlp (LlamaMLP): gated_mlp on"
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
    assert text.count("gated_act on") == 2 and text.count("gate_proj is a gptq.Linear") == 2
    config.quantization_config = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["model.layers.1.mlp"],
    }
    config.save_pretrained(tmp_path)
    assert cli.main(["patch-report", str(tmp_path)]) == 0
    assert "LlamaForCausalLM: 2 patched (1 in part), 0 left" in capsys.readouterr().out


MLP = "model.layers.0.mlp"


def reported(folder, settings):
    config = build("llama").config
    config.architectures = ["LlamaForCausalLM"]
    config.hidden_size, config.intermediate_size = 128, 256  # whole groups of one-bit weights
    config.quantization_config = settings
    config.save_pretrained(folder)
    return cli.main(["patch-report", str(folder)])


@pytest.mark.parametrize(
    ("settings", "text"),
    (
        ({"quant_method": "fusedmlp", "format": "q9_9", "modules": [MLP]}, "got 'q9_9'"),
        (
            {"quant_method": "fusedmlp", "format": "q1_0", "modules": ["model.layers.7.mlp"]},
            "LlamaForCausalLM has no model.layers.7.mlp",
        ),
        ({"quant_method": "fp8", "weight_block_size": "nonsense"}, "weight_block_size"),
        ({"quant_method": "fp8", "activation_scheme": "bogus"}, "bogus"),
        ({"quant_method": "gptq"}, "'bits'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": "yes"}, "load_in_4bit"),
        ({"bits": 4}, "no `quant_method`"),
    ),
)
def test_patch_report_of_a_broken_quantisation(settings, text, tmp_path, capsys):
    """What from_pretrained would raise, and no report of another model."""
    assert reported(tmp_path, settings) == 2
    said = capsys.readouterr()
    line = said.err.splitlines()[-1]
    assert "patch-report: config.json must describe a model of transformers, got " in line
    assert text in line and not said.out


# What a quantiser's validate_environment and preprocess_model raise -> the exit code, and what the
# report has.
QUANTISER_RAISES = (
    (ImportError, None, 0, "finegrained_fp8.FP8Linear"),
    (ImportError, ImportError, 0, "gate_proj is a fp8.Linear"),
    (ImportError, NameError, 0, "gate_proj is a fp8.Linear"),
    (ImportError, AttributeError, 0, "gate_proj is a fp8.Linear"),
    (ImportError, ValueError, 2, ""),
    (RuntimeError, None, 0, "finegrained_fp8.FP8Linear"),
    (RuntimeError, NameError, 2, ""),
    (ValueError, None, 2, ""),
    (TypeError, None, 2, ""),
    (None, ImportError, 0, "gate_proj is a fp8.Linear"),
    (None, AttributeError, 2, ""),
)


@pytest.mark.parametrize(("environment", "model", "code", "text"), QUANTISER_RAISES)
def test_patch_report_where_a_quantiser_raises(
    environment, model, code, text, tmp_path, capsys, monkeypatch
):
    """A stand-in is for a package that is not here, and a GPU is not needed."""
    raise_in(monkeypatch, "fp8", "validate_environment", environment)
    if model:
        raise_in(monkeypatch, "fp8", "preprocess_model", model)
    assert reported(tmp_path, {"quant_method": "fp8"}) == code
    said = capsys.readouterr()
    assert text in said.out and bool(said.out) == (code == 0)
    assert code == 0 or f"got {(model or environment).__name__}: planted" in said.err


def test_nothing_stands_in_for_the_own_quantiser(tmp_path, capsys, monkeypatch):
    settings = {"quant_method": "fusedmlp", "modules": [MLP]}
    assert reported(tmp_path, settings) == 0
    assert f"{MLP} (BinaryGatedMLP): binary_gated_mlp" in capsys.readouterr().out
    raise_in(monkeypatch, "fusedmlp", "preprocess_model", ImportError)
    assert reported(tmp_path, settings) == 2
    said = capsys.readouterr()
    assert "got ImportError: planted" in said.err and not said.out


def raise_in(monkeypatch, method, function, error):
    def planted(*_, **__):
        if error:
            raise error("planted")

    monkeypatch.setattr(AUTO_QUANTIZER_MAPPING[method], function, planted)


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
