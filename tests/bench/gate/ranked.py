"""What the gate finds of kernels with adapters of a rank, for the process that compiles."""

from unittest import mock

import torch

from fusedmlp.bench.gate.compiling import captured
from fusedmlp.bench.gate.inspecting import inspect
from fusedmlp.bench.gate.jobs import jobs_of
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.kernels.arch.tile import ADAPTED
from fusedmlp.kernels.launches import dense


def faults_at(rank: int) -> dict[str, list[str]]:
    """The faults of each launch's largest tile on sm_90."""
    found: dict[str, list[str]] = {}
    with mock.patch.object(dense, "RANK", rank):
        for job in jobs_of(ARCHES["sm_90"], []):
            kind = (job.dtype, job.variant, bool(job.tile and job.tile.tma))
            if kind != (torch.bfloat16, "train", True) or job.name in found:
                continue
            if job.name.endswith(ADAPTED):
                rows = [inspect(job, *launched) for launched in captured(job)]
                found[job.name] = [fault for row in rows for fault in row.faults]
    return found
