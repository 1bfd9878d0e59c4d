"""Whoever saves, copies, averages, shards or offloads a layer sees parameters like any others.

One name a parameter, the same in named_parameters and state_dict; one storage each; and every way
of `layer_savers` carries the function of every layer.
"""

import copy

import pytest
import torch
from layer_checks import draw, one, randomise_
from layer_makers import MAKERS, D
from layer_savers import SAVERS, accelerate_offload, transformers_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fusedmlp import layers
from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig, HyperMLP
from fusedmlp.layers.parts import experts as parts_experts
from fusedmlp.layers.per_expert import per_expert_state_dict

ELEMENT = {"mask_mode": "element", "num_masks": 2}


def frozen(layer):
    layer.freeze_masks()
    return layer


def switch_of_masks():
    ff_kwargs = {"mult": 1, "glu_variant": "mswiglu", **ELEMENT}
    return layers.SwitchFFN(D, 2, ff_kwargs=ff_kwargs)


def frozen_switch():
    layer = switch_of_masks()
    layer.experts.freeze_masks()
    return layer


# Bits in the place of parameters.
PACKED = {
    "frozen MaskedGLU": lambda: frozen(layers.SwiMGLU(D, D, **ELEMENT)),
    "frozen SwitchFFN": frozen_switch,
    "packed BinaryLinear": lambda: layers.BinaryLinear(D, D, True, pad=True).pack(),
    "packed BinaryGatedMLP": lambda: layers.BinaryGatedMLP(D, 128, pad=True).pack(),
}
ALL = {
    **{name: make for name, make in MAKERS.items() if name != "L2Norm"},  # which has no state
    **PACKED,
    "SwitchFFN of masks": switch_of_masks,
    "HyperGLU": lambda: HyperGLU(HyperGLUConfig(n_embd=D, n_head=2, block_size=8)),
    "HyperMLP": lambda: HyperMLP(D, block_size=8, op1_rank=2, op2_rank=2),
}
TRAINED = tuple(name for name in ALL if name not in PACKED)
# Their projection's weight is read in halves, which is no call of it: it must not be elsewhere.
NEVER_CALLED = ("SwiMGLU", "FeedForward masked", "frozen MaskedGLU")


def different(name):
    """Two layers of other values; masks are bits, of which another draw is other ones."""
    layer, other = ALL[name](), ALL[name]()
    if name not in PACKED:
        randomise_(layer)
    return layer.eval(), other.eval()


class Every(nn.Module):
    """All layers of `named` as one model, which a saver costs once."""

    def __init__(self, named):
        super().__init__()
        self.named = nn.ModuleDict(named)

    def forward(self, x):
        return {name: one(layer(x)) for name, layer in self.named.items()}


def refused(saver):
    """What `saver` cannot carry, and its error; docs/limits.md says why."""
    if saver is accelerate_offload:
        message = "proj must be without hooks and with its class's own forward in element mode"
        return dict.fromkeys(NEVER_CALLED, (TypeError, message))
    if saver is transformers_model:
        packed = (name for name in PACKED if name.startswith("packed"))
        return dict.fromkeys(packed, ((AttributeError, StopIteration), None))
    return {}


@pytest.mark.parametrize("saver", SAVERS, ids=lambda f: f.__name__)
def test_state_is_carried(saver, tmp_path):
    pairs = {name: different(name) for name in ALL if name not in refused(saver)}
    layer, other = (Every({name: pair[i] for name, pair in pairs.items()}).eval() for i in (0, 1))
    x = draw(2, 4, D)
    expected = layer(x)
    ours = saver(layer, other, tmp_path).eval()(x)
    # Offloaded, a block is several calls, rounded in other places.
    exact = {} if saver is accelerate_offload else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours, expected, **exact)


REFUSED = [(saver, name) for saver in SAVERS for name in refused(saver)]


@pytest.mark.parametrize(("saver", "name"), REFUSED, ids=[f"{s.__name__}-{n}" for s, n in REFUSED])
def test_state_that_is_refused(saver, name, tmp_path):
    kind, message = refused(saver)[name]
    with pytest.raises(kind, match=message):
        saver(*different(name), tmp_path)(draw(2, 4, D))


@pytest.mark.parametrize("name", ALL)
def test_names_and_storages(name):
    layer = ALL[name]()
    state = layer.state_dict()
    extra = {key for key in state if key.endswith(("_extra_state", "packed.width"))}
    named = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert set(named) == set(state) - extra
    assert not [key for key in extra if "packed" not in key]
    for key, t in named.items():
        assert t.data_ptr() == state[key].data_ptr()
        assert t.is_leaf and t._base is None and t.is_contiguous()
        assert t.untyped_storage().nbytes() == t.numel() * t.itemsize, key
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)


@pytest.mark.parametrize("name", ALL)
def test_a_state_that_does_not_fit_is_told(name):
    """Each tensor that is left out, of another shape or one too many, with strict=False too."""
    layer = ALL[name]()
    state = layer.state_dict()
    for key in (*dict(layer.named_parameters()), *dict(layer.named_buffers())):
        others = {k: v for k, v in state.items() if k != key}
        assert layer.load_state_dict(others, strict=False) == ([key], [])
        more = f"{key}_of_no_layer"
        assert layer.load_state_dict({**state, more: state[key]}, strict=False) == ([], [more])
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{key}\""):
            layer.load_state_dict(others)
        with pytest.raises(RuntimeError, match=rf"Unexpected key\(s\) in state_dict: \"{more}\""):
            layer.load_state_dict({**state, more: state[key]})
        wrong = {**state, key: state[key].new_zeros(*state[key].shape, 2)}
        with pytest.raises(RuntimeError, match=f"size mismatch for {key}: "):
            layer.load_state_dict(wrong, strict=False)


