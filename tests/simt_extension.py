"""fusedmlp._C for the host: csrc/bindings.cpp over the kernels of one architecture, compiled by g++
for the SIMT runner. Under `installed` the backend "cuda" runs them on CPU tensors."""

import functools
import importlib.machinery
import importlib.util
import sysconfig
from contextlib import contextmanager
from types import SimpleNamespace

import pybind11
import simt_build

from fusedmlp import _cuda, _cuda_gated_linear
from fusedmlp.kernels.arch import ARCHES, pretend

FLAGS = (
    f"-isystem{sysconfig.get_path('include')}",
    f"-isystem{pybind11.get_include()}",
    # Python's own structs end in arrays of one element that are longer.
    "-fno-sanitize=bounds-strict",
)
MULTIPROCESSORS = 3  # an odd number, so that a cluster of two leaves one out; loops do loop


@functools.cache
def _built(sm: int):
    """The kernels' library and the module; apart, for the runner keeps a library's thread-local
    memory for __shared__."""
    library = simt_build.load(f"csrc/gated_linear_sm{sm}.cu")
    defines = (f"FUSEDMLP_SM{sm}", f'FUSEDMLP_ARCHS="sm_{sm}a"', 'FUSEDMLP_CUDA_VERSION="host"')
    flags = (*FLAGS, f"-Wl,--no-as-needed,{library.path}")
    path = simt_build.load("csrc/bindings.cpp", *defines, flags=flags).path
    name = f"sm_{sm}._C"  # pybind11 hands out one module for each name
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module, library


def extension(sm: int, seed: int = 0):
    """What `_cuda.load` finds: the module, its launchers run with `seed`; runner errors raise."""
    module, library = _built(sm)

    def on_runner(kernel, launcher):
        def launch(*arguments):
            with library.running(kernel, seed=seed):
                launcher(*arguments)

        return launch

    ops = {key: on_runner(key[0], launcher) for key, launcher in module.OPS.items()}
    names = ("CUDA", "ARCHS", "SUM_ROWS", "DTYPES", "ACTIVATIONS", "VARIANTS")
    return SimpleNamespace(OPS=ops, **{name: getattr(module, name) for name in names})


@contextmanager
def installed(monkeypatch, sm: int, seed: int = 0, multiprocessors: int = MULTIPROCESSORS):
    monkeypatch.setattr(_cuda, "load", lambda: (extension(sm, seed), ""))
    monkeypatch.setattr(_cuda_gated_linear, "_stream", lambda device: 0)
    _cuda.find.cache_clear()
    try:
        with pretend(ARCHES[f"sm_{sm}"], multiprocessors):
            yield
    finally:
        _cuda.find.cache_clear()
