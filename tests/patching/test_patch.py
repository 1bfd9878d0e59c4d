"""patch(), unpatch(), patched(), register_patch(): what is swapped, what is left, what is refused."""

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from layer_checks import Stranger, assert_cheap
from patch_blocks import MLP, GatedMLP, LlamaLike, Model
from patch_models import batch, build
from torch import nn
from torch.nn.utils import parametrizations
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.activations import ACT2FN

import fusedmlp
from fusedmlp.layers import BinaryGatedMLP
from fusedmlp.patching import Plan, experts_forward
from fusedmlp.patching.activation import name_by_values

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "block, op, detail",
    [
        (GatedMLP(), "gated_mlp", "activation 'silu'"),
        (GatedMLP(nn.GELU("tanh"), bias=False), "gated_mlp", "activation 'gelu_tanh'"),
        (GatedMLP(torch.sigmoid), "gated_mlp", "activation 'sigmoid'"),
        (MLP(), "mlp", "activation 'gelu'"),
        (MLP(nn.ReLU(inplace=True)), "mlp", "activation 'relu'"),
        (
            MLP(nn.Tanh(), nn.Dropout(0.5)),
            "mlp",
            "activation 'tanh', in two calls while 2 is at work",
        ),
    ],
    ids=str,
)
def test_found_by_what_it_computes(block, op, detail):
    model = Model(block, nn.Linear(8, 8))
    torch.manual_seed(0)
    expected = model(X)
    (entry,) = fusedmlp.patch(model).entries
    assert (entry.name, entry.op, entry.backend, entry.detail) == (
        "blocks.0",
        op,
        "reference",
        detail,
    )
    torch.manual_seed(0)
    torch.testing.assert_close(model(X), expected)
    assert f"patched, {op} {detail}" in repr(model) and f"patched, {op}" in fusedmlp.explain(model)
    where = "on CUDA: triton; here: reference"
    line = f"blocks.0 ({type(block).__name__}): {op} {where}, {detail}"
    assert line in str(fusedmlp.patch(model))


def test_torchs_own_encoder_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
    x = torch.randn(2, 3, 8)
    expected = layer(x)
    (entry,) = fusedmlp.patch(layer).entries
    assert entry.op == "mlp" and "torch's fast path of the whole layer" in entry.detail
    torch.testing.assert_close(layer(x), expected)


class Doubled(GatedMLP):
    """Its product is used twice, so down(act(g) * u) is not all of it."""

    def forward(self, t):
        h = self.w3(t) * self.act(self.w1(t))
        return self.w2(h) + self.w2(h * h)


class Branching(GatedMLP):
    def forward(self, t):
        return super().forward(t) if t.sum() > 0 else t


class Noisy(GatedMLP):
    def forward(self, t):
        return super().forward(t + torch.ones_like(t) if self.training else t)


@pytest.mark.parametrize(
    "block", (Doubled(), Branching(), Noisy().eval(), nn.MultiheadAttention(8, 2)), ids=str
)
def test_what_is_no_mlp_is_not_touched(block):
    report = fusedmlp.patch(Model(block))
    assert not report.patched
    assert str(report).startswith("nothing was patched; looked for modules that compute down(act(")


def test_layers_may_share_an_activation():
    act = nn.SiLU()
    model = Model(GatedMLP(act), GatedMLP(act))
    expected = model(X)
    assert len(fusedmlp.patch(model).patched) == 2
    torch.testing.assert_close(model(X), expected)


def test_parametrised_weights_are_left():
    model = Model(MLP())
    parametrizations.weight_norm(model.blocks[0][0])
    assert not fusedmlp.patch(model).patched


def test_dtype_check_off():
    model = Model(MLP()).double()
    expected = model(X.double())
    assert fusedmlp.patch(model, dtype_check=False).patched
    assert torch.equal(model(X.double()), expected)
    model = Model(MLP())
    model.blocks[0][2].double()
    assert fusedmlp.patch(model, dtype_check=False).patched
    with pytest.raises(
        TypeError, match="mlp: w_out must have x's dtype torch.float32, got torch.float64"
    ):
        model(X)


