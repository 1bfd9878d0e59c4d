"""An MLP among the statements of a longer forward: found, and nothing else of it changed."""

import ast
import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from patch_blocks import Model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedmlp
from fusedmlp.patching.compiled import around_run, run_of, runs_of
from fusedmlp.patching.names import runs
from fusedmlp.patching.swap import Patched

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
_SIZES = {"vocab_size": 99, "max_position_embeddings": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BART = _TOKENS | {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "activation_dropout": 0.3,
}  # fmt: skip
_BERT = _SIZES | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip
# name -> model class, its configuration, blocks whose MLP lies in a forward
MODELS = {
    "opt": (hf.OPTForCausalLM, lambda: hf.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=1,
            num_attention_heads=4, word_embed_proj_dim=32, **_SIZES), 1),
    "bart": (hf.BartForConditionalGeneration, lambda: hf.BartConfig(**_SIZES, **_BART), 2),
    "whisper": (hf.WhisperForConditionalGeneration, lambda: hf.WhisperConfig(vocab_size=99,
            num_mel_bins=8, max_source_positions=16, max_target_positions=16, **_BART), 2),
    "deberta-v2": (hf.DebertaV2ForMaskedLM, lambda: hf.DebertaV2Config(**_BERT), 1),
    "mpnet": (hf.MPNetForMaskedLM, lambda: hf.MPNetConfig(**_BERT), 1),
    "bloom": (hf.BloomForCausalLM, lambda: hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4,
            vocab_size=99, hidden_dropout=0.2), 1),
    "mpt": (hf.MptForCausalLM, lambda: hf.MptConfig(d_model=32, n_heads=4, n_layers=1,
            vocab_size=99), 1),
}  # fmt: skip


def test_both_parts_keep_their_line_numbers():
    """An error's traceback, a debugger and a profiler show the model's own lines."""
    own = hf.models.opt.modeling_opt.OPTDecoderLayer
    code = inspect.unwrap(own.forward).__code__
    source, first = inspect.getsourcelines(code)
    cut = next(run.cut for run in runs_of(inspect.unwrap(own.forward)) if run.cut.start)
    for made in (run_of(own, cut), around_run(own, cut)):
        part = inspect.unwrap(made).__code__
        at = {line for _, _, line in part.co_lines() if line is not None}
        assert part.co_filename == code.co_filename
        assert len(at) > 1 and at <= {*range(first, first + len(source))}


def inputs(name):
    ids = torch.randint(3, 98, (2, 7), generator=torch.Generator().manual_seed(0))
    if name == "whisper":
        features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
        return {"input_features": features, "labels": ids}
    return {"input_ids": ids, "labels": ids}


def step(model, batch):
    torch.manual_seed(0)
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", MODELS)
def test_models(name, training):
    """With dropout at work and without, and with a model's own gradient checkpointing."""
    cls, config, blocks = MODELS[name]
    torch.manual_seed(0)
    model = cls(config()).train(training)
    expected = step(model, inputs(name))
    report = fusedmlp.patch(model)
    cut = [e for e in report.patched if "in its forward" in e.detail]
    assert len(cut) == blocks and {e.op for e in cut} == {"mlp"}
    modes = (False, True) if model.supports_gradient_checkpointing else (False,)
    for checkpointing in modes:
        if checkpointing:
            model.gradient_checkpointing_enable()
        ours = step(model, inputs(name))
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, msg=lambda m, k=key: f"{k}: {m}")
    fusedmlp.unpatch(model)
    assert not any(isinstance(m, Patched) for m in model.modules())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.net = nn.ModuleList([nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)])

    def mixed(self, x):
        return self.attention(x, x, x)[0] if x.sum() > 1e9 else self.norm(x)


class Statements(Layer):
    def forward(self, x, scale=2.0, *, mask=None):
        """Attention cannot be traced; the MLP behind it can."""
        residual = x
        x = self.mixed(x)
        x = self.fc1(x)
        x = F.gelu(x)
        x = self.fc2(x)
        return residual + scale * x


class Expression(Layer):
    def forward(self, x, scale=2.0):
        x = self.mixed(x)
        return x + scale * self.fc2(F.relu(self.fc1(self.norm(x)))).sigmoid()


