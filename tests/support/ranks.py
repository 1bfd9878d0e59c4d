"""A test's body in several processes of torch.distributed."""

import datetime
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from one process that has imported what each of them would: a start of Python and
# torch costs seconds.
mp.set_forkserver_preload(["torch.distributed.fsdp", "transformers", "fusedmlp"])


def join(rank, ranks, store, body, timeout, backend):
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    body(rank, ranks)
    dist.destroy_process_group()


def spawn(ranks, body, timeout=180, backend="gloo"):
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        arguments = (ranks, store, body, timeout, backend)
        mp.start_processes(join, arguments, nprocs=ranks, start_method="forkserver")
