"""Interleaved Cases on the PTX machine, for the process that compiles."""

from unittest import mock

import torch

from fusedmlp.bench.gate.execute import jobs
from fusedmlp.bench.gate.execute.executing import ORDERS, execute
from fusedmlp.kernels.arch import ARCHES

# Large enough for Blackwell to trust its descriptors, with several tiles and ragged ends.
LARGE = (130, 264, 136)
TURNED = jobs.SHAPES["transposed"].change
VARIANTS = {
    "large": jobs.Variant(LARGE, None),
    "large transposed": jobs.Variant(LARGE, None, TURNED),
    **{name: jobs.SHAPES[name] for name in ("ragged", "few rows", "transposed")},
}


def findings(arch, name, variants):
    """(variant, findings, launched) of a Case in bfloat16, in two orders."""
    with mock.patch.dict(jobs.SHAPES, VARIANTS, clear=True):
        chosen = [
            job
            for job in jobs.jobs_of(ARCHES[arch])
            if job.covers[0][0] == name and job.what in variants and job.dtype == torch.bfloat16
        ]
    return [(job.what, row.findings, row.launched) for job in chosen
            for row in execute(job, ORDERS[:3:2])]  # fmt: skip
