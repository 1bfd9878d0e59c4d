"""What patch() leaves, or calls, and the reason that its report gives."""

from types import MethodType

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from layer_checks import Stranger
from patch_blocks import MLP, GatedMLP, Model
from torch import nn

import fusedmlp
from fusedmlp.layers.parts.around import HOOKS
from fusedmlp.patching import Plan
from fusedmlp.patching.around import passed_over, stands_around
from fusedmlp.patching.find import find
from fusedmlp.patching.walk import REGISTERED


def reason(model):
    """Why the only MLP in `model` was left."""
    report = fusedmlp.patch(model)
    assert not report.patched and len(report.left) == 1, report
    assert "left, " in str(report)
    return report.left[0].detail


def replaced(**changes):
    block = GatedMLP()
    for name, module in changes.items():
        setattr(block, name, module)
    return Model(block)


def with_own_forward():
    model = Model(GatedMLP())
    model.blocks[0].forward = lambda t: t
    return model


def tied():
    model = Model(GatedMLP(), nn.Linear(8, 12))
    model.blocks[1].weight = model.blocks[0].w1.weight
    return model


def tied_module():
    model = Model(GatedMLP())
    model.also = model.blocks[0].w2
    return model


class Buffered(nn.SiLU):
    """Silu today; what it computes when its buffer is another, values cannot tell."""

    def __init__(self, *size):
        super().__init__()
        self.register_buffer("shift", torch.zeros(size))

    def forward(self, t):
        return super().forward(t + self.shift.sum())


def twice():
    block = MLP()
    return Model(block, block)


def mixed():
    model = Model(MLP())
    model.blocks[0][2].double()
    return model


@pytest.mark.parametrize(
    "make, why",
    [
        (with_own_forward, "its forward is set on the instance"),
        (tied, "tied: w1.weight also is blocks.0.w1.weight and blocks.1.weight"),
        (tied_module, "tied: w2 also is blocks.0.w2 and also"),
        *((lambda size=size: replaced(act=Buffered(*size)), "act (Buffered) is neither a")
          for size in ((), (2,))),
        (twice, "tied: it also is blocks.0 and blocks.1"),
        (mixed, "its dtypes are torch.float32, torch.float64; kernels take one of bfloat16"),
        (lambda: Model(MLP()).double(), "its dtypes are torch.float64; kernels take one of"),
        (lambda: replaced(act=Stranger()), "neither factor of its product is an activation"),
        (lambda: replaced(act=nn.PReLU()), "act (PReLU) is neither a projection"),
        (lambda: Model(MLP(Stranger())), "Stranger is no activation that has a kernel"),
    ],
)  # fmt: skip
def test_left_with_its_reason(make, why):
    model = make()
    kinds = [type(m) for m in model.modules()]
    assert why in reason(model)
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_module_is_left():
    """As an MLP, as a projection in one, and where an adapter would take it."""
    whole, part = torch.jit.script(MLP()), MLP()
    part[0] = torch.jit.script(part[0])
    left = "0 is a torch.jit._script.RecursiveScriptModule, so it is called"
    assert left in reason(Model(part)) and not fusedmlp.patch(Model(whole)).patched
    kind = type(whole)
    fusedmlp.register_patch(kind, lambda module: Plan())
    try:
        report = fusedmlp.patch(Model(whole))
        assert {e.detail for e in report.entries} == {"it is a ScriptModule"}
    finally:
        del REGISTERED[kind]


