"""A CUDA device that is not there. Tensors lie on the CPU, kernels are their references, sizes are
tiny whatever a command asks for, and faults are planted where the environment says.

STANDIN_FAULTS = [[regex of a command line, kind, the call of an op at which it happens], ...]
"""

import contextlib
import functools
import json
import os
import re
import signal
import time
import types
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from fusedmlp.backends import choice
from fusedmlp.backends.cuda import loader
from fusedmlp.bench import check, machine
from fusedmlp.bench.campaign import questions, worker
from fusedmlp.bench.gate import cache
from fusedmlp.bench.rivals import dense, moe
from fusedmlp.bench.rivals.cuda import Cuda
from fusedmlp.bench.timing import clock, session, tune
from fusedmlp.bench.work import ALL_CASES, Work
from fusedmlp.kernels import device
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.testing import CASES, Case

ILLEGAL = "CUDA error: an illegal memory access was encountered"


class OnCpu(TorchFunctionMode):
    """Whoever says cuda means the CPU."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return function(*map(on_cpu, args), **kwargs)


def on_cpu(value):
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class Faults:
    """kind: what is planted in this process; broken: whether its context is lost."""

    def __init__(self):
        self.kind, self.at, self.calls, self.broken = None, 0, 0, False

    def choose(self, argv):
        for pattern, kind, at in json.loads(os.environ.get("STANDIN_FAULTS", "[]")):
            if re.search(pattern, " ".join(argv)):
                self.kind, self.at = kind, at

    def call(self):
        """An op is called."""
        self.synchronize()
        self.calls += 1
        if self.kind is None or self.calls != self.at:
            return
        if self.kind == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        elif self.kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self.kind == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 200.00 GiB")
        elif self.kind == "illegal access":
            self.broken = True
            self.synchronize()

    def synchronize(self, *_):
        if self.broken:
            raise torch.AcceleratorError(ILLEGAL)

    @contextlib.contextmanager
    def capture(self, graph, stream=None):
        yield
        self.captures = getattr(self, "captures", 0) + 1
        if self.kind == "failed capture" and self.captures == self.at:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


FAULTS = Faults()


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        pass


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        FAULTS.synchronize()

    def elapsed_time(self, other):
        return max((other.at - self.at) * 1e3, 1e-3)


class Graph:
    def replay(self):
        FAULTS.synchronize()


def fake_cuda():
    properties = types.SimpleNamespace(
        name="Synthetic H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=4096,
        total_memory=1 << 37, uuid="00000000", shared_memory_per_block_optin=232448,
    )  # fmt: skip
    mode = []
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda *a: properties.name,
        "get_device_capability": lambda *a: (9, 0),
        "get_device_properties": lambda *a: properties,
        "synchronize": FAULTS.synchronize,
        "_sleep": lambda cycles: None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": FAULTS.capture,
        "current_stream": lambda *a: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_sync_debug_mode": lambda: mode[-1] if mode else 0,
        "set_sync_debug_mode": mode.append,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1 << 20,
        "empty_cache": FAULTS.synchronize,
        "clock_rate": lambda: 1980,
    }.items():
        setattr(torch.cuda, name, value)
    generator = torch.Generator
    new = lambda cls, device="cpu": generator(on_cpu(device))  # noqa: E731
    torch.Generator = type("Generator", (), {"__new__": new})
    torch.AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)
    machine.clocks = lambda: {"sm_mhz": 1980, "memory_mhz": 3201, "sm_max_mhz": 1980}
    machine._query = lambda *fields: ["0"] * len(fields)


def small(M, D, H):
    return min(M, 8), min(D, 128), min(H, 16)


def _of_small(own, M, D, H):
    return own(*small(M, D, H))


def shrink():
    for case in {id(c): c for c in (*ALL_CASES.values(), *CASES.values())}.values():
        for name in ("shapes", "out_shape"):
            own = getattr(case, name)
            if own is not None:
                object.__setattr__(case, name, functools.partial(_of_small, own))
    shapes, gemm = Work.shapes, Work.gemm

    def tiny(work):
        M, D, H = small(work.M, work.D, work.H)
        return Work(work.case, work.activation, work.dtype, M, D, H)

    Work.shapes = lambda work, phase: shapes(tiny(work), phase)
    Work.gemm = lambda work, phase="forward": gemm(tiny(work), phase)
    session.COPY_BYTES = 1 << 16
    clock.SAMPLE_MS = 0.01


def references():
    """Ops run their references, and a record says which kernels were meant."""
    run = Case.run

    def counted(case, inputs, **options):
        FAULTS.call()
        return run(case, inputs, **options)

    Case.run = counted
    choice.pick = lambda op, x, name="x": "reference"
    check._backend_name = lambda work: "cuda" if choice.chosen() == "cuda" else "triton"
    Cuda.skip = dense.Fusedmlp.skip
    dense.Fusedmlp.dglu = dense.Eager.dglu
    dense.Compiled.function = lambda rival, work: super(dense.Compiled, rival).function(work)
    for kind in (dense.Compile, dense.CompilePacked, moe.CompileGroupedMM):
        kind.missing = lambda rival: None


def search():
    draw = tune.draw
    tune.draw = lambda launch, size, dtype, device: draw(launch, small(*size), dtype, device)
    tune.Bench._launch = lambda bench, tile, inputs, training: bench.launch.reference(inputs)
    tune.run.__defaults__ = (lambda call: time.sleep(0.01) or 1.0 + 0.1 * time.time() % 1,)
    device._pretended = (ARCHES["sm_90"], 132)


class Driver:
    """cuTensorMapEncodeTiled: 0 where the distance is a multiple of 16 bytes."""

    def __init__(self, name):
        pass

    def cuTensorMapEncodeTiled(self, *arguments):  # noqa: N802 - the driver's own name
        return int(arguments[5][1] % 16 != 0)


def checkout(folder: Path):
    """A checkout to build and test in: nothing of the real one is written."""
    (folder / "csrc").mkdir(parents=True)
    (folder / "csrc" / "gated_linear_sm90.cu").touch()
    (folder / "tests").mkdir()
    (folder / "tests" / "test_gpu.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_good(): pass\n"
        "@pytest.mark.gpu\ndef test_bad(): assert 0\n"
    )
    tools = folder / "bin"
    tools.mkdir()
    for name, says in (("cmake", "built"), ("compute-sanitizer", "===== ERROR SUMMARY: 0 errors")):
        (tools / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tools / name).chmod(0o755)
    os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
    worker.ROOT = folder
    cache.EXTENSION_STAMP = folder / "_C.stamp"
    extension = types.SimpleNamespace(CUDA="13.0", ARCHS="sm_90 sm_90a")
    loader.load = lambda: (extension, "")
    questions.ctypes = types.SimpleNamespace(**{**vars(questions.ctypes), "CDLL": Driver})


def install(folder: Path):
    fake_cuda()
    shrink()
    references()
    search()
    checkout(folder)
    OnCpu().__enter__()
