"""Every registered kernel, as the cases call it: a new one is here with its row and its case."""

import pytest
import torch
from launch_names import noted
from op_checks import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fusedmlp
from fusedmlp.backends.op import KERNELS, NAMESPACE, OPS
from fusedmlp.ops.tree_path import tree_path
from fusedmlp.testing import CASES, evaluate

SIZE = 2, 8, 16


class Recorder(TorchDispatchMode):
    """kernel -> the arguments of its first call."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            plain = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
            self.calls.setdefault(func._schema.name.rpartition("::")[2], (func, plain))
        return func(*args, **(kwargs or {}))


def run(case, device, wanted=None):
    """Returns the kernels that a call of the case and its gradients launch."""
    inputs = case.inputs(*SIZE, torch.float32, device)
    out = case.run(inputs)
    dy = None if case.forward_only else torch.ones_like(out)
    with Recorder() as seen:
        evaluate(case.run, inputs, dy, wanted)
    return seen.calls


# kernel -> whether each launch has set fusion, which no release of Triton need have as its default
FUSED = {}


@pytest.fixture(scope="module")
def by_op():
    """op -> the kernels that its cases launch, each with the arguments of a call."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}

    def note(name, options):
        FUSED[name] = FUSED.get(name, True) and options.get("enable_fp_fusion", False)

    with fusedmlp.backend("triton"), noted(note):
        for case in CASES.values():
            found[case.op] = run(case, device) | found.get(case.op, {})
        # act(z) where it has no product to ride on; and a layer's own op.
        found[""] = run(CASES["mlp"], device, ("w_out",))
        with Recorder() as seen:
            tree_path(torch.ones(3, 7, device=device), depth=2)
    return found | {"tree_path": seen.calls}


@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name, by_op, on_triton):
    """The cases reach every kernel."""
    func, args = next(calls[name] for calls in by_op.values() if name in calls)
    opcheck(func, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_every_launch_sets_fusion(by_op):
    """On a GPU it decides how often a product is rounded, and how fast it is."""
    assert len(FUSED) > 30 and [name for name, fused in FUSED.items() if fused is not True] == []


def test_a_row_names_the_kernels_that_its_calls_launch(by_op):
    for name, calls in by_op.items():
        if name:
            named = {kernel.name for kernel in OPS[name].kernels}
            # Experts are called with a routing that the case itself makes.
            assert named == calls.keys() - ({"route_to_fwd"} - named), name
