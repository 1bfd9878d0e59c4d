"""No kernel writes a matrix that nobody reads: neither a later operator, nor who called.

Computed on tensors that have shapes and no memory, as on a GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedmlp import backend
from fusedmlp.backends.library import serve_cpu
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.kernels.device import pretend
from fusedmlp.testing import CASES, floating

M, WIDTH = 32, 64


def storages(tree):
    return {t.untyped_storage()._cdata for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}


class Reads(TorchDispatchMode):
    """made: what the kernels' operators give. read: what any operator is given."""

    def __init__(self):
        super().__init__()
        self.made, self.read = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.read |= storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fusedmlp":
            self.made += [(str(func), i, t) for i, t in enumerate(tree_leaves(out))]
        return out


def unread(case, wanted):
    """(operator, which of its results) of each matrix that nobody reads."""
    drawn = case.inputs(M, WIDTH, WIDTH, torch.bfloat16, "cpu", seed=0)
    serve_cpu()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = {
            name: fake.from_tensor(t).requires_grad_(name in wanted)
            if t.is_floating_point() else t  # whose values are looked at
            for name, t in drawn.items()
        }  # fmt: skip
        with pretend(ARCHES["sm_90"], 1), backend("triton"), Reads() as reads:
            out, grads = case.run(inputs), ()
            if wanted:
                grads = torch.autograd.grad(
                    out, [inputs[name] for name in wanted], torch.empty_like(out)
                )
    read = reads.read | storages((out, grads))
    assert reads.made
    return [
        (name, i) for name, i, t in reads.made
        if t.numel() >= M * WIDTH and t.untyped_storage()._cdata not in read
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_is_read(name):
    """Without a gradient, with all, and with that of what comes first alone, as x of a block whose
    weights are frozen."""
    case = CASES[name]
    wanted = list(floating(case.inputs(4, 16, 16, torch.float32, "cpu", seed=0)))
    for names in ([],) if case.forward_only else ([], wanted, wanted[:1]):
        assert unread(case, names) == [], names
