"""What stands before, between and behind the projections of a block: patched, the block computes
and differentiates what it did, whatever stands where, in training and in eval."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedmlp
from fusedmlp.patching.around import by_accelerate
from fusedmlp.patching.match import match
from fusedmlp.patching.trace import NoMatch

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

# name -> what is made of x, of h = act(g) u or of y, and whether a plan has a step for it.
HEADS = {
    "x": (lambda m, x: x, True),
    "norm": (lambda m, x: m.norm(x), True),
    "two norms": (lambda m, x: m.other(m.norm(x)), True),
    "dropped": (lambda m, x: F.dropout(x, m.p, m.training), True),
    "scaled": (lambda m, x: 2 * x, False),
    "norm by name": (lambda m, x: m.norm(input=x), False),
    "norm used again": (lambda m, x: (t := m.norm(x)) + t.mean(), False),
}
BETWEEN = {
    "h": (lambda m, h: h, True),
    "identity": (lambda m, h: m.same(h), True),
    "norm": (lambda m, h: m.middle(h), True),
    "dropout": (lambda m, h: m.drop(h), True),
    "dropout and norm": (lambda m, h: m.middle(m.same(m.drop(h))), True),
    "norm and dropout": (lambda m, h: m.drop(m.middle(h)), True),
    "dropped": (lambda m, h: F.dropout(h, 0.25, m.training), True),
    "dropped by name": (lambda m, h: F.dropout(h, training=m.training), True),
    "dropped by default": (lambda m, h: F.dropout(h), True),
    "dropped in place": (lambda m, h: F.dropout(h, 0.25, m.training, True), False),
    "with itself": (lambda m, h: h + m.middle(h), False),
    "softmax": (lambda m, h: h.softmax(-1), False),
}
TAILS = {
    "y": (lambda m, y, x: y, True),
    "y + x": (lambda m, y, x: y + x, True),
    "x + y": (lambda m, y, x: x + y, True),
    "y += x": (lambda m, y, x: y.__iadd__(x), True),
    "norm of y + x": (lambda m, y, x: m.last(y + x), True),
    "norm of y, + x": (lambda m, y, x: x + m.last(y), True),
    "dropped, + x": (lambda m, y, x: x + F.dropout(y, m.p, m.training), True),
    "dropout, + x": (lambda m, y, x: m.drop(y) + x, True),
    "+ x twice": (lambda m, y, x: y + x + x, True),
    "x + 2 y": (lambda m, y, x: x + 2 * y, False),
    "add with alpha": (lambda m, y, x: torch.add(y, x, alpha=2), False),
    "y - x": (lambda m, y, x: y - x, False),
    "y + y": (lambda m, y, x: y + m.last(y), False),
    "y + 1": (lambda m, y, x: y + 1, False),
}


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.other = nn.LayerNorm(8), nn.RMSNorm(8)
        self.middle, self.last = nn.LayerNorm(12), nn.LayerNorm(8)
        self.drop, self.same, self.p = nn.Dropout(0.5), nn.Identity(), 0.25

    def h(self, x):
        return F.silu(self.gate(x)) * self.up(x)


class Plain(Gated):
    def h(self, x):
        return F.gelu(self.gate(x))


def block(kind, head, between, tail):
    """It has a class of its own: what a module calls is looked for in its class alone."""

    def forward(self, x):
        h = self.h(HEADS[head][0](self, x))
        return TAILS[tail][0](self, self.down(BETWEEN[between][0](self, h)), x)

    torch.manual_seed(0)
    return type("Block", (kind,), {"forward": forward})()


def results(made, training):
    made.train(training).zero_grad()
    torch.manual_seed(1)
    x = X.clone().requires_grad_()
    y = made(x)
    y.square().sum().backward()
    return y.detach(), x.grad, *(p.grad for p in made.parameters() if p.grad is not None)


ALL = [
    *((head, "h", "x + y") for head in HEADS),
    *(("x", between, "y") for between in BETWEEN),
    *(("x", "h", tail) for tail in TAILS),
    *(("norm", "dropout", tail) for tail in TAILS),
]


@pytest.mark.parametrize("kind", (Gated, Plain))
@pytest.mark.parametrize("head, between, tail", dict.fromkeys(ALL))
def test_whatever_stands_where(kind, head, between, tail):
    made = block(kind, head, between, tail)
    own = copy.deepcopy(made)
    whole = HEADS[head][1] and BETWEEN[between][1] and TAILS[tail][1]
    assert bool(fusedmlp.patch(made).patched) == whole
    for training in (True, False):
        torch.testing.assert_close(results(made, training), results(own, training))


NONE = {
    "its forward takes nothing, not x alone": lambda m: m.down(m.gate.weight),
    "its forward takes a, b, not x alone": lambda m, a, b: m.down(m.h(a + b)),
    "its forward takes a, b, c, not x alone": lambda m, a, b, c: m.down(m.h(a + b + c)),
    "its forward takes a, b, c and 2 more, not x alone":
        lambda m, a, b, c, d, e: m.down(m.h(a + b + c + d + e)),
    "its forward makes no use of norm": lambda m, x: (m.norm(x), m.down(m.h(x)))[1],
    "its forward does not end in a projection: mul_1": lambda m, x: m.last(2 * m.down(m.h(x))),
    "its forward does not begin with x: mul": lambda m, x: m.down(m.h(2 * x)),
    "its forward has no projection of its own behind another": lambda m, x: m.last(m.norm(x)),
    "its gate and up are of x and norm, not both of x":
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(m.norm(x))),
    "x stands between its projections": lambda m, x: m.down(m.gate(x) + x.mean()),
    "norm (LayerNorm) is neither a projection of x nor an activation that has a kernel":
        lambda m, x: m.down(m.gate(t := m.norm(x)) + t.mean()),
    "between its projections there is no activation": lambda m, x: m.down(m.gate(x)),
    "between its projections middle, drop is no activation that has a kernel":
        lambda m, x: m.down(m.drop(m.middle(m.gate(x)))),
    "softmax is no activation that has a kernel": lambda m, x: m.down(m.gate(x).softmax(-1)),
    "neither factor of its product is an activation that has a kernel":
        lambda m, x: m.down(m.gate(x) + m.up(x)),
    "mul_1 is made of 3 projections": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x) * m.up(x)),
}  # fmt: skip


@pytest.mark.parametrize("reason", NONE)
def test_a_forward_that_is_no_mlp_says_why(reason):
    with pytest.raises(NoMatch) as caught:
        match(type("Block", (Gated,), {"forward": NONE[reason]})(), "forward")
    assert str(caught.value) == reason


def test_an_identity_alone_is_the_activation_identity():
    """Nobody calls its module, and another in its place raises."""
    kind = type("Block", (Gated,), {"forward": lambda m, x: m.down(m.same(m.gate(x)))})
    plan = match(made := kind(), "forward")
    assert (plan.activation, plan.gated, plan.between) == ("identity", False, ())
    own = copy.deepcopy(made)
    assert fusedmlp.patch(made).patched
    torch.testing.assert_close(made(X), own(X))
    made.same = nn.ReLU()
    with pytest.raises(TypeError, match="same is another module than at patch"):
        made(X)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", (Gated, Plain))
@pytest.mark.parametrize("layout", (torch.strided, torch.jagged), ids=str)
def test_rows_of_sequences_that_are_not_alike_long(layout, kind, monkeypatch):
    """A nested tensor, given by its place or its name: of the strided layout, which no kernel
    takes, the block's own forward is run, and of no other."""
    rows = [X[0, :2], X[1]]
    made = block(kind, "x", "h", "y")
    expected = [made(t) for t in rows]
    assert fusedmlp.patch(made).patched
    own, calls = kind.h, []
    monkeypatch.setattr(kind, "h", lambda m, x: calls.append(m) or own(m, x))
    x = torch.nested.nested_tensor(rows, layout=layout)
    for y in (made(x), made(x=x)):
        assert y.is_nested and y.layout is layout
        assert calls == ([made, made] if layout is torch.strided else [])
        for mine, theirs in zip(y.unbind(), expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_forward_that_accelerate_put_around_anothers_is_not_its_own():
    module = nn.Linear(2, 2)
    vars(module).update(_hf_hook=object(), _old_forward=module.forward, forward=lambda x: x)
    assert by_accelerate(module)
    module._old_forward = nn.ReLU().forward
    assert not by_accelerate(module)
