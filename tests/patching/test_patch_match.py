"""Which forwards patch() takes for an MLP: one that is nearly one is left, and the rest patched."""

import re
import sys

import pytest
import torch
from patch_blocks import MLP, GatedMLP, Model
from torch import nn

import fusedmlp
from fusedmlp.patching.activation import name_by_values
from fusedmlp.patching.match import match
from fusedmlp.patching.trace import NoMatch

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fn",
    (
        nn.Threshold(0.01, 0.0),
        lambda t: torch.where(t > 0.01, t, 0.0),
        nn.Hardshrink(0.1),
        nn.Hardtanh(-50, 50),
        lambda t: (1 + 1e-7) * nn.functional.silu(t),
        lambda t: nn.functional.silu(t) + 1e-10,
        lambda t: t.relu() - (t < -1000),
        lambda t: t.relu() + (t > 1000),
    ),
    ids=(
        "Threshold",
        "FATReLU",
        "Hardshrink",
        "Hardtanh",
        "a share",
        "a sum",
        "far below",
        "far above",
    ),
)
def test_what_is_nearly_an_activation(fn):
    assert name_by_values(fn) is None


class Alpha(GatedMLP):
    def forward(self, t):
        return torch.add(super().forward(t), t, alpha=0.5)


class IntoX(GatedMLP):
    def forward(self, t):
        t += super().forward(t)
        return t


class XChanged(GatedMLP):
    def forward(self, t):
        t.mul_(2)
        return super().forward(t)


class SameHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, t):
        halves = self.up(t).chunk(2, dim=-1)
        return self.down(torch.sigmoid(halves[0]) * halves[0])


class DownByName(GatedMLP):
    def forward(self, t):
        return self.w2(input=self.w3(t) * self.act(self.w1(t)))


class FirstByName(GatedMLP):
    def forward(self, t):
        return self.w2(self.w3(t) * self.act(self.w1(input=t)))


class InPlace(GatedMLP):
    """Writes into its own intermediate results alone."""

    def forward(self, t):
        h = self.act(self.w1(t))
        h *= self.w3(t)
        y = self.w2(h)
        y += t
        return y


def test_in_place_on_its_own_results():
    expected = (block := InPlace().requires_grad_(False))(X)
    assert fusedmlp.patch(block).patched
    torch.testing.assert_close(block(X), expected)


class KeepsAClass(GatedMLP):
    """A class that a module keeps is no function of it: the class has to stay what it is."""

    def __init__(self):
        super().__init__()
        self.kind = nn.Linear

    def forward(self, t):
        return super().forward(t) if isinstance(self.w1, self.kind) else t


def test_a_class_that_a_module_keeps():
    expected = (block := KeepsAClass())(X)
    assert fusedmlp.patch(block).patched
    torch.testing.assert_close(block(X), expected)


@pytest.mark.parametrize(
    "kind",
    (Alpha, IntoX, XChanged, SameHalf, DownByName, FirstByName),
    ids=lambda kind: kind.__name__,
)
def test_an_odd_forward_is_left_alone(kind):
    """It is not patched, what it does stays, and its neighbour is patched."""
    model = Model(kind(), MLP())
    expected = model.blocks[0](given := X.clone())
    assert [e.name for e in fusedmlp.patch(model).patched] == ["blocks.1"]
    assert torch.equal(model.blocks[0](again := X.clone()), expected)
    assert torch.equal(again, given)


class LooksAtItsDtype(MLP):
    """As T5's: what is read and not used in the end is no obstacle."""

    def forward(self, t):
        h = self[1](self[0](t))
        if isinstance(self[2].weight, torch.Tensor) and h.dtype != self[2].weight.dtype:
            h = h.to(self[2].weight.dtype)
        return self[2](h)


def test_reading_is_no_obstacle():
    block = LooksAtItsDtype()
    expected = block(X)
    assert fusedmlp.patch(block).patched
    torch.testing.assert_close(block(X), expected)


class Broadcast(GatedMLP):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(8, 1)


