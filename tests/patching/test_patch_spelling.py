"""One function in many spellings: what a block computes counts, and nothing that is nearly it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from patch_blocks import Model
from torch import nn

import fusedmlp
from fusedmlp.patching import dense
from fusedmlp.reference.activations import ACTIVATIONS, resolve

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def h(self, z):
        raise NotImplementedError

    def forward(self, x):
        return self.second(self.h(self.first(x)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.u, self.d = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.d(self.h(self.g(x), self.u(x)))


class Packed(Plain):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)


def made(base, h):
    """A block of its own class."""
    return type("Block", (base,), {"h": lambda self, *z: h(*z)})()


PLAIN = {
    "relu.square": (lambda z: F.relu(z).square(), "relu_sq"),
    "relu ** 2": (lambda z: F.relu(z) ** 2, "relu_sq"),
    "r * r": (lambda z: F.relu(z) * F.relu(z), "relu_sq"),
    "clamp": (lambda z: z.clamp(min=0), "relu"),
    "maximum": (lambda z: z * (z > 0), "relu"),
    "z * sigmoid(z)": (lambda z: z * torch.sigmoid(z), "silu"),
    "z / (1 + exp(-z))": (lambda z: z / (1 + torch.exp(-z)), "silu"),
    "quick gelu": (lambda z: z * torch.sigmoid(1.702 * z), "quick_gelu"),
    "erf": (lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)), "gelu"),
    "in float32": (lambda z: F.silu(z.float()).to(z.dtype), "silu"),
    "in place": (lambda z: F.relu_(z), "relu"),
}
GATED = {
    "g * sigmoid(g) * u": (lambda g, u: g * torch.sigmoid(g) * u, "silu"),
    "g * (sigmoid(g) * u)": (lambda g, u: g * (torch.sigmoid(g) * u), "silu"),
    "u first": (lambda g, u: u * F.gelu(g, approximate="tanh"), "gelu_tanh"),
    "mul by name": (lambda g, u: torch.mul(F.silu(input=g), other=u), "silu"),
    "bilinear": (lambda g, u: g * u, "identity"),
    "the second is the gate": (lambda g, u: g * torch.tanh(u), "tanh"),
}
HALVES = {
    "chunk": (lambda y: y.chunk(2, dim=-1), "gate_up"),
    "chunk by position": (lambda y: torch.chunk(y, 2, -1), "gate_up"),
    "split": (lambda y: y.split(16, dim=-1), "gate_up"),
    "split in two sizes": (lambda y: torch.split(y, [16, 16], -1), "gate_up"),
    "tensor_split": (lambda y: y.tensor_split(2, -1), "gate_up"),
    "slices": (lambda y: (y[..., :16], y[..., 16:]), "gate_up"),
    "slices, up first": (lambda y: (y[..., 16:], y[..., :16]), "up_gate"),
    "narrow": (lambda y: (y.narrow(-1, 0, 16), y.narrow(-1, 16, 16)), "gate_up"),
    "unflatten": (lambda y: y.unflatten(-1, (2, 16)).unbind(-2), "gate_up"),
    "chunk, up first": (lambda y: y.chunk(2, dim=-1)[::-1], "up_gate"),
}
# name -> class and h of what is nearly a block, and left
NEARLY = {
    "cube": (Plain, lambda z: F.relu(z) ** 3),
    "halved": (Plain, lambda z: F.silu(z) / 2),
    "along the rows": (Plain, lambda z: torch.softmax(z, -1)),
    "of the row before": (Plain, lambda z: F.relu(z.roll(1, 0))),
    "turned": (Plain, lambda z: F.relu(z).flip(-1)),
    "centred": (Plain, lambda z: F.relu(z - z.mean(-1, keepdim=True))),
    "a threshold": (Plain, lambda z: torch.where(z > 0.01, z, 0.0)),
    "noise": (Plain, lambda z: F.relu(z + torch.randn_like(z) * 1e-3)),
    "dropped": (Plain, lambda z: F.relu(F.dropout(z, 0.0))),
    "two gates": (Gated, lambda g, u: F.silu(g) * F.silu(u)),
    "a sum": (Gated, lambda g, u: F.silu(g) + u),
    "a shifted up": (Gated, lambda g, u: F.silu(g) * (u + 1)),
    "a learned slope": (Plain, lambda z: F.leaky_relu(z, -0.5) + 0.1),
    "a clamped up": (Gated, lambda g, u: F.silu(g) * u.clamp(-50, 50)),
    "matrices": (Gated, lambda g, u: F.silu(g) @ u.mT @ u),
    "halves overlap": (Packed, lambda y: F.silu(y[..., :16]) * y[..., 15:31]),
    "one half": (Packed, lambda y: F.silu(y[..., :16]) * y[..., :16]),
    "along dimension 2": (Packed, lambda y: (lambda g, u: F.silu(g) * u)(*y.chunk(2, 2))),
}


def steps(model, x=X):
    x = x.clone().requires_grad_()
    y = model(x)
    return (y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()]))


def assert_patched(block, op, activation, packed=None):
    expected = steps(copy.deepcopy(block))
    (entry,) = fusedmlp.patch(model := Model(block)).entries
    detail = f"activation {activation!r}" + (f", packed {packed!r}" if packed else "")
    assert (entry.op, entry.detail) == (op, detail)
    for ours, theirs in zip(steps(model.blocks[0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("h, activation", PLAIN.values(), ids=PLAIN)
def test_plain(h, activation):
    assert_patched(made(Plain, h), "mlp", activation)


@pytest.mark.parametrize("h, activation", GATED.values(), ids=GATED)
def test_gated(h, activation):
    assert_patched(made(Gated, h), "gated_mlp", activation)


@pytest.mark.parametrize("halves, packed", HALVES.values(), ids=HALVES)
def test_halves(halves, packed):
    def h(y):
        g, u = halves(y)
        return F.silu(g) * u

    assert_patched(made(Packed, h), "gated_mlp", "silu", packed)


# Rows that at their defaults are others, which are found first.
SAME = {"situ": "softcap_swiglu", "scaled_swiglu": "silu"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    gate = resolve(name)
    name = SAME.get(name, name)
    both = lambda g, u: gate.psi(u) * gate.phi(g)  # noqa: E731
    assert_patched(made(Gated, both), "gated_mlp", name)
    if name != "identity":
        assert_patched(
            made(Packed, lambda y: both(y[..., 16:], y[..., :16])), "gated_mlp", name, "up_gate"
        )
        interleaved = made(Packed, lambda y: both(y[..., ::2], y[..., 1::2]))
        assert_patched(interleaved, "gated_mlp", name, "interleaved")
        if gate.row.up is None:
            assert_patched(made(Plain, gate.phi), "mlp", name)


PARAMETERS = {
    "leaky_relu(negative_slope=0.2)": (Plain, lambda z: F.leaky_relu(z, 0.2)),
    "swiglu_oai(limit=5.0)": (Gated, lambda g, u: (u.clamp(-5.0, 5.0) + 1)
                              * g.clamp(max=5.0) * torch.sigmoid(1.702 * g.clamp(max=5.0))),
    "scaled_swiglu(gate_scale=0.7)": (Gated, lambda g, u: F.silu(0.7 * g) * u),
    "scaled_swiglu(gate_scale=0.7, up_scale=1.3)": (Gated, lambda g, u: 1.3 * u * F.silu(g * 0.7)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    base, h = PARAMETERS[name]
    assert_patched(made(base, h), "mlp" if base is Plain else "gated_mlp", name)


def test_a_number_of_an_activation_that_changes_raises():
    model = Model(made(Plain, lambda z: z))
    model.blocks[0].act = nn.LeakyReLU(0.2)
    type(model.blocks[0]).h = lambda self, z: self.act(z)
    assert "leaky_relu(negative_slope=0.2)" in fusedmlp.patch(model).patched[0].detail
    model(X)
    model.blocks[0].act.negative_slope = 0.3
    with pytest.raises(TypeError, match=r"act\.negative_slope is 0\.3, and was 0\.2 at patch"):
        model(X)


@pytest.mark.parametrize("base, h", NEARLY.values(), ids=NEARLY)
def test_nearly(base, h):
    x = torch.randn(8, 16, 8)
    model = nn.ModuleDict({"mlp": made(base, h)})
    torch.manual_seed(0)
    expected = model["mlp"](x)
    report = fusedmlp.patch(model)
    assert not report.patched and report.left[0].name == "mlp"
    torch.manual_seed(0)
    assert torch.equal(model["mlp"](x), expected)


def test_what_is_finite_is_no_infinite_activation():
    block = made(Plain, lambda z: torch.nan_to_num(F.leaky_relu(z, 1e307)))
    assert "nan_to_num is no activation that has a kernel" in fusedmlp.patch(block).left[0].detail


class Between(nn.Module):
    """As timm's: a dropout and a norm before the last projection."""

    def __init__(self, drop=0.5, norm=None):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.drop, self.norm = nn.Dropout(drop), norm or nn.Identity()

    def forward(self, x):
        return self.drop(self.fc2(self.norm(self.drop(self.act(self.fc1(x))))))


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("norm", (None, nn.LayerNorm(16)), ids=("Identity", "LayerNorm"))
@pytest.mark.parametrize("drop", (0.0, 0.5))
def test_between(training, norm, drop):
    model = Model(Between(drop, norm)).train(training)
    torch.manual_seed(0)
    expected = steps(copy.deepcopy(model))
    assert [e.op for e in fusedmlp.patch(model).patched] == ["mlp"]
    torch.manual_seed(0)
    for ours, theirs in zip(steps(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_identity_that_is_replaced_raises():
    model = Model(Between())
    fusedmlp.patch(model)
    model.blocks[0].norm = nn.LayerNorm(16)
    with pytest.raises(TypeError, match="norm is another module than at patch"):
        model(X)


class Functional(Plain):
    """Its dropout is a function, with numbers of the module."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p, self.scale = p, 1.702

    def forward(self, x):
        z = self.first(x)
        h = F.dropout(z * torch.sigmoid(self.scale * z), p=self.p, training=self.training)
        return F.dropout(self.second(h), self.p, self.training)


@pytest.mark.parametrize("kind", (Functional, Between))
def test_a_dropout_follows_its_module(kind, monkeypatch):
    """It drops what the model's own does, and the block is one call while nothing is dropped."""
    model = Model(kind())
    plain = copy.deepcopy(model)
    assert [e.op for e in fusedmlp.patch(model).patched] == ["mlp"]
    whole, mlp = [], dense.mlp
    monkeypatch.setattr(dense, "mlp", lambda *a, **k: whole.append(1) or mlp(*a, **k))
    for training, p in itertools.product((True, False), (0.5, 0.0, 0, 0.25, 1.0, 1)):
        outs = []
        for m in (model.train(training), plain.train(training)):
            (m.blocks[0] if kind is Functional else m.blocks[0].drop).p = p
            torch.manual_seed(0)
            outs.append(m(X))
        torch.testing.assert_close(*outs)
        assert bool(whole) == (not training or p == 0)
        whole.clear()


def test_a_number_of_the_module_that_changes_raises():
    model = Model(Functional())
    fusedmlp.patch(model)
    model.blocks[0].scale = 2.0
    with pytest.raises(TypeError, match=r"scale is 2\.0, and was 1\.702 at patch"):
        model(X)


@pytest.mark.parametrize("inner", (1, 2, 3))
def test_a_norm_before(inner):
    """lucidrains' FeedForward, alone and deeper."""
    net = nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8)
    )
    block = net
    for _ in range(inner - 1):
        block = nn.Sequential(block)
    expected = steps(copy.deepcopy(block))
    model = Model(block)
    assert [e.op for e in fusedmlp.patch(model).patched] == ["mlp"]
    for ours, theirs in zip(steps(model.blocks[0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
