"""FLOPs: PyTorch's counter, the op's own formula and the unpatched model agree, forward and
backward, so that a trainer's MFU means the same with these kernels and without."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fusedmlp
from fusedmlp.backends.flops import bytes_moved, hyper_scores
from fusedmlp.backends.op import OPS
from fusedmlp.testing import CASES, evaluate

SIZE = 3, 8, 24


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


ALONE = {
    "gated_linear-bias": ("x", "w_gate", "b_up"), "gated_mlp": ("x", "w_up", "w_down"),
    "mlp-bias": ("w_in", "b_in", "w_out"), "masked_gated_linear-4": ("x", "w", "masks"),
    "moe_linear": ("x", "w", "b"), "hyper_attention": ("k", "u1", "vt1", "c2", "vt2", "v"),
}  # fmt: skip


@pytest.mark.parametrize("name, argument", [(n, a) for n, names in ALONE.items() for a in names])
def test_a_gradient_that_is_not_wanted_is_not_counted(name, argument, device, on_triton):
    case = CASES[name]
    inputs = case.inputs(*SIZE, torch.float32, device)
    ours = counted(case.run, inputs, True, (argument,))
    assert ours == counted(case.run_reference, inputs, True, (argument,))


def test_useful_flops_are_the_counted_ones_but_where_an_op_says_otherwise():
    for case in CASES.values():
        op, shapes = OPS[case.op], case.shapes(*SIZE)
        if op.counted is None:
            assert op.flops(shapes) == op.products(shapes) == case.flops(*SIZE)
        else:
            assert op.flops(shapes) != op.products(shapes), "then it needs no formula of its own"


def test_a_causal_score_is_useful_where_it_is_visible():
    for T in (1, 5, 6):
        shapes = {"q": (2, 4, T, 3), "v": (2, 2, T, 7), "c1": (2, 4, T, 5)}
        seen = sum(j <= i for i in range(T) for j in range(T))
        pair = 2 * (4 * (3 + 2 * 5) + 2 * 7)
        assert hyper_scores(shapes, visible=True) == 2 * seen * pair
        assert hyper_scores(shapes, visible=False) == 2 * T * T * pair


def test_bytes_of_a_phase():
    arguments = ((8, True), (4, False), (2, True))
    moved = [bytes_moved(iter(arguments), 16, p) for p in ("forward", "backward", "both")]
    assert moved == [14 + 16, 14 + 16 + 10, 2 * (14 + 16) + 10]


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