class Scales(nn.Module):
    """Two projections, one behind the other, by names that say nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = (
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Parameter(torch.ones(12)),
        )

    def forward(self, t):
        return self.b(torch.relu(self.a(t)) * self.scale)


class Side(Scales):
    """Two projections side by side."""

    def forward(self, t):
        return self.a(t).sum() + self.b(t.new_ones(12)).sum()


def test_two_chained_projections_have_a_line():
    model = nn.ModuleDict({"x": Scales(), "y": Side(), "z": nn.Sequential(MLP(), nn.Linear(8, 8))})
    report = fusedmlp.patch(model)
    assert [(e.name, e.op) for e in report.entries] == [("x", None), ("z.0", "mlp")]
    assert report.left[0].detail == "scale stands between its projections"


class Pointwise(nn.Module):
    """Two projections of channels, which come first."""

    def __init__(self, conv, groups=1):
        super().__init__()
        self.a, self.b = conv(8, 12, 1, groups=groups), conv(12, 8, 1)

    def forward(self, t):
        return self.b(torch.relu(self.a(t)))


@pytest.mark.parametrize("conv", (nn.Conv1d, nn.Conv2d, nn.Conv3d))
def test_convolutions_of_one_element_have_a_line(conv):
    """Grouped ones as well; wider ones project more than a token."""
    model = nn.ModuleDict({"x": Pointwise(conv), "y": Pointwise(conv, groups=4)})
    for entry in fusedmlp.patch(model).left:
        assert f"a is a torch.nn.modules.conv.{conv.__name__}, b is a" in entry.detail
    assert [e.name for e in fusedmlp.patch(model).entries] == ["x", "y"]
    wide = conv(8, 12, 3)
    assert not fusedmlp.patch(nn.Sequential(wide, nn.ReLU(), wide)).patched


class TwoInputs(Scales):
    """Something else is multiplied between its projections, in a forward that no one traces."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP()

    def forward(self, t, scale, flag=None):
        if t.sum() > 0:
            t = t + self.mlp(t)
        t = self.a(t)
        t = torch.relu(t)
        t = t * scale
        return self.b(t)


def test_a_forward_that_takes_more_between_its_projections():
    report = fusedmlp.patch(nn.ModuleDict({"x": TwoInputs()}))
    assert [(e.name, e.op) for e in report.entries] == [("x", None), ("x.mlp", "mlp")]
    assert report.left[0].detail == "its forward takes scale, t, not x alone"


class Between(TwoInputs):
    """And through a part that is no projection."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, t, scale, flag=None):
        if t.sum() > 0:
            t = t + self.mlp(t)
        return self.b(self.part(self.a(t)) * scale)


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (nn.ReLU(), ["x", "x.mlp"]),
        (nn.Sequential(nn.ReLU()), ["x", "x.mlp"]),
        (nn.Sequential(nn.Linear(12, 12)), ["x.mlp"]),
    ],
)
def test_a_forward_has_a_line_of_its_own_where_no_part_of_it_has_projections(part, names):
    report = fusedmlp.patch(nn.ModuleDict({"x": Between(part)}))
    assert [entry.name for entry in report.entries] == names


def test_a_module_dict_that_is_run_in_a_loop():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            parts = {"a": nn.Linear(8, 12), "act": nn.GELU(), "b": nn.Linear(12, 8)}
            self.norm, self.mlp = nn.LayerNorm(8), nn.ModuleDict(parts)

        def forward(self, t):
            y = self.norm(t)
            for part in self.mlp.values():
                y = part(y)
            return t + y

    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(3, 8)
    expected = layer(x)
    (entry,) = fusedmlp.patch(nn.ModuleList([layer])).patched
    assert entry.op == "mlp"
    torch.testing.assert_close(layer(x), expected)


class StrangeExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.zeros(2, 4, 4, dtype=torch.uint8), requires_grad=False
        )

    def forward(self, t, index, weights):
        return t


def test_experts_of_a_class_that_nobody_knows():
    assert reason(Model(StrangeExperts())).endswith(
        "StrangeExperts makes of its weights is not known"
    )


class Bank(StrangeExperts):
    def __init__(self):
        super().__init__()
        self.second = nn.Parameter(torch.zeros(2, 4, 4))


@pytest.mark.parametrize(("weights", "known"), [(Bank, False), (nn.Bilinear, True)])
def test_two_stacks_are_experts_and_one_is_not(weights, known):
    """A class whose name says nothing, by what it holds: a Bilinear has one stack."""
    module = weights(4, 4, 2) if known else weights()
    found = find(module)
    assert found is None if known else found.endswith("Bank makes of its weights is not known")


def test_matrices_are_of_the_projections_that_are_read():
    block = GatedMLP()
    block.w2.bias = nn.Parameter(torch.zeros(block.w2.out_features))  # which is no matrix
    plan = find(block)
    weights = ["w1.weight", "w2.weight", "w3.weight"]
    assert sorted(name for name, _ in plan.matrices(block)) == weights
    block.w1.register_forward_hook(lambda *_: None)  # which is called, then
    assert sorted(name for name, _ in plan.matrices(block)) == weights[1:]


def test_matrices_of_what_lies_in_a_container_are_named_once():
    block = nn.Sequential(nn.Sequential(nn.Linear(8, 12), nn.GELU()), nn.Linear(12, 8))
    plan = find(block)
    assert sorted(name for name, _ in plan.matrices(block)) == ["0.0.weight", "1.weight"]


class Undecided(nn.Module):
    """Its chunk cannot be followed."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def feed_forward_chunk(self, t):
        return self.parts[1](self.parts[0](t)) if t.sum() > 0 else t

    def forward(self, t):
        return self.feed_forward_chunk(t)