class Branch(Layer):
    def forward(self, x, fast=True):
        x = self.mixed(x)
        if fast:
            h = torch.relu(self.fc1(x))
            y = self.fc2(h)
        else:
            y = x
        return y * 2


class Loop(Layer):
    def forward(self, x, *args, **kwargs):
        x = self.mixed(x)
        for module in self.net:
            x = module(x)
        return x + len(args)


class Base(Layer):
    def mixed(self, x):
        return 2 * super().mixed(x)


class Super(Base):
    def forward(self, x):
        x = super().mixed(x)
        y = self.fc2(F.silu(self.fc1(x)))
        return x - y


class Longest(Layer):
    """Eight statements, which is the most."""

    def forward(self, x):
        x = self.mixed(x)
        h = self.fc1(x)
        a = F.gelu(h)
        b = a
        c = b
        d = c
        e = d
        f = e
        y = self.fc2(f)
        return x + y


class Longer(Layer):
    def forward(self, x):
        x = self.mixed(x)
        h = self.fc1(x)
        a = F.gelu(h)
        b = a
        c = b
        d = c
        e = d
        f = e
        g = f
        y = self.fc2(g)
        return x + y


class AlsoTheHidden(Layer):
    """What is between is used behind: no run of these makes one value."""

    def forward(self, x):
        x = self.mixed(x)
        h = F.gelu(self.fc1(x))
        y = self.fc2(h)
        return y + h.sum()


class HiddenInTheSameStatement(Layer):
    def forward(self, x):
        x = self.mixed(x)
        h = F.gelu(self.fc1(x))
        return self.fc2(h) + h.mean()


class Augmented(Layer):
    def forward(self, x):
        x = self.mixed(x)
        x = F.gelu(self.fc1(x))
        x += x.mean()
        return self.fc2(x)


class TwoInputs(Layer):
    def forward(self, x):
        y = self.mixed(x)
        return self.fc2(F.gelu(self.fc1(y)) + x.mean())


class InALambda(Layer):
    def forward(self, x):
        x = self.mixed(x)
        return sum((lambda t: self.fc2(F.gelu(self.fc1(t))))(x) for _ in range(2))


class Conditional(Layer):
    def forward(self, x, skip=False):
        x = self.mixed(x)
        h = F.gelu(self.fc1(x))
        return x if skip else self.fc2(h)


class Written(Layer):
    """A run that writes into its module."""

    def forward(self, x):
        x = self.mixed(x)
        self.seen = F.gelu(self.fc1(x))
        return self.fc2(self.seen)


class Walrus(Layer):
    def forward(self, x):
        x = self.mixed(x)
        y = self.fc2(h := F.gelu(self.fc1(x)))
        return y + h.mean()


class Mangled(Layer):
    """A name that means another outside of its class."""

    __scale = 2.0

    def forward(self, x):
        x = self.mixed(x)
        return x + self.__scale * self.fc2(F.relu(self.fc1(x)))


FOUND = (Statements, Expression, Branch, Loop, Super)
# What the report says of those that are left: where one projection leads to another, what keeps
# their run from being an MLP.
NONE = "no projection was found that leads to another, and no experts"
NOT = {
    AlsoTheHidden: NONE,
    HiddenInTheSameStatement: NONE,
    Augmented: "iadd is no activation that has a kernel",
    TwoInputs: "its forward takes x, y, not x alone",
    InALambda: NONE,
    Written: NONE,
    Walrus: NONE,
    Conditional: NONE,
    Mangled: NONE,
}


def values(model, *args, **kwargs):
    x = X.clone().requires_grad_()
    y = model(x, *args, **kwargs)
    found = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)
    return [y, *(g for g in found if g is not None)]


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_found(kind):
    model = kind()
    expected = values(model)
    (entry,) = fusedmlp.patch(model).patched
    assert entry.op == "mlp" and "in its forward" in entry.detail
    assert inspect.signature(model.forward) == inspect.signature(kind().forward)
    twins = (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert isinstance(twin, Patched)
        torch.testing.assert_close(values(twin), expected)
    if kind is Statements:
        fresh = kind()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(X, 3.0, mask=1), fresh(X, 3.0, mask=1))
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            model(X, other=1)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    torch.testing.assert_close(compiled(X), expected[0])
    fusedmlp.unpatch(model)
    assert type(model) is kind
    torch.testing.assert_close(values(model), expected)


