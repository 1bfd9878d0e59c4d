"""Which forwards patch() takes for an MLP: one that is nearly one is left, and the rest patched."""

import pytest
import torch
from patch_blocks import MLP, GatedMLP, Model
from torch import nn

import fusedmlp
from fusedmlp.patching.activation import name_by_values

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fn",
    (
        nn.Threshold(0.01, 0.0),
        lambda t: torch.where(t > 0.01, t, 0.0),
        nn.Hardshrink(0.1),
        nn.Hardtanh(-50, 50),
    ),
    ids=str,
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


class ActByName(GatedMLP):
    def forward(self, t):
        return self.w2(self.w3(t) * self.act(input=self.w1(t)))


class FirstByName(GatedMLP):
    def forward(self, t):
        return self.w2(self.w3(t) * self.act(self.w1(input=t)))


class MulByName(GatedMLP):
    def forward(self, t):
        return self.w2(torch.mul(self.w3(t), other=self.act(self.w1(t))))


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


@pytest.mark.parametrize(
    "kind",
    (Alpha, IntoX, XChanged, SameHalf, DownByName, ActByName, FirstByName, MulByName),
    ids=lambda kind: kind.__name__,
)
def test_an_odd_forward_is_left_alone(kind):
    """It is not patched, what it does stays, and its neighbour is patched."""
    model = Model(kind(), MLP())
    expected = model.blocks[0](given := X.clone())
    assert [e.name for e in fusedmlp.patch(model).patched] == ["blocks.1"]
    assert torch.equal(model.blocks[0](again := X.clone()), expected)
    assert torch.equal(again, given)