class Counts(MLP):
    """Every kind of state that a forward may write."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen, self.cache = 0, [], {}
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, t):
        self.calls += 1
        self.steps += 1
        self.seen.append(t)
        self.cache["h"] = self.last = self[1](self[0](t))
        return self[2](self.last)


CHANGES = {
    "new": lambda m: setattr(m, "new", 1),
    "calls": lambda m: setattr(m, "calls", 1),
    "gone": lambda m: delattr(m, "gone"),
    "seen": lambda m: m.seen.append(1),
    "cache": lambda m: m.cache.update(h=1),
    "names": lambda m: m.names.add("h"),
    "steps": lambda m: m.steps.add_(1),
}


class Changes(MLP):
    """One kind of state that a forward writes."""

    def __init__(self, what):
        super().__init__()
        self.what, self.calls, self.gone, self.seen, self.cache = what, 0, 0, [], {}
        self.names = set()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, t):
        CHANGES[self.what](self)
        return super().forward(t)


@pytest.mark.parametrize("what", CHANGES)
def test_a_forward_that_changes_anything_of_its_module(what):
    (left,) = fusedmlp.patch(nn.ModuleDict({"mlp": (block := Changes(what))})).left
    assert left.detail == f"its forward changes {what} of the module"
    state = block.calls, block.gone, block.seen, block.cache, block.names, block.steps.item()
    assert state == (0, 0, [], {}, set(), 0) and not hasattr(block, "new")


class Halves(nn.Module):
    """Gate and up in one projection, split in a dimension that is the last of a matrix alone."""

    def __init__(self, width=24, dim=1):
        super().__init__()
        self.first, self.down, self.dim = nn.Linear(8, width), nn.Linear(width // 2, 8), dim

    def forward(self, t):
        gate, up = self.first(t).split(12, self.dim)
        return self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize(("width", "dim"), [(24, 1), (24, -1), (25, -1)])
def test_halves_are_those_of_the_last_dimension(width, dim):
    model = nn.ModuleDict({"mlp": Halves(width, dim)})
    report = fusedmlp.patch(model)
    assert bool(report.patched) == ((width, dim) == (24, -1)), report


@pytest.mark.parametrize("hidden", (1, 12, 13))
def test_a_hidden_width_may_be_odd(hidden):
    plain = nn.Sequential(nn.Linear(8, hidden), nn.SiLU(), nn.Linear(hidden, 8))
    gated = GatedMLP()
    gated.w1, gated.w3, gated.w2 = nn.Linear(8, hidden), nn.Linear(8, hidden), nn.Linear(hidden, 8)
    for block in (plain, gated):
        expected = block(X)
        assert fusedmlp.patch(nn.ModuleList([block])).patched
        torch.testing.assert_close(block(X), expected)


@pytest.mark.parametrize(
    "kind, why",
    [
        (Broadcast, "its gate and up are 1 and 12 wide: broadcast"),
        (Counts, "its forward changes .*calls.* of the module"),
    ],
)
def test_left_and_why(kind, why):
    model = nn.ModuleDict({"mlp": (block := kind()), "other": MLP()})
    expected = block(X)
    before = vars(block).copy()
    report = fusedmlp.patch(model)
    assert [e.name for e in report.patched] == ["other"]
    (entry,) = report.left
    assert re.search(why, entry.detail), entry
    assert vars(block) == before
    torch.testing.assert_close(block(X), expected)


class HoldsNone(GatedMLP):
    """Under each kind of name that a module has."""

    def __init__(self):
        super().__init__(bias=False)
        self.register_buffer("mask", None)
        self.register_parameter("scale", None)
        self.register_module("norm", None)
        self.limit = None

    def forward(self, t):
        y = super().forward(t)
        return y if self.norm is None and self.scale is None and self.mask is None else t


def test_what_a_module_has_none_of_is_no_obstacle():
    expected = (block := HoldsNone())(X)
    (entry,) = fusedmlp.patch(block).patched
    assert entry.op == "gated_mlp"
    torch.testing.assert_close(block(X), expected)
    fusedmlp.unpatch(block)
    assert block.mask is block.scale is block.norm is block.limit is None


class AsksForTheDevice(GatedMLP):
    def __init__(self, differs):
        super().__init__()
        self.differs = differs

    def forward(self, t):
        y = super().forward(t)
        return y + t if t.device.type == "cuda" and self.differs else y


class AsksForTheMode(GatedMLP):
    def __init__(self, differs):
        super().__init__()
        self.differs = differs

    def forward(self, t):
        y = super().forward(t)
        return y + t if self.training and self.differs else y


@pytest.mark.parametrize(
    ("kind", "devices"),
    [(AsksForTheDevice, ["cpu", "cuda"] * 2), (AsksForTheMode, ["cpu"] * 2)],
)
def test_a_forward_that_asks_for_no_device_is_followed_once_a_mode(kind, devices, monkeypatch):
    seen, module = [], sys.modules[match.__module__]
    follow = module.follow
    monkeypatch.setattr(
        module, "follow", lambda *a, **k: seen.append(k["device"]) or follow(*a, **k)
    )
    match(kind(False), "forward")
    assert seen == devices


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("kind", (AsksForTheDevice, AsksForTheMode))
def test_a_forward_is_followed_on_each_device_and_in_each_mode(kind, training):
    """Where it is not the same everywhere it is none, whatever it is here and now."""
    assert match(kind(False).train(training), "forward").gated
    with pytest.raises(NoMatch, match="not the same MLP in training and in eval, on a CPU and on"):
        match(block := kind(True).train(training), "forward")
    assert all(m.training == training for m in block.modules())


def test_tracing_leaves_no_trace():
    block = Counts()
    fusedmlp.patch(block)
    state = block.calls, block.steps.item(), block.seen, block.cache, hasattr(block, "last")
    assert state == (0, 0, [], {}, False)


class Path(GatedMLP):
    """A submodule under a name that other layers of this library have for a method."""

    def __init__(self):
        super().__init__()
        self.path = nn.LayerNorm(8)

    def forward(self, t):
        return self.path(super().forward(t))


def test_a_submodule_of_any_name():
    model = Model(Path())
    expected = model(X)
    assert "blocks.0" not in fusedmlp.explain(model)
    assert fusedmlp.patch(model).patched
    torch.testing.assert_close(model(X), expected)
    assert "blocks.0 (Path): patched, gated_mlp" in fusedmlp.explain(model)
