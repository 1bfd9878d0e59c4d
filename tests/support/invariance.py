"""A row alone and in batches: which results differ, of any Case."""

import random

import torch

from fusedmlp import batch_invariant
from fusedmlp.testing import evaluate, floating

BATCHES = (1, 2, 15, 16, 17, 33, 64, 130, 1000)


def by_rows(case, D, H):
    """Arguments of which a batch has one row each."""
    few, many = case.shapes(2, D, H), case.shapes(3, D, H)
    return [name for name in few if few[name] != many[name]]


def bits(t):
    return t.detach().contiguous().view(-1).view(torch.uint8)


def differing(case, D, H, dtype, batches=BATCHES, *, device="cpu", seed=0, wanted=None, mode=True):
    """(batch, result) wherever a row, drawn at random and put at a random place, has other bits in
    a batch than alone, and where a batch has other bits the second time."""
    draw = random.Random(seed)
    M = max(batches)
    inputs = case.inputs(M, D, H, dtype, device, seed=seed)
    own = by_rows(case, D, H)
    with torch.no_grad():
        whole = case.run_reference(inputs)
    dy = None if case.forward_only else torch.randn(whole.shape, device=device).to(whole)
    names = None if wanted is None else tuple(floating(inputs)) if wanted == "all" else wanted

    def run(rows):
        at = torch.tensor(rows, device=device)
        some = {name: t[at] if name in own else t for name, t in inputs.items()}
        with batch_invariant(mode):
            return evaluate(case.run, some, None if dy is None else dy[at], names)

    row = draw.randrange(M)
    alone, found = run([row]), []
    compared = ["out", *(f"d{name}" for name in own)]
    for batch in batches:
        rows = draw.sample([r for r in range(M) if r != row], batch - 1)
        place = draw.randrange(batch)
        rows.insert(place, row)
        among = run(rows)
        for name in compared:
            if name in among and not torch.equal(bits(among[name][place]), bits(alone[name][0])):
                found.append((batch, name))
        if batch == 33:
            again = run(rows)
            found += [(batch, f"{n} again") for n in among
                      if not torch.equal(bits(among[n]), bits(again[n]))]  # fmt: skip
    return found


def executed(arch, name, dtype, size, batches, wanted="all"):
    """`differing` of compiled kernels, for the process that compiles."""
    from fusedmlp import backend
    from fusedmlp.backends.library import serve_cpu
    from fusedmlp.bench.gate.ptx import emulate
    from fusedmlp.kernels.arch import ARCHES
    from fusedmlp.testing import CASES

    serve_cpu()
    with emulate(ARCHES[arch]) as machine, backend("triton"):
        found = differing(CASES[name], *size, dtype, batches, wanted=wanted)
    return found, sorted({run.kernel for run in machine.runs})
