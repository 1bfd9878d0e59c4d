"""FLOPs: PyTorch's counter, the op's own formula and the unpatched model agree, forward and
backward, so that a trainer's MFU means the same with these kernels and without."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fusedmlp
from fusedmlp.backends.op import OPS
from fusedmlp.testing import CASES, evaluate

SIZE = 7, 24, 40


def counted(run, inputs, backward, wanted=None):
    """FLOPs of `run`, and of the gradients of what is wanted."""
    leaves = {name: t.detach() for name, t in inputs.items()}
    dy = None
    if backward:
        with torch.no_grad():
            dy = torch.ones_like(run(leaves))
    with FlopCounterMode(display=False) as counter:
        evaluate(run, leaves, dy, wanted)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_counter_formula_and_reference_agree(case, device, on_triton):
    inputs = case.inputs(*SIZE, torch.float32, device)
    op, shapes = OPS[case.op], case.shapes(*SIZE)
    forward = op.products(shapes)
    assert counted(case.run, inputs, False) == forward
    assert counted(case.run_reference, inputs, False) == forward
    if case.forward_only:
        return
    # What is made again is really run, and counts.
    again = op.remade(shapes) if case.options.get("recompute") else 0
    assert counted(case.run_reference, inputs, True) == 3 * forward
    assert counted(case.run, inputs, True) == 3 * forward + again


@pytest.mark.parametrize("name", ("gated_linear-bias", "gated_mlp", "mlp-bias", "hyper_attention",
                                  "masked_gated_linear-4", "moe_linear"))  # fmt: skip
def test_a_gradient_that_is_not_wanted_is_not_counted(name, device, on_triton):
    case = CASES[name]
    inputs = case.inputs(*SIZE, torch.float32, device)
    for wanted in [n for n, t in inputs.items() if t.is_floating_point()]:
        ours = counted(case.run, inputs, True, (wanted,))
        assert ours == counted(case.run_reference, inputs, True, (wanted,)), wanted


def test_useful_flops_are_the_counted_ones_but_where_an_op_says_otherwise():
    for case in CASES.values():
        op, shapes = OPS[case.op], case.shapes(*SIZE)
        if op.counted is None:
            assert op.flops(shapes) == op.products(shapes) == case.flops(*SIZE)
        else:
            assert op.flops(shapes) != op.products(shapes), "then it needs no formula of its own"


def test_a_patched_model_counts_as_before(device, on_triton):
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
    x = torch.randn(8, 16, device=device, requires_grad=True)

    def flops():
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    model.to(device)
    before = flops()
    fusedmlp.patch(model)
    assert flops() == before == 3 * 4 * 8 * 16 * 32
