"""quantize_model: what it puts into one bit a weight, and what it leaves as it is."""

import copy

import pytest
import torch
import transformers as hf
from patch_blocks import MLP, GatedMLP, LlamaLike, Model
from torch import nn
from torch.nn.utils import parametrizations

import fusedmlp
from fusedmlp import quantize_model
from fusedmlp.layers import BinaryGatedMLP

X = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def build(name, **options):
    """A causal language model of transformers: {name}Config, {name}ForCausalLM."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**SIZES, **options)
    return getattr(hf, f"{name}ForCausalLM")(config).eval()


def reason(change):
    """Why the first of two alike MLPs was left once `change` was made to it, and that it was."""
    model = Model(LlamaLike(), LlamaLike())
    change(model)
    block = model.blocks[0]
    expected = block(X)
    (entry,) = (report := quantize_model(model)).left
    assert [layer.name for layer in report.layers] == ["blocks.1"]
    assert model.blocks[0] is block and torch.equal(block(X), expected)
    assert entry.name == "blocks.0" and f"\nnot in q1_0: {entry}" in str(report)
    return entry.detail


class Scaled(LlamaLike):
    """As FalconH1's: under the names of Llama's, and something else."""

    def forward(self, t):
        return super().forward(t) * 0.5


class Normed(LlamaLike):
    """As BitNet's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(256)

    def forward(self, t):
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(t)) * self.up_proj(t)))


class WithTail(LlamaLike):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, t):
        return self.dropout(super().forward(t))


class Chunked(LlamaLike):
    """The MLP is in a method of its own, beside something else."""

    def feed_forward_chunk(self, t):
        return super().forward(t)

    def forward(self, t):
        return self.feed_forward_chunk(t) * 0.5


class Layer(LlamaLike):
    """The MLP is a run of statements."""

    def forward(self, t):
        t = t.softmax(-1)
        h = self.act_fn(self.gate_proj(t)) * self.up_proj(t)
        return self.down_proj(h) * 0.5


class Renamed(LlamaLike):
    def __init__(self):
        super().__init__()
        self.up, self.up_proj = self.up_proj, nn.Identity()

    def forward(self, t):
        return self.down_proj(self.act_fn(self.gate_proj(t)) * self.up(t))


class Doubled(nn.Linear):
    def forward(self, t):
        return 2 * super().forward(t)


def in_place(block):
    return lambda model: model.blocks.__setitem__(0, block.eval())


def on_the_instance(model):
    model.blocks[0].forward = lambda t: 0 * t


def adapted(model):
    model.blocks[0].up_proj = Doubled(128, 256, bias=False)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (in_place(Scaled()), "its forward does not end in a projection"),
        (in_place(Normed()), "a one-bit block would lose norm"),
        (in_place(WithTail()), "a one-bit block would lose dropout"),
        (in_place(Chunked()), "its MLP must be all of its forward, got its feed_forward_chunk"),
        (in_place(Layer()), "its MLP must be all of its forward, got a part of it"),
        (in_place(Renamed()), "its projections must be gate_proj, up_proj, down_proj, got gate_pr"),
        (on_the_instance, "it has a forward of its own, set on the instance, which a one-bit"),
        (lambda m: m.blocks[0].register_forward_hook(lambda *_: None), "it has hooks, which a one"),
        (lambda m: m.blocks[0].up_proj.register_forward_hook(lambda *_: None), "up_proj has hooks"),
        (lambda m: setattr(m, "also", m.blocks[0]), "tied: it also is blocks.0 and also"),
        (adapted, "up_proj is a test_quantize.Doubled"),
        (lambda m: parametrizations.weight_norm(m.blocks[0].up_proj), "up_proj computes its"),
    ],
)  # fmt: skip
def test_left_where_something_would_be_lost(change, why):
    assert reason(change).startswith(why)


def test_one_bias_of_gate_and_up_is_kept():
    model = Model(LlamaLike(), LlamaLike())
    model.blocks[0].gate_proj = nn.Linear(128, 256)
    bias = model.blocks[0].gate_proj.bias
    assert len(quantize_model(model).layers) == 2
    assert model.blocks[0].gate_proj.bias is bias and model.blocks[0].up_proj.bias is None
    assert model.blocks[0](torch.randn(2, 128)).shape == (2, 128)


def test_tied_weights_stay_tied():
    model = Model(LlamaLike(), LlamaLike(), LlamaLike())
    model.blocks[1].gate_proj.weight = model.blocks[0].gate_proj.weight
    report = quantize_model(model)
    assert [layer.name for layer in report.layers] == ["blocks.2"]
    assert all(e.detail.startswith("tied: gate_proj.weight also is ") for e in report.left)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FalconH1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}),
        ("BitNet", {}),
        ("SeedOss", {"head_dim": 64}),
    ],
)
def test_models_with_more_in_their_mlp_are_refused(name, options):
    """Multipliers, a norm, a dropout: under the names of Llama's."""
    model = build(name, **options)
    with pytest.raises(ValueError, match=rf"of {name}ForCausalLM every .*\n.*MLP\): left, "):
        fusedmlp.patch(model, quantize="q1_0")
    assert not any(isinstance(m, BinaryGatedMLP) for m in model.modules())


def test_an_mlp_by_other_names_is_none_of_a_report_unless_it_is_gated():
    report = quantize_model(Model(LlamaLike(), MLP(), GatedMLP(), nn.Linear(8, 8)))
    assert [layer.name for layer in report.layers] == ["blocks.0"]
    why = "its projections must be gate_proj, up_proj, down_proj, got w1, w3, w2"
    assert [(e.name, e.detail) for e in report.left] == [("blocks.2", why)]


def test_what_was_left_is_not_said_to_be_none():
    model = Model(LlamaLike())
    model.blocks[0].down_proj = nn.Linear(200, 128)
    with pytest.raises(ValueError, match=r"Model every .* was left:\nblocks.0 .*: left, ") as error:
        quantize_model(model)
    assert "none" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"gate_proj\(x\)\) \* up_proj\(x\)\), got none in Linear$"
    ):
        quantize_model(nn.Linear(4, 4))


def test_models_that_are_wrapped_are_refused():
    with pytest.raises(ValueError, match="quantize_model: model must be a plain model, .*compiled"):
        quantize_model(torch.compile(Model(LlamaLike())))


def test_patched_models_are_quantised_all_the_same():
    plain = Model(LlamaLike())
    patched = copy.deepcopy(plain)
    fusedmlp.patch(patched)
    assert quantize_model(patched).before == quantize_model(plain).before
    assert torch.equal(patched(X), plain(X))


def test_saved_models_are_loaded_on_meta():
    model = Model(LlamaLike(), LlamaLike())
    quantize_model(model)
    with torch.device("meta"):
        fresh = Model(LlamaLike(), LlamaLike())
    quantize_model(fresh)
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(fresh(X), model(X))


def test_what_is_in_one_bit_already_is_passed_by():
    """In training or packed: neither found nor left."""
    model = nn.ModuleList([BinaryGatedMLP(128, 256), LlamaLike()])
    report = quantize_model(model)
    assert [layer.name for layer in report.layers] == ["1"] and not report.left
    again = quantize_model(model)
    assert not again.layers and not again.left