@pytest.mark.parametrize("kind", NOT, ids=lambda kind: kind.__name__)
def test_not_found(kind):
    """It is left alone with the reason, and computes what it did."""
    model = kind()
    expected = values(model)
    report = fusedmlp.patch(model)
    assert [(e.name, e.op, e.detail) for e in report.entries] == [("", None, NOT[kind])]
    torch.testing.assert_close(values(model), expected)


def test_how_many_statements_are_looked_at():
    assert fusedmlp.patch(Longest()).patched and not fusedmlp.patch(Longer()).patched


def test_each_run_is_looked_at_once_and_short_ones_first():
    text = "def forward(self, x):\n a = self.a(x)\n b = self.b(a)\n c = self.c(b)"
    found = [run.cut for run in runs(ast.parse(text).body[0])]
    ends = [(0, 0), (1, 1), (0, 1), (2, 2), (1, 2), (0, 2)]
    assert [(cut.start, cut.stop) for cut in found] == ends


def test_a_parent_gives_way_to_the_module_that_is_one():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return x + self.mlp(x)

    assert [e.name for e in fusedmlp.patch(Holds()).patched] == ["mlp"]


def test_what_stands_around_it_may_change():
    """Attention, norms and functions of the layer are not the MLP's."""
    model = Statements()
    fusedmlp.patch(model)
    model.norm = nn.LayerNorm(8)
    model.adapter = nn.Linear(8, 8)
    model.function = torch.relu
    model.attention.register_forward_hook(lambda *_: None)
    model(X)
    model.fc1.register_forward_hook(lambda m, a, out: 2 * out)
    ours = values(model)
    fusedmlp.unpatch(model)
    torch.testing.assert_close(ours, values(model))


def test_a_forward_of_its_class_that_comes_later_is_run():
    model = Model(Statements())
    fusedmlp.patch(model)
    before = Statements.forward
    try:
        Statements.forward = lambda self, x: torch.zeros_like(x)
        assert not model.blocks[0](X).any()
        fusedmlp.unpatch(model)
        assert not fusedmlp.patch(model).patched
    finally:
        Statements.forward = before
    assert fusedmlp.patch(model).patched and model.blocks[0](X).any()


def test_source_that_is_not_what_runs():
    exec("def forward(self, x):\n    return self.fc2(self.fc1(self.mixed(x)).relu())", scope := {})
    forward = scope["forward"]
    forward.__code__ = forward.__code__.replace(
        co_filename=Statements.forward.__code__.co_filename,
        co_firstlineno=Statements.forward.__code__.co_firstlineno,
    )
    kind = type("Told", (Layer,), {"forward": forward})
    assert not fusedmlp.patch(kind()).patched


class Dunder(Layer):
    def forward(self, x):
        x = self.mixed(x)
        return x + len(self.__class__.__name__) * self.fc2(F.relu(self.fc1(x)))


def test_a_name_that_no_class_mangles():
    expected = (block := Dunder())(X)
    assert fusedmlp.patch(block).patched
    torch.testing.assert_close(block(X), expected)


def test_a_forward_that_is_bound_to_another_is_no_run():
    """Its statements are of the other's parts, whatever the module itself has."""
    kind = type("Bound", (Layer,), {"forward": Expression().forward})
    block = kind()
    expected = block(X)
    assert not fusedmlp.patch(block).patched
    assert torch.equal(block(X), expected)


class Annotated(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

    def forward(self, x):
        def twice(t: torch.Tensor) -> torch.Tensor:
            return 2 * t

        h = twice(x)
        h = self.act(self.fc1(h))
        h = self.fc2(h)
        return x + twice(h)


def test_annotations_inside_are_compiled_as_their_file_has_them():
    """This file takes no annotations from a __future__, which the compiling one does."""
    block = Annotated()
    expected = block(X)
    (entry,) = fusedmlp.patch(Model(block)).patched
    assert entry.op == "mlp"
    torch.testing.assert_close(block(X), expected)