def test_only():
    model = Model(MLP(), MLP(), GatedMLP())
    names = lambda **k: [e.name for e in fusedmlp.patch(copy.deepcopy(model), **k).patched]  # noqa: E731
    assert names(only="blocks.1") == ["blocks.1"]
    assert names(only=["blocks.0", "*.2"]) == ["blocks.0", "blocks.2"]
    assert names(only=lambda name, module: isinstance(module, GatedMLP)) == ["blocks.2"]
    with pytest.raises(
        ValueError,
        match=r"only must match names of modules, such as 'blocks\.0' and .*, got 'block\.0'",
    ):
        names(only="block.0")
    with pytest.raises(TypeError, match="patch: only must be a pattern, patterns or a function"):
        names(only=[1])
    with pytest.raises(TypeError, match="only must be a pattern, patterns or a function, got 3"):
        names(only=3)
    with pytest.raises(ValueError, match="patch: only must hold a pattern, got none"):
        names(only=[])
    with pytest.raises(TypeError, match="patch: dtype_check must be True or False, got 'no'"):
        names(dtype_check="no")


def test_hooks_of_later():
    """A hook on the MLP runs; one on its activation raises, since that is not called."""
    model = Model(GatedMLP())
    fusedmlp.patch(model)
    seen = []
    model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model(X)
    assert seen == [X.shape]
    handle = model.blocks[0].act.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"patched GatedMLP: act has hooks, which the fused call would pass by; "
                                        r"hook or wrap the MLP as a whole, or unpatch\(model\) first"):  # fmt: skip
        model(X)
    handle.remove()
    fusedmlp.unpatch(model)
    model(X)


def test_deepcopy_pickle_and_state_dict(tmp_path):
    model = build("llama")
    fusedmlp.patch(model)
    inputs = batch("llama")
    expected = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.model.layers[0].mlp) is type(model.model.layers[0].mlp)
        assert torch.equal(twin(**inputs).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(**inputs).logits, expected)
    fusedmlp.unpatch(loaded)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(again(**inputs).logits, expected)


def test_switch_experts_are_saved_apart(tmp_path):
    """Their memory is one; their names, Parameters, storages and files are those of the model."""
    model = build("switch").eval()
    inputs = batch("switch")
    expected = model(**inputs).logits
    fusedmlp.patch(model)
    experts = model.encoder.block[1].layer[1].mlp.experts
    pointers = {e.wi.weight.untyped_storage().data_ptr() for e in experts.values()}
    assert len(pointers) == len(experts)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    moved = copy.deepcopy(model)
    for e in moved.encoder.block[1].layer[1].mlp.experts.values():
        e.wi.weight.data = e.wi.weight.data.clone()
    torch.testing.assert_close(moved(**inputs).logits, expected)


def test_active_dropout_is_kept():
    for name, option in (("gpt2", "resid_pdrop"), ("switch", "dropout_rate")):
        model, inputs = build(name, **{option: 0.5}), batch(name)
        torch.manual_seed(0)
        expected = model(**inputs).logits
        fusedmlp.patch(model)
        torch.manual_seed(0)
        torch.testing.assert_close(model(**inputs).logits, expected)


def test_patched_restores_whatever_happens():
    model = Model(GatedMLP(), MLP())
    fusedmlp.patch(model, only="blocks.0")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), fusedmlp.patched(model) as report:
        assert [e.name for e in report.patched] == ["blocks.0", "blocks.1"]
        raise ZeroDivisionError
    assert [type(m) for m in model.modules()] == kinds
    fusedmlp.unpatch(model)
    assert type(model.blocks[0]) is GatedMLP


def test_patched_and_restored_inside():
    """Unpatched by the block itself, or wrapped there by a class of another library."""
    model = Model(GatedMLP(), MLP(), MLP())
    kinds = [type(m) for m in model.blocks]
    with fusedmlp.patched(model):
        fusedmlp.unpatch(model)
    assert [type(m) for m in model.blocks] == kinds
    wrap = lambda m: setattr(m, "__class__", type("Wrapped", (type(m),), {}))  # noqa: E731
    with (
        pytest.warns(RuntimeWarning, match="patched: Wrapped was wrapped after patch") as told,
        pytest.raises(KeyError, match="mine"),
        fusedmlp.patched(model),
    ):
        wrap(model.blocks[0])
        raise KeyError("mine")
    assert told[0].filename == __file__
    assert [type(m) for m in model.blocks[1:]] == kinds[1:]
    with pytest.raises(ValueError, match="patched: Wrapped was wrapped after patch"):  # noqa: SIM117
        with fusedmlp.patched(model, only="blocks.[12]"):
            wrap(model.blocks[1])
    assert type(model.blocks[2]) is kinds[2]
    with pytest.raises(ValueError, match="unpatch: Wrapped was wrapped after patch"):
        fusedmlp.unpatch(model)


