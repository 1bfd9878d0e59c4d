"""The folder of a Hub kernel as kernel-builder and the package `kernels` read it; its tests."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata

import fusedmlp
import kernels
from fusedmlp.hub import __main__ as hub

REPO_ID = "somebody/fusedmlp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub.write(folder, REPO_ID)
    return folder


def test_the_project_of_kernel_builder(folder):
    """The layout that `kernel-builder init` makes, without what is compiled."""
    assert {p.name for p in folder.iterdir()} == {
        "build.toml", "flake.nix", "CARD.md", "tests", "torch-ext", "build"
    }  # fmt: skip
    assert Build.open(folder).general.backends == [Backend.CPU, Backend.CUDA]
    told = (folder / "build.toml").read_text().splitlines()
    capabilities = json.dumps(hub.capabilities())
    for line in ('name = "fusedmlp"', "edition = 5", f'repo-id = "{REPO_ID}"'):
        assert line in told
    assert told[-2:] == ["[torch-noarch]", f"cuda_capabilities = {capabilities}"]
    source = folder / "torch-ext" / "fusedmlp"
    assert (source / "__init__.py").is_file() and not (source / "fusedmlp").exists()
    assert "genKernelFlakeOutputs" in (folder / "flake.nix").read_text()
    assert not [p for p in folder.rglob("*") if p.is_symlink()]


@pytest.mark.parametrize("backend", hub.BACKENDS)
def test_a_build_variant(folder, backend):
    variant = folder / "build" / f"torch-{backend}"
    told = Metadata.read_from_file(variant / "metadata.json")
    assert (told.name.python_name, told.version, told.license) == ("fusedmlp", 0, "Apache-2.0")
    assert told.id.isidentifier() and told.id.startswith(f"_fusedmlp_{backend}_")
    archs = hub.capabilities() if backend == "cuda" else None
    assert told.backend.archs == archs
    told.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    files = json.loads((variant / "metadata.json").read_text())["digest"]["files"]
    assert "kernels/dense/gated_linear.py" in files and not any("bench" in name for name in files)


def test_the_card(folder):
    card = (folder / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n")
    assert card == (folder / "build" / "CARD.md").read_text()
    assert "$" not in card and "{{" not in card
    for name in (REPO_ID, "`FusedMLP`", "`Llama4TextMoe`", "`gated_mlp`", fusedmlp.__version__):
        assert name in card


def test_kernels_loads_it(folder):
    kernel = kernels.get_local_kernel(folder)
    assert kernel is not fusedmlp and kernel.__version__ == fusedmlp.__version__
    assert set(kernel.__all__) == {*fusedmlp.__all__, "layers"}
    x, w = torch.randn(3, 8), torch.randn(8, 8)
    assert torch.equal(kernel.mlp(x, w, w), fusedmlp.mlp(x, w, w))
    for name, layer in hub.stateless():
        loaded = kernels.LocalLayerRepository(folder, layer_name=name).load()
        assert loaded.__name__ == layer.__name__ and loaded is not layer
    # Its ops have a namespace of their own, beside those of the installed package.
    assert hasattr(getattr(torch.ops, kernel.__name__), "gated_linear_fwd")


def test_a_one_bit_model_of_the_kernel_comes_back(folder, tmp_path):
    """By the quantiser of the installed package, which is in transformers' table already."""
    config = hf.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=9,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    kernels.get_local_kernel(folder).quantize_model(model)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(8).view(2, 4)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp) is fusedmlp.BinaryGatedMLP
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_its_own_tests_pass(folder):
    """As kernel-builder runs them."""
    environment = {**os.environ, "LOCAL_KERNELS": f"{REPO_ID}={folder}"}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout + done.stderr


def test_an_empty_folder_is_as_good_as_a_new_one(folder, tmp_path):
    hub.write(tmp_path, REPO_ID)
    new, empty = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.suffix in (".py", ".md")}
        for f in (folder, tmp_path)
    )
    assert empty == new


def test_what_it_refuses(folder, tmp_path):
    for full in (folder, folder / "build.toml"):
        with pytest.raises(ValueError, match="fusedmlp.hub: folder must be new or empty, got"):
            hub.write(full)
    with pytest.raises(ValueError, match="hub: repo_id must be OWNER/NAME, got 'fusedmlp'"):
        hub.write(tmp_path / "new", "fusedmlp")
    assert not (tmp_path / "new").exists()
    done = subprocess.run(
        [sys.executable, "-m", "fusedmlp.hub", str(tmp_path / "new"), "--repo-id", "a/b/c"],
        capture_output=True, text=True,
    )  # fmt: skip
    usage, *_, error = done.stderr.splitlines()
    assert done.returncode == 2 and "OWNER/NAME, got 'a/b/c'" in error
    assert usage.startswith("usage: python -m fusedmlp.hub ")
