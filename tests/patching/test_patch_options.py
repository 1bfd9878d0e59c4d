"""Options of patch(), each with each other and with every kind of block, and what they refuse."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from patch_blocks import MLP, GatedMLP, LlamaLike, Model, Packed, Residual
from test_patch_topk import D, block

import fusedmlp
from fusedmlp.layers import BinaryGatedMLP
from fusedmlp.patching import Plan, gate, route, spelling
from fusedmlp.patching.swap import Patched

OPTIONS = ("dtype_check", "recompute", "batch_invariant")
REACH = OPTIONS[1:]  # each patched module
# kind -> (how it is made, its ops, how many of them recompute)
KINDS = {
    "gated": (GatedMLP, ["gated_mlp"], 1),
    "packed": (Packed, ["gated_mlp"], 1),
    "plain": (MLP, ["mlp"], 0),
    "spread": (Residual, ["mlp"], 0),
    "experts": (block, ["moe_mlp", "topk_route"], 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_combination(kind):
    """Each option reaches each patched module, a router too, and says so; the numbers stay."""
    make, ops, count = KINDS[kind]
    model = Model(make())
    x = torch.randn(2, 3, D if kind == "experts" else 8)
    expected = model(x)
    for given in itertools.product((True, False), repeat=len(REACH)):
        options = dict(zip(REACH, given, strict=True))
        report = fusedmlp.patch(model, **options)
        assert [entry.op for entry in report.patched] == ops and not report.left, options
        details = [entry.detail for entry in report.patched]
        assert sum("saves x alone" in text for text in details) == count * options["recompute"]
        assert sum(e.spared > 0 for e in report.patched) == count * options["recompute"]
        taken = [m for m in model.modules() if isinstance(m, Patched)]
        assert {m._plan.invariant for m in taken} == {options["batch_invariant"]}, options
        assert {"batch-invariant" in m.extra_repr() for m in taken} == {options["batch_invariant"]}
        torch.testing.assert_close(model(x), expected)
        fusedmlp.unpatch(model)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_of_each_plan_runs(kind):
    """As many rows as asked for, of the width that the module takes, like the tensor given."""
    model = Model(KINDS[kind][0]()).double()
    assert fusedmlp.patch(model, dtype_check=False).patched
    for module in (m for m in model.modules() if isinstance(m, Patched)):
        x, *more = module._plan.example(module, 5, torch.ones(1, dtype=torch.float64))
        assert x.shape == (5, D if kind == "experts" else 8) and x.dtype == torch.float64
        made = module._plan.trial(module, x, *more)
        assert (made if isinstance(made, torch.Tensor) else made[0]).shape[0] == 5


def test_patching_draws_nothing(monkeypatch):
    """Modules are tried on values of generators of their own."""
    for module in (spelling, gate, route):  # what was found before is not looked for again
        monkeypatch.setattr(module, "_FOUND", {})
    model = Model(GatedMLP(), Packed(), block())
    before = torch.get_rng_state()
    assert len(fusedmlp.patch(model).patched) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_takes_its_mode_by_name():
    @dataclass(frozen=True)
    class Scaled(Plan):
        scale: float = 1.0

    assert Scaled("chunk", 2.0) == Scaled(method="chunk", scale=2.0, invariant=False)
    with pytest.raises(TypeError):
        Plan("chunk", True)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_true_or_false(option):
    model = Model(GatedMLP())
    for wrong in (0, 1, None, "no", [True]):
        with pytest.raises(TypeError) as told:
            fusedmlp.patch(model, **{option: wrong})
        assert str(told.value) == f"patch: {option} must be True or False, got {wrong!r}"
    assert not any(isinstance(m, Patched) for m in model.modules())


def test_a_dtype_that_no_kernel_takes():
    """Left, or patched where dtype_check is off: patch() and patched() alike."""
    model = Model(GatedMLP(), MLP()).double()
    for check, count in ((True, 0), (False, 2)):
        assert len(fusedmlp.patch(model, dtype_check=check).patched) == count
        fusedmlp.unpatch(model)
        with fusedmlp.patched(model, dtype_check=check) as report:
            assert len(report.patched) == count
            plans = [m._plan for m in model.modules() if isinstance(m, Patched)]
            assert len(plans) == count and not any(p.invariant or p.recompute for p in plans)


def test_options_beside_quantize():
    """recompute is of what stays dense. What would promise too much is refused before anything."""
    model = Model(LlamaLike(), GatedMLP())
    for refused, message in (
        ({"only": "blocks.*"}, "only must be None with quantize='q1_0', got 'blocks.*'"),
        ({"batch_invariant": True}, "batch_invariant must be False with quantize='q1_0', got True"),
    ):
        with pytest.raises(ValueError) as told:
            fusedmlp.patch(model, quantize="q1_0", **refused)
        assert str(told.value).startswith(f"patch: {message}")
        assert type(model.blocks[0]) is LlamaLike and type(model.blocks[1]) is GatedMLP
    model.double().blocks[0].float()
    report = fusedmlp.patch(model, quantize="q1_0", recompute=True, dtype_check=False)
    assert [entry.op for entry in report.patched] == ["binary_gated_mlp", "gated_mlp"]
    assert "saves x alone" in report.patched[1].detail and report.quantized.layers
    assert not model.blocks[1]._plan.invariant
    assert type(model.blocks[0]) is BinaryGatedMLP


ROUTED = {"experts": "moe_mlp", "gate": "topk_route"}


@pytest.mark.parametrize("only, found", [("experts", ["experts"]), (["gate", "experts"], [*ROUTED]),
                                         ("gate", []), ("*", [*ROUTED])])  # fmt: skip
def test_only_a_router_or_its_experts(only, found):
    """A router is patched beside experts that are."""
    report = fusedmlp.patch(block(), only=only)
    assert [(entry.name, entry.op) for entry in report.patched] == [(n, ROUTED[n]) for n in found]


def test_a_parameter_that_is_none_is_none_of_the_router():
    model = block()
    model.gate.register_parameter("bias", None)
    assert {entry.name for entry in fusedmlp.patch(model).patched} == {*ROUTED}
    assert {name for name, _ in model.gate._plan.matrices(model.gate)} == {"weight"}
    stacks = {"gate_up_proj", "down_proj"}
    assert {name for name, _ in model.experts._plan.matrices(model.experts)} == stacks


def test_a_router_that_is_left_has_a_line():
    model = block()
    model.gate.register_forward_hook(lambda *_: None)
    (left,) = fusedmlp.patch(model).left
    assert (left.name, left.kind, left.op) == ("gate", type(model.gate).__name__, None)
    assert left.detail == "its router runs as it is: it has hooks"


def test_only_a_block_that_is_in_one_bit():
    """Those that are packed have a line, of those that are asked for."""
    model = Model(LlamaLike(), LlamaLike())
    fusedmlp.quantize_model(model)
    model.blocks.append(BinaryGatedMLP(128, 256))
    for only, found in (("blocks.1", "1"), (["*.0", "*.2"], "0"), ("*", "01"), (None, "01")):
        report = fusedmlp.patch(model, only=only)
        lines = [(e.name, e.kind, e.op) for e in report.entries if e.op is not None]
        assert lines == [(f"blocks.{i}", "BinaryGatedMLP", "binary_gated_mlp") for i in found]


def test_a_pattern_that_matches_nothing_names_the_two_nearest():
    model = Model(GatedMLP(), MLP())
    with pytest.raises(ValueError) as told:
        fusedmlp.patch(model, only=["*", "block.1"])
    names = "'blocks.1' and 'blocks.1.2'"
    assert str(told.value) == (
        f"patch: only must match names of modules, such as {names}, got 'block.1'"
    )
