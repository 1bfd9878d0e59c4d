"""Each op once: its formula in float64 and its kernels at one size. `make quick` runs this file;
the others of this folder have all sizes, dtypes and ways of calling."""

import dataclasses

import pytest
import torch
from op_checks import check
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedmlp import backend, reference
from fusedmlp.backends import derivatives
from fusedmlp.testing import CASES, evaluate, floating
from fusedmlp.testing.memory import kept_bytes

# The last of each op's cases: with biases, masks and mixings, where the first has none.
ONE = {case.op: case for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_what_its_name_says(name):
    """Else what it stands for is nowhere tested."""
    case = CASES[name]
    biases = [argument for argument in case.shapes(5, 12, 8) if argument.startswith("b")]
    assert biases or "-bias" not in name
    assert case.options.get("recompute", False) == ("-recompute" in name)
    assert f"-{case.options.get('packed') or ''}" in f"{name}-"
    assert not (case.gated and "-plain" in name)


def test_cases_choose_each_expert_once_and_have_ranks_at_both_ends_of_a_tile():
    ranks = set()
    for case in CASES.values():
        for name, t in case.inputs(40, 12, 8, torch.float32).items():
            if name == "expert" and t.dim() == 2:
                assert all(len(set(row)) == len(row) for row in t.tolist()), case.name
            if name.endswith("_a"):
                ranks.add(t.shape[-2])
    assert min(ranks) == 1 and max(ranks) > 32


def test_how_wide_and_how_large_cases_are():
    """A gate's arguments lie within sqrt(3), and a router has as many experts as columns to 128."""
    g = CASES["gated_act"].inputs(40, 12, 8, torch.float32)["g"]
    assert 1.6 < g.abs().max() <= 3**0.5 < 1.74
    for case in CASES.values():
        if case.op in ("top1_route", "topk_route"):
            widths = [case.shapes(4, 8, H)["logits"][1] for H in (24, 300)]
            assert widths == [24, 128], case.name


@pytest.mark.parametrize("op", ONE)
def test_kernels_match_the_reference(op, device, on_triton):
    check(ONE[op], ONE[op].inputs(19, 40, 24, torch.float32, device))


@pytest.mark.parametrize("op", ONE)
def test_a_result_is_the_same_without_a_gradient(op, device, on_triton):
    """Nothing is saved then, which is another call of the kernels."""
    inputs = ONE[op].inputs(2, 16, 24, torch.float32, device)
    wants = not ONE[op].forward_only
    saved = ONE[op].run({k: t.detach().requires_grad_(wants and t.is_floating_point())
                         for k, t in inputs.items()})  # fmt: skip
    torch.testing.assert_close(ONE[op].run(inputs), saved.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ONE)
def test_reference_differentiates(op):
    """Autograd's gradients against finite differences, all at once along one direction."""
    case = ONE[op]
    inputs = case.inputs(5, 12, 8, torch.float64)
    generator = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    dy = draw(case.fake_output(5, 12, 8).shape)
    leaves = [k for k in inputs if k not in case.draws and k not in case.straight_through]
    steps = {k: draw(inputs[k].shape) for k in leaves}

    def along(t):
        return (case.run({**inputs, **{k: inputs[k] + t * steps[k] for k in leaves}}) * dy).sum()

    results = evaluate(case.run, inputs, dy)
    expected = sum((results[f"d{k}"] * steps[k]).sum() for k in leaves)
    finite = (along(1e-6) - along(-1e-6)) / 2e-6
    torch.testing.assert_close(finite, expected, rtol=1e-6, atol=1e-6)


RECOMPUTING = [name for name, case in CASES.items() if case.options.get("recompute")]


@pytest.mark.parametrize("name", [n for n in RECOMPUTING if "lora" not in n and "moe" not in n])
def test_backward_makes_again_what_the_last_projection_needs(name, device, on_triton):
    """Its gradient alone; `nightly` has every subset."""
    case, size = CASES[name], (5, 12, 20)
    inputs = case.inputs(*size, torch.float32, device)
    dy = torch.ones(case.fake_output(*size).shape, device=device)
    last = next(k for k in ("w_down", "w_out", "s_down") if k in inputs)
    made, exact = (evaluate(run, inputs, dy, (last,)) for run in (case.run, case.run_reference))
    torch.testing.assert_close(made[f"d{last}"], exact[f"d{last}"], rtol=1e-2, atol=1e-2)


# The nightly tests have every subset of the others.
FEW_LAUNCHES = [
    n for n, case in CASES.items()
    if case.adapted or case.op.startswith("binary") or n in ("gated_mlp-bias", "mlp-bias")
]  # fmt: skip


@pytest.mark.parametrize("name", FEW_LAUNCHES)
def test_each_gradient_alone(name, device, on_triton):
    """It is made without what the others need."""
    case, size = CASES[name], (5, 12, 20)
    inputs = case.inputs(*size, torch.float32, device)
    dy = torch.ones(case.fake_output(*size).shape, device=device)
    exact = evaluate(case.run_reference, inputs, dy)
    wanted = [(of,) for of in floating(inputs)]
    if case.op.startswith("binary"):  # whose scales alone need x
        wanted += [("x", of) for of in floating(inputs) if of != "x"]
    for names in wanted:
        made, of = evaluate(case.run, inputs, dy, names), f"d{names[-1]}"
        torch.testing.assert_close(made[of], exact[of], rtol=1e-2, atol=1e-2, msg=str(names))


@pytest.mark.parametrize("name", RECOMPUTING)
def test_recompute_on_the_reference_keeps_the_arguments_alone(name):
    case, kept = CASES[name], []
    inputs = case.inputs(9, 128, 256, torch.float32)
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    for options in (case.options, {**case.options, "recompute": False}):
        run = dataclasses.replace(case, options=options).run
        with backend("reference"):
            kept.append(kept_bytes(lambda run=run: run(leaves), leaves.values()))
    assert kept[0] == 0 < kept[1]


@pytest.mark.parametrize("name", RECOMPUTING)
def test_recompute_on_the_reference_is_for_any_gradient_and_for_no_result_alone(name, monkeypatch):
    case, taken = CASES[name], []
    made = lambda formula, *arguments, **_: taken.append(1) or formula(*arguments)  # noqa: E731
    monkeypatch.setattr(derivatives, "checkpoint", made)
    inputs = case.inputs(9, 16, 24, torch.float32)
    for of in (None, *floating(inputs)):
        with backend("reference"):
            case.run({k: t.detach().requires_grad_(k == of) for k, t in inputs.items()})
        assert len(taken) == (of is not None), of
        taken.clear()


@pytest.mark.parametrize("op", ONE)
def test_reference_makes_its_own_tensors_on_the_inputs_device(op):
    """A fake tensor of one device with one of another is an error, as on a GPU."""
    case = ONE[op]
    real = case.inputs(5, 12, 8, torch.float32)
    with FakeTensorMode():
        like = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in real.items()}
        dy = None if case.forward_only else torch.ones_like(case.run_reference(like))
        results = evaluate(case.run_reference, like, dy)
    assert {t.device.type for t in results.values()} == {"meta"}


def test_packing_makes_its_own_tensors_on_the_inputs_device():
    with FakeTensorMode():
        w = torch.empty(3, 200, device="meta")
        words, scales = reference.binary.pack_signs(w), reference.binary.binary_scales(w)
        assert reference.dequantize_binary(words, scales, 200).device == w.device
        planes = reference.pack_masks(torch.empty(2, 3, 20, device="meta"))
        assert reference.unpack_masks(planes, 20).device == w.device
