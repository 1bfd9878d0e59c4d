"""The command line, the folder of a Hub kernel, and what the package says of itself."""

import base64
import hashlib
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from patch_models import build
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedmlp
from fusedmlp import cli
from fusedmlp.hub import __main__ as hub, layers

ROOT = Path(__file__).parents[2]
# layer -> a model whose MLP has the members that the layer reads
LAYERS = {"FusedSwiGLUMLP": "llama", "FusedGeGLUMLP": "gemma", "FusedPackedSwiGLUMLP": "phi3"}


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


@pytest.mark.parametrize("name", LAYERS)
def test_a_hub_layer_has_no_state_of_its_own(name):
    layer = getattr(layers, name)
    assert layer.__bases__ == (nn.Module,)
    own = {k for k in vars(layer) if not (k.startswith("__") and k.endswith("__"))}
    assert own - {"_abc_impl"} == {"forward", "has_backward", "can_torch_compile"}
    assert "__init__" not in vars(layer)
    assert layer.has_backward is True and layer.can_torch_compile is True
    members = {k for k in layer.__annotations__ if k not in ("has_backward", "can_torch_compile")}
    assert members <= dict(build(LAYERS[name]).model.layers[0].mlp.named_children()).keys()


@pytest.mark.parametrize("name", LAYERS)
def test_a_hub_layer_keeps_its_flags(name):
    """Forward and backward in place of the model's own, and one graph."""
    mlp = build(LAYERS[name]).model.layers[0].mlp
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for forward in (type(mlp).forward, getattr(layers, name).forward):
        leaf = x.clone().requires_grad_()
        y = forward(mlp, leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *mlp.parameters()])))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    mlp.__class__ = type("Adopted", (type(mlp),), {"forward": getattr(layers, name).forward})
    torch.testing.assert_close(
        torch.compile(mlp, backend=counter, fullgraph=True)(x), results[0][0]
    )
    assert counter.frame_count == 1


def test_hub_folder(tmp_path):
    """The folder is complete: its package runs from where it is, under another name."""
    folder = tmp_path / "kernel"
    hub.write(folder)
    assert "[torch-noarch]" in (folder / "build.toml").read_text()
    variant = folder / "build/torch-cuda"
    told = json.loads((variant / "metadata.json").read_text())
    assert told["name"] == "fusedmlp" and told["id"].isidentifier() and told["version"] == 0
    assert told["license"] == "Apache-2.0" and told["backend"]["type"] == "cuda"
    assert {"8.0", "9.0", "10.0"} <= set(told["backend"]["archs"])
    files = {str(p.relative_to(variant)) for p in variant.rglob("*.py")}
    assert files == told["digest"]["files"].keys() and "kernels/dense/gated_linear.py" in files
    digest = hashlib.sha256((variant / "__init__.py").read_bytes()).digest()
    assert told["digest"]["files"]["__init__.py"] == base64.b64encode(digest).decode()
    assert not [p for p in folder.rglob("*") if p.is_symlink()]
    with pytest.raises(ValueError, match="fusedmlp.hub: folder must be new or empty, got"):
        hub.write(folder)
    kernel = load(told["id"], variant)
    x, w = torch.randn(3, 8), torch.randn(8, 8)
    assert torch.equal(kernel.mlp(x, w, w), fusedmlp.mlp(x, w, w))
    assert set(LAYERS) <= set(vars(kernel.layers)) and "layers" in kernel.__all__
    # Its ops have a namespace of their own, beside those of the installed package.
    assert hasattr(getattr(torch.ops, told["id"]), "gated_linear_fwd")


def load(name, folder):
    """As the Hub's client does: a package by its folder, under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
