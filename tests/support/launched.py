"""What launches leave behind, for the process that compiles."""

import gc

import torch
from triton.runtime.jit import JITFunction

from fusedmlp import backend
from fusedmlp.backends.library import serve_cpu
from fusedmlp.bench.gate.ptx import emulate
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.testing import CASES, evaluate


def with_two_limits(names):
    """(Case, kernels launched, how many are compiled after the first limit and after the second,
    whether every result differs) of each Case."""
    serve_cpu()
    rows = []
    for name in names:
        case = CASES[name]
        inputs = case.inputs(13, 128, 40, torch.bfloat16, activation="swiglu_oai")
        dy = torch.ones(case.fake_output(13, 128, 40).shape, dtype=torch.bfloat16)
        results, compiled = [], []
        for limit in (7.0, 3.5):
            with emulate(ARCHES["sm_80"]) as machine, backend("triton"):
                activation = f"swiglu_oai(limit={limit})"
                run = lambda t, a=activation: case.run(t, activation=a)  # noqa: B023, E731
                results.append(evaluate(run, inputs, None if case.forward_only else dy))
                kernels = sorted({run.kernel for run in machine.runs})
            compiled.append(_compiled())
        first, second = results
        differ = all(
            not torch.equal(first[key], second[key]) for key in ("out", "dx", "dg") if key in first
        )
        rows.append((name, kernels, compiled, differ))
    return rows


def _compiled():
    """Entries of the caches of every kernel."""
    kernels = [o for o in gc.get_objects() if isinstance(o, JITFunction)]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
