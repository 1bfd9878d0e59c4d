"""A process without Triton's interpreter, for tests of compiled kernels: whether Triton interprets
is decided once, when it is imported."""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    import torch

    torch.set_num_threads(1)


def in_compiler(function, *args):
    """What function(*args) returns there; all that travels must be picklable."""
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:  # the process begins at its first work, with this environment
        return _process().submit(function, *args).result()
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted
