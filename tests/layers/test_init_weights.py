"""initialize_weights and its two companions: the table of roles, kinds and scales."""

import pytest
import torch
from torch import nn

from fusedmlp.layers.init_weights import (
    METHODS,
    apply_initialization,
    create_initializer,
    initialize_weights,
)
from fusedmlp.layers.ngpt import NormLinear

IN, OUT = 300, 200


def linear():
    module = nn.Linear(IN, OUT)
    nn.init.constant_(module.weight, 7.0)
    nn.init.constant_(module.bias, 7.0)
    return module


def xavier(gain):
    return gain * (6 / (IN + OUT)) ** 0.5


# method, whether uniform, its bound or its standard deviation at scale 1, bias
LINEAR = [
    ("default", False, (2 / IN) ** 0.5, 0.0),
    ("feedforward", False, (2 / IN) ** 0.5, 0.0),
    ("expert", False, (2 / IN) ** 0.5, 0.0),
    ("gating", True, xavier(0.1), 1.0),
    ("attention", True, xavier(0.5**0.5), 7.0),
    ("embedding", True, OUT**-0.5, 7.0),
]


def assert_drawn(weight, uniform, size):
    if uniform:
        assert 0.99 * size < weight.abs().max().item() <= size * (1 + 1e-6)
        size *= 3**-0.5
    else:
        assert weight.abs().max() > 3 * size, "a uniform draw ends at 1.73 std"
    assert weight.std().item() == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("scale", (1.0, 0.5))
@pytest.mark.parametrize("method, uniform, size, bias", LINEAR)
def test_linear_by_method(method, uniform, size, bias, scale):
    module = linear()
    assert initialize_weights(module, method, scale=scale) is None
    assert_drawn(module.weight, uniform, scale * size)
    assert module.bias.eq(bias).all()


@pytest.mark.parametrize(
    "name, method",
    [
        ("block.0.Gate_proj", "gating"),
        ("expert_gating", "gating"),
        ("q_proj", "attention"),
        ("layers.3.attention.out", "attention"),
        ("TokenMixer", "embedding"),
        ("embed", "embedding"),
        ("router", "expert"),
        ("3", "default"),
        ("", "default"),
    ],
)
def test_role_by_name(name, method):
    uniform, size, bias = next(row[1:] for row in LINEAR if row[0] == method)
    module = linear()
    initialize_weights(module, layer_name=name)
    assert_drawn(module.weight, uniform, size)
    assert module.bias.eq(bias).all()
    # A method that is given goes before the name.
    initialize_weights(module, "feedforward", layer_name=name)
    assert_drawn(module.weight, False, (2 / IN) ** 0.5)


def test_nonlinearity():
    module = linear()
    initialize_weights(module, nonlinearity="linear")
    assert_drawn(module.weight, False, IN**-0.5)


@pytest.mark.parametrize("kind, taps", [(nn.Conv1d, 3), (nn.Conv2d, 9)])
def test_convolutions(kind, taps):
    module = kind(20, 100, 3)
    initialize_weights(module, "gating", scale=2.0)
    assert_drawn(module.weight, False, 2 * (2 / (100 * taps)) ** 0.5)
    assert not module.bias.any()


@pytest.mark.parametrize("kind", (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm))
def test_norms(kind):
    module = kind(8)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    initialize_weights(module)
    assert module.weight.eq(1).all()
    assert getattr(module, "bias", None) is None or not module.bias.any()
    plain = {"affine": False} if "Batch" in kind.__name__ else {"elementwise_affine": False}
    initialize_weights(kind(8, **plain))


def test_embedding_and_recurrent():
    module = nn.Embedding(IN, OUT)
    initialize_weights(module, scale=0.5)
    assert_drawn(module.weight, False, 0.01)
    for kind in (nn.GRU, nn.LSTM):
        module = kind(5, 4, num_layers=2)
        initialize_weights(module, "gating")
        for name, p in module.named_parameters():
            if name.startswith("bias"):
                assert not p.any(), name
            else:
                columns = p.t() @ p
                torch.testing.assert_close(columns, torch.eye(len(columns)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_of_0_leaves_no_weight(method):
    module = linear()
    initialize_weights(module, method, scale=0)
    assert not module.weight.any()


def test_other_modules_and_children_are_left():
    model = nn.Sequential(linear(), nn.PReLU())
    before = [p.clone() for p in model.parameters()]
    initialize_weights(model)
    initialize_weights(model[1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_parametrised_weight_is_assigned():
    module = nn.utils.parametrizations.weight_norm(linear())
    initialize_weights(module)
    assert_drawn(module.weight, False, (2 / IN) ** 0.5)


def test_apply_initialization_reads_dotted_names():
    model = nn.ModuleDict({"gate": linear(), "body": nn.Sequential(linear(), NormLinear(4, 4))})
    apply_initialization(model, scale=0.5)
    assert_drawn(model["gate"].weight, True, xavier(0.05))
    assert_drawn(model["body"][0].weight, False, 0.5 * (2 / IN) ** 0.5)
    apply_initialization(model, "embedding")
    assert_drawn(model["gate"].weight, True, OUT**-0.5)


def test_create_initializer_reads_no_names():
    model = nn.ModuleDict({"gate": linear()})
    model.apply(create_initializer("default"))
    assert_drawn(model["gate"].weight, False, (2 / IN) ** 0.5)
    model.apply(create_initializer("gating", scale=2.0))
    assert_drawn(model["gate"].weight, True, xavier(0.2))


@pytest.mark.parametrize(
    "name, call",
    [
        ("initialize_weights", lambda method: initialize_weights(linear(), method)),
        ("apply_initialization", lambda method: apply_initialization(linear(), method)),
        ("create_initializer", create_initializer),
    ],
)
def test_unknown_method(name, call):
    expected = f"{name}: init_method must be one of {', '.join(METHODS)}; got 'xavier'"
    with pytest.raises(ValueError, match=expected):
        call("xavier")