STACKED = ("SwitchFFN", "SwitchFFN masked", "SwitchFFN of masks", "frozen SwitchFFN",
           "FastFeedForward", "FastFeedForward all")  # fmt: skip


@pytest.mark.parametrize("name", STACKED)
def test_checkpoints_with_a_name_for_each_expert(name):
    layer, other = different(name)
    x = draw(2, 4, D)
    state = per_expert_state_dict(layer)
    assert all(k.split(".")[1].isdigit() for k in state if k.startswith(("experts.", "routers.")))
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    assert not any(t.requires_grad for t in (*state.values(), *layer.state_dict().values()))
    other.load_state_dict(state)
    assert torch.equal(one(other(x)), one(layer(x)))
    with torch.device("meta"):
        if name not in PACKED:
            other = ALL[name]().eval()
    other.load_state_dict(state, assign=True)
    assert torch.equal(one(other(x)), one(layer(x)))


@pytest.mark.parametrize("name", STACKED)
def test_one_expert_is_loaded_alone(name):
    layer, other = different(name)
    before = {k: t.clone() for k, t in per_expert_state_dict(other).items()}
    state = per_expert_state_dict(layer)
    part = {k: t for k, t in state.items() if k.startswith(("experts.1.", "routers.0."))}
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.0\."):
        ALL[name]().load_state_dict(part)
    missing, unexpected = other.load_state_dict(part, strict=False)
    assert not unexpected and not set(missing) & set(part)
    for k, t in per_expert_state_dict(other).items():
        assert torch.equal(t, (part if k in part else before)[k]), k
    experts = dict(other.experts.named_parameters())
    pointers = {k: p.data_ptr() for k, p in experts.items()}
    other.load_state_dict(state)
    assert pointers == {k: p.data_ptr() for k, p in other.experts.named_parameters()}


def test_refusals_of_a_load_by_experts():
    layer = layers.SwitchFFN(D, 2)
    state = per_expert_state_dict(layer)
    key = "experts.1.net.0.bias"
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}: .*shape \(3,\) from checkp"):
        layer.load_state_dict({**state, key: torch.zeros(3)}, strict=False)
    wrong = {k: v for k, v in state.items() if k != key.replace("1", "0", 1)}
    with pytest.raises(RuntimeError, match="size mismatch") as told:  # of which nothing is missing
        layer.load_state_dict({**wrong, key: torch.zeros(3)})
    assert "Missing" not in str(told.value)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.2\.net\.0\.bias"):
        layer.load_state_dict({**state, "experts.2.net.0.bias": state[key]})
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{key}"):
        layer.load_state_dict({**layer.state_dict(), key: state[key]})
    with torch.device("meta"):
        empty = layers.SwitchFFN(D, 2)
    with pytest.raises(RuntimeError, match="net_0_bias is on meta, where all of .* got 1 of 2"):
        empty.load_state_dict({key: state[key]}, strict=False, assign=True)
    twice = per_expert_state_dict(nn.ModuleDict({"a": layer, "b": layer}))
    assert {k for k in twice if k.startswith("a.")} == {f"a.{k}" for k in state}
    assert {k for k in twice if k.startswith("b.")} == {f"b.{k}" for k in state}
    with pytest.raises(TypeError, match=r"per_expert_state_dict: module must be an nn.Module, got"):
        per_expert_state_dict(state)


@pytest.mark.parametrize("name", TRAINED)
def test_optimizer_state_goes_round(name):
    layer, other = (ALL[name]().train() for _ in range(2))
    first, second = (torch.optim.AdamW(m.parameters(), 0.01) for m in (layer, other))
    x = draw(2, 4, D)

    def step(model, optimizer):
        torch.manual_seed(3)
        optimizer.zero_grad()
        one(model(x)).square().sum().backward()
        optimizer.step()

    step(layer, first)
    other.load_state_dict(layer.state_dict())
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(layer, first, options=options))
    set_optimizer_state_dict(other, second, saved, options=options)
    step(layer, first)
    step(other, second)
    for (key, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), key


@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", ("SwitchFFN", "FastFeedForward"))
def test_no_call_copies_a_stack(name, training, grad, monkeypatch):
    """moe_mlp reads the parameters where they lie: after loads and moves, too."""
    seen = []
    call = parts_experts.moe_mlp

    def spy(x, routing, *, activation, packed, **tensors):
        seen.append({t.data_ptr() for t in tensors.values() if t is not None})
        return call(x, routing, activation=activation, packed=packed, **tensors)

    monkeypatch.setattr(parts_experts, "moe_mlp", spy)
    layer = ALL[name]().train(training)
    layer.soft_routing_during_train = False
    x = draw(2, 4, D)
    for change in (nn.Module.float, nn.Module.double, nn.Module.share_memory,
                   lambda m: m.load_state_dict(per_expert_state_dict(m))):  # fmt: skip
        change(layer)
        with torch.set_grad_enabled(grad):
            layer(x.to(next(layer.parameters()).dtype))
        assert seen.pop() == {p.data_ptr() for p in layer.experts.parameters()}
