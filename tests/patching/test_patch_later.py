"""What is done to a patched module later: seen, and never passed by in silence."""

import copy
import pickle

import pytest
import torch
from patch_blocks import MLP, GatedMLP, Model, Residual
from patch_models import build
from test_patch_routers import Flat
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedmlp
from fusedmlp.patching import Plan
from fusedmlp.patching.moe import _switch
from fusedmlp.patching.projection import called, read
from fusedmlp.patching.swap import Patched

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Nested(nn.Module):
    """Its MLP and what follows are in containers of their own."""

    def __init__(self):
        super().__init__()
        self.ffn, self.after = MLP(), nn.Sequential(nn.LayerNorm(8))

    def feed_forward_chunk(self, t):
        return self.after(self.ffn(t))

    def forward(self, t):
        return self.feed_forward_chunk(t)


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, t):
        return self.base(t)


def set_item(block, key, module):
    block[key] = module


class OwnAct(nn.Module):
    def forward(self, t):
        return torch.relu(t)


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
BLOCKS = {
    "gated": (GatedMLP, ("act",)),
    "plain": (MLP, ("1",)),
    "residual": (Residual, ("act",)),
    "Switch": (Flat, ("experts.expert_1.wo", "experts.expert_2")),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make, paths", BLOCKS.values(), ids=BLOCKS)
def test_a_hook_of_any_kind_on_what_is_not_called(make, paths, hook):
    """Alone, on each submodule that the plan passes by: before patch() the MLP is left, after it
    the call raises."""
    fusedmlp.register_patch(Flat, _switch)
    x = torch.randn(2, 4, 16 if make is Flat else 8)
    for path in paths:
        model = nn.ModuleList([make()])
        inner = model.get_submodule(f"0.{path}")
        handle = getattr(inner, f"register_{hook}")(lambda *_: None)
        left = [e for e in fusedmlp.patch(model).left if e.name == "0"]
        assert [e.detail for e in left] == [f"{path} has hooks, which a fused call would pass by"]
        handle.remove()
        fusedmlp.unpatch(model)
        assert "0" in {e.name for e in fusedmlp.patch(model).patched}
        model[0](x)
        handle = getattr(inner, f"register_{hook}")(lambda *_: None)
        with pytest.raises(TypeError, match="has hooks, which the fused call would pass by"):
            model[0](x)
        handle.remove()
        model[0](x)


CHANGES = {
    "an activation": (GatedMLP, lambda m: setattr(m, "act", nn.ReLU()), "act is another module"),
    "a function": (
        lambda: GatedMLP(torch.sigmoid),
        lambda m: setattr(m, "act", torch.relu),
        "act is another function",
    ),
    "an item": (MLP, lambda m: set_item(m, 1, nn.ReLU()), "1 is another module"),
    "one more": (MLP, lambda m: m.append(nn.ReLU()), "the number of its submodules has changed"),
    "one less": (MLP, lambda m: m.pop(1), "the number of its submodules has changed"),
    "one more inside": (
        Nested,
        lambda m: m.ffn.append(nn.ReLU()),
        "the number of submodules of ffn has changed",
    ),
    "the class of an item": (
        lambda: MLP(OwnAct()),
        lambda m: setattr(OwnAct, "forward", lambda self, t: 2 * t),
        "the class of 1 has another forward",
    ),
}


@pytest.mark.parametrize("make, change, why", CHANGES.values(), ids=CHANGES)
def test_a_change_raises_and_is_reported(make, change, why):
    model = Model(make(), MLP())
    fusedmlp.patch(model)
    model(X)
    change(model.blocks[0])
    with pytest.raises(TypeError, match=f"patched .*: {why}.*, which the fused call would pass by"):
        model(X)
    again = fusedmlp.patch(model)
    assert [e.name for e in again.patched] == ["blocks.1"]
    (left,) = again.left
    assert left.name == "blocks.0" and left.detail.startswith("patched before, and its calls raise")
    fusedmlp.unpatch(model)
    model(X)
    assert not any("_kept" in vars(m) for m in model.modules())


CALLED = {
    "one more": lambda m: m.after.append(nn.ReLU()),
    "a hook": lambda m: m.after.register_forward_hook(lambda m, args, y: 2 * y),
    "another": lambda m: setattr(m, "after", nn.Sequential(nn.Tanh())),
}


@pytest.mark.parametrize("change", CALLED.values(), ids=CALLED)
def test_what_is_called_may_change(change):
    model = Model(Nested())
    fusedmlp.patch(model)
    before = model(X)
    change(model.blocks[0])
    y = model(X)
    fusedmlp.unpatch(model)
    assert torch.equal(y, model(X)) and not torch.equal(y, before)


@pytest.mark.parametrize(
    "name, path",
    [("llama4", "experts"), ("llama4", "experts.act_fn"), ("switch", "experts.expert_1.act")],
)
def test_experts_and_their_activation(name, path):
    model = build(name)
    fusedmlp.patch(model)
    block = next(m for m in model.modules() if isinstance(m, Patched) and m._plan.op == "moe_mlp")
    block(x := torch.randn(1, 5, 64))
    owner, _, key = path.rpartition(".")
    setattr(block.get_submodule(owner), key, nn.Tanh())
    with pytest.raises(TypeError, match=f"{path} is another module"):
        block(x)


@pytest.mark.parametrize("name", ("llama4", "switch"))
def test_an_example_of_a_block_with_a_plan_of_its_own_runs(name):
    model = build(name)
    fusedmlp.patch(model)
    block = next(m for m in model.modules() if isinstance(m, Patched) and m._plan.op == "moe_mlp")
    (x,) = block._plan.example(block, 5, torch.ones(1))
    assert x.shape == (1, 5, 64) and not x.any()
    block._plan.trial(block, x)


def test_a_projection_of_an_expert():
    model = build("switch")
    fusedmlp.patch(model)
    block = next(m for m in model.modules() if isinstance(m, Patched) and m._plan.op == "moe_mlp")
    block.experts.expert_1.wi = Adapter(block.experts.expert_1.wi)
    with pytest.raises(TypeError, match="a projection of expert 1 is now a Adapter"):
        block(torch.randn(1, 5, 64))


def test_projections_may_be_replaced():
    """Their parameters are read at every call."""
    model = Model(GatedMLP())
    fusedmlp.patch(model)
    model.blocks[0].w2 = nn.Linear(12, 8)
    y = model(X)
    fusedmlp.unpatch(model)
    torch.testing.assert_close(y, model(X))


@pytest.mark.parametrize(
    "make", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("copy", "pickle")
)
@pytest.mark.parametrize("act", (nn.SiLU(), torch.sigmoid), ids=("module", "function"))
def test_a_copy_has_its_own(make, act):
    model = Model(GatedMLP(act))
    fusedmlp.patch(model)
    twin = make(model)
    assert torch.equal(twin(X), model(X))
    model.blocks[0].act = None
    twin(X)
    twin.blocks[0].act = nn.Tanh() if isinstance(act, nn.Module) else torch.tanh
    with pytest.raises(TypeError, match="act is another"):
        twin(X)


def test_a_replica_of_data_parallel():
    """Its submodules are replicas, put in place of the originals."""
    block = GatedMLP()
    fusedmlp.patch(block)
    replica = block._replicate_for_data_parallel()
    replica.act = block.act._replicate_for_data_parallel()
    assert torch.equal(replica(X), block(X))


@pytest.mark.parametrize("bias", (True, False))
def test_a_projection_of_a_replica_is_read(bias):
    """Its tensors are attributes, and no Parameters."""
    own = nn.Linear(8, 12, bias)
    replica = own._replicate_for_data_parallel()
    replica.weight, replica.bias = own.weight.detach(), own.bias.detach() if bias else None
    weight, found = read(replica)
    assert weight is replica.weight and found is replica.bias and called(replica) is None


class Keeps(GatedMLP):
    """A function of its own, and one in what a plan passes by."""

    def __init__(self):
        super().__init__()
        self.own, self.act.inner = torch.tanh, torch.tanh


class Nothing(Plan):
    """Which does not say what it takes of the module."""

    op = "mlp"

    def bypassed(self):
        return ("act",)

    passes_by = bypassed

    def run(self, module, t):
        return t


@pytest.mark.parametrize("path", ("own", "act.inner"))
def test_any_function_where_a_plan_names_none(path):
    fusedmlp.register_patch(Keeps, lambda module: Nothing())
    model = Model(Keeps())
    assert fusedmlp.patch(model).patched
    assert torch.equal(model(X), 2 * X)
    holder, _, name = f"blocks.0.{path}".rpartition(".")
    setattr(model.get_submodule(holder), name, torch.sin)
    with pytest.raises(TypeError, match=f": {path} is another function than at patch()"):
        model(X)


def test_a_slice_is_not_patched():
    block = MLP(nn.GELU(), nn.Dropout(0.0))
    fusedmlp.patch(plain := nn.Sequential(*block))
    part = plain[:2]
    assert type(part) is nn.Sequential and isinstance(plain, Patched)
    torch.testing.assert_close(part(X), block[1](block[0](X)))


def test_a_hook_on_an_idle_dropout_runs():
    block, seen = MLP(nn.GELU(), nn.Dropout(0.5)).eval(), []
    expected = block(X)
    fusedmlp.patch(block)
    handle = block[2].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    torch.testing.assert_close(block(X), expected)
    assert seen == [(3, 12)]
    handle.remove()
    block(X)
    assert len(seen) == 1


def test_one_graph_that_sees_a_change():
    """The checks are traced, and the compiled code is guarded by them."""
    model = Model(GatedMLP(torch.sigmoid), Nested())
    fusedmlp.patch(model)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 1
    model.blocks[1].ffn[1] = nn.ReLU()
    with pytest.raises(Exception, match="ffn.1 is another module than at patch"):
        compiled(X)