@pytest.mark.parametrize(
    ("parts", "names"),
    [((nn.Linear(8, 8), nn.Linear(8, 8)), ["0"]), ((GatedMLP(), nn.ReLU()), ["0.parts.0"])],
)
def test_a_chunk_that_cannot_be_followed_is_named_unless_a_part_of_it_is(parts, names):
    report = fusedmlp.patch(nn.ModuleList([Undecided(*parts)]))
    assert [entry.name for entry in report.entries] == names


class InAMethod(nn.Module):
    """What leads from one projection to the other is in no one method."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def first(self, t):
        return self.a(t).softmax(-1)

    def forward(self, t):
        return self.b(self.first(t))


def test_what_leads_on_through_a_method_is_named():
    assert "softmax" in reason(nn.ModuleList([InAMethod()]))


@pytest.mark.parametrize("make", (nn.ReLU, lambda: nn.Linear(4, 4), Side))
def test_a_model_without_an_mlp_says_so(make):
    (entry,) = fusedmlp.patch(make()).entries
    assert entry.detail == "no projection was found that leads to another, and no experts"
    assert str(fusedmlp.patch(make())).splitlines()[1].startswith("the model (")


class Alone(nn.Module):
    """Without parameters."""

    def forward(self, t):
        return t


class Twice(Plan):
    @property
    def op(self):
        return "mlp"

    def run(self, module, t):
        return 2 * t


def test_a_plan_that_bypasses_nothing():
    fusedmlp.register_patch(Alone, lambda module: Twice())
    try:
        model = Model(Alone())
        (entry,) = fusedmlp.patch(model).patched
        assert (entry.op, entry.backend) == ("mlp", "reference")
        assert torch.equal(model.blocks[0](torch.ones(2)), torch.full((2,), 2.0))
    finally:
        del REGISTERED[Alone]


@pytest.mark.parametrize("inside", (False, True))
@pytest.mark.parametrize("holds", ("nothing", "a parameter", "a buffer"))
def test_accelerates_hook_is_passed_over_where_it_moves_arguments_alone(holds, inside):
    part = nn.ReLU()
    if holds == "a parameter":
        part.scale = nn.Parameter(torch.ones(()))
    elif holds == "a buffer":
        part.register_buffer("scale", torch.ones(()))
    module = nn.Sequential(part) if inside else part
    add_hook_to_module(module, AlignDevicesHook())
    assert bool(passed_over(module)) == (holds != "nothing")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_beside_accelerates(hook):
    """Accelerate's own, on what has no parameters, moves arguments alone; another may do more."""
    act = add_hook_to_module(nn.SiLU(), AlignDevicesHook())
    assert passed_over(act) is None and "accelerate's AlignDevicesHook" in stands_around(act)
    getattr(act, hook)[0] = print
    assert passed_over(act) == stands_around(act) == "has hooks"


def test_an_activation_that_kernelize_gave_a_forward(monkeypatch):
    """It has its class's own or another kernel of the same function: a fused call may pass it by. A
    forward that is bound to something else, on a class that is not registered or beside a hook may
    do anything."""
    act = nn.SiLU()
    act.forward = MethodType(nn.SiLU.forward, act)
    assert reason(replaced(act=act)).startswith("act has a forward of its own")
    monkeypatch.setattr(nn.SiLU, "kernel_layer_name", "SiLU", raising=False)
    report = fusedmlp.patch(replaced(act=act))
    assert [entry.op for entry in report.patched] == ["gated_mlp"]
    hook = act.register_forward_hook(lambda *_: None)
    assert "hooks" in reason(replaced(act=act))
    hook.remove()
    act.forward = MethodType(nn.SiLU.forward, nn.SiLU())
    assert reason(replaced(act=act)).startswith("act has a forward of its own")