def test_a_failing_adapter_leaves_nothing_half_done():
    def fails(module):
        raise RuntimeError("no")

    model = Model(MLP(), Doubled())
    fusedmlp.register_patch(Doubled, fails)
    try:
        with pytest.raises(RuntimeError, match="no"):
            fusedmlp.patch(model)
    finally:
        fusedmlp.register_patch(Doubled, lambda module: "it is not for fusedmlp")
    assert type(model.blocks[0]) is MLP
    assert "left, it is not for fusedmlp" in str(fusedmlp.patch(Model(Doubled())).entries[0])


@dataclass(frozen=True)
class Tripled(Plan):
    @property
    def op(self):
        return "gated_mlp"

    def bypassed(self):
        return ("w1", "w2", "w3")

    def run(self, module, t):
        m = module
        return 3 * fusedmlp.gated_mlp(t, m.w1.weight, m.w3.weight, m.w2.weight)


class Odd(GatedMLP):
    def forward(self, t):
        return super().forward(t).mul_(3) if t.numel() else t


def test_register_patch():
    model = Model(Odd(bias=False))
    expected = model(X)
    assert not fusedmlp.patch(model).patched
    fusedmlp.register_patch(Odd, lambda module: Tripled())
    (entry,) = fusedmlp.patch(model).patched
    assert (entry.kind, entry.op) == ("Odd", "gated_mlp")
    torch.testing.assert_close(model(X), expected)
    for cls in (3, int, Odd(), None):
        with pytest.raises(TypeError) as told:
            fusedmlp.register_patch(cls, lambda module: "")
        words = f"register_patch: cls must be a class of nn.Modules, got {cls!r}"
        assert str(told.value) == words
    with pytest.raises(
        TypeError, match="register_patch: adapter must be callable, got 'gated_mlp'"
    ):
        fusedmlp.register_patch(Odd, "gated_mlp")


def test_patch_enters_experts_in_another_table(monkeypatch):
    table = type("Table", (dict,), {"register": dict.__setitem__})()
    monkeypatch.setattr("transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS", table)
    fusedmlp.patch(Model(MLP()))
    assert table == {"fusedmlp": experts_forward}


@pytest.mark.parametrize("call", (fusedmlp.patch, fusedmlp.unpatch), ids=lambda f: f.__name__)
def test_refused(call):
    op = call.__name__
    with pytest.raises(TypeError, match=f"{op}: model must be an nn.Module, got str"):
        call("meta-llama")
    order = (
        r"in this order: patch\(model\), then parallelize_module, then fully_shard, then "
        "torch.compile"
    )
    with pytest.raises(ValueError, match=rf"{op}: model must be a plain model, got the model itself "
                                         rf"\(OptimizedModule\), compiled; {order}"):  # fmt: skip
        call(torch.compile(Model(MLP())))
    model = Model(MLP())
    model.blocks[0].compile()
    with pytest.raises(ValueError, match=rf"got blocks.0 \(MLP\), compiled; {order}"):
        call(model)


def test_a_call_is_cheap():
    block = build("llama").model.layers[0].mlp
    fusedmlp.patch(ours := copy.deepcopy(block))
    with torch.no_grad():
        assert_cheap(ours, block)


def test_meta_and_other_backends():
    with torch.device("meta"):
        model = Model(MLP(), GatedMLP())
    assert len(fusedmlp.patch(model).patched) == 2
    model = model.to_empty(device="cpu")
    model(X)


def test_quantize():
    """One bit a weight first; what is left is patched as ever, and the report has both."""
    blocks = Model(LlamaLike(), MLP())
    report = fusedmlp.patch(blocks, quantize="q1_0")
    quantized = report.quantized
    assert isinstance(blocks.blocks[0], BinaryGatedMLP)
    assert quantized.before == 4 * 3 * 128 * 256 and quantized.after == 3 * 128 * 256 * 18 // 128
    assert [(e.name, e.op) for e in report.patched] == [
        ("blocks.0", "binary_gated_mlp"), ("blocks.1", "mlp"),
    ]  # fmt: skip
    text = str(report).splitlines()
    assert text[0] == str(quantized) and text[1].startswith("2 patched")
    again = fusedmlp.patch(blocks, quantize="q1_0")
    assert again.quantized.layers == () and str(again).startswith("no further MLP in q1_0\n2 pat")
    assert fusedmlp.patch(blocks).entries == again.entries == report.entries
    with pytest.raises(ValueError, match="patch: only must be None with quantize='q1_0', got '0'"):
        fusedmlp.patch(Model(LlamaLike()), only="0", quantize="q1_0")
    with pytest.raises(ValueError, match="quantize_model: format must be one of q1_0, got 'q2'"):
        fusedmlp.patch(Model(LlamaLike()), quantize="q2")


def test_activations_by_value():
    names = {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "relu": "relu",
        "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_accurate": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu2": "relu_sq",
        "tanh": "tanh", "sigmoid": "sigmoid", "linear": "identity",
    }  # fmt: skip
    own = ("relu6", "leaky_relu", "hardswish", "mish", "laplace", "sqrtsoftplus")
    names |= {name: name for name in own}
    names |= {"gelu_10": "clipped_gelu", "prelu": None, "xielu": None}  # two learn a parameter
    assert names.keys() == ACT2FN.keys()
    assert {name: name_by_values(ACT2FN[name]) for name in names} == names
    assert name_by_values(Stranger()) is None
    assert name_by_values(lambda t: t.relu().float()) is None
    assert name_by_values(lambda t: 3) is None


@pytest.mark.parametrize("k, where", [(1, "reference"), (2, "triton")])
def test_experts_of_transformers(k, where, device):
    """Mixtral by the table's entry, equal to the library's own loop over experts."""
    config = MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, num_local_experts=3, num_experts_per_tok=k,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).to(device)
    ids = torch.arange(4, device=device).view(1, 4)
    results = []
    for implementation in ("eager", "fusedmlp", "patched"):
        if implementation == "patched":
            assert [e.op for e in fusedmlp.patch(model).patched] == ["moe_mlp", "topk_route"]
        else:
            model.set_experts_implementation(implementation)
        model.zero_grad()
        with fusedmlp.backend(where):
            out = model(ids, labels=ids)
            out.loss.backward()
        results.append((out.logits, *(p.grad.clone() for p in model.parameters())))
    for eager, ours, patched in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(patched, eager)


def test_experts_are_entered_on_import():
    """Where transformers' table is loaded: model.set_experts_implementation needs no patch()."""
    code = """if True:
        import sys, types
        class Table(dict):
            register = dict.__setitem__
        table = types.ModuleType("transformers.integrations.moe")
        table.ALL_EXPERTS_FUNCTIONS = Table()
        sys.modules[table.__name__] = table
        import fusedmlp
        assert list(table.ALL_EXPERTS_FUNCTIONS) == ["fusedmlp"]
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_experts_that_do_not_fit():
    experts = MixtralForCausalLM(
        MixtralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                      num_key_value_heads=1, vocab_size=9, num_local_experts=2, pad_token_id=0)
    ).model.layers[0].mlp.experts  # fmt: skip
    call = lambda: fusedmlp.patching.experts_forward(  # noqa: E731
        experts, X, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    )
    experts.is_transposed = True
    reason = "MixtralExperts: its forward is not that of experts so laid"
    with pytest.raises(ValueError, match=f"experts implementation 'fusedmlp': {reason}"):
        call()
    (left,) = fusedmlp.patch(nn.ModuleDict({"experts": experts})).left
    assert left.detail == reason
    experts.is_transposed, experts.act_fn = False, Stranger()
    with pytest.raises(ValueError, match="its _apply_gate computes no gate that has a kernel"):
        call()
