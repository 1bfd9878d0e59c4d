"""fusedmlp._C for the host: csrc/bindings.cpp over all kernels, compiled by g++ for the SIMT
runner. Under `installed` the backend "cuda" runs those of one architecture on CPU tensors."""

import functools
import importlib.machinery
import importlib.util
import sysconfig
from contextlib import contextmanager
from types import SimpleNamespace

import pybind11
import simt_build

from fusedmlp.backends import choice, driver
from fusedmlp.backends.cuda import (
    binary as cuda_binary,
    gated_linear as cuda_gated_linear,
    loader,
    masked as cuda_masked,
    route as cuda_route,
)
from fusedmlp.kernels.arch import arch_for
from fusedmlp.kernels.device import pretend

FLAGS = (
    f"-isystem{sysconfig.get_path('include')}",
    f"-isystem{pybind11.get_include()}",
    # Python's own structs end in arrays of one element that are longer.
    "-fno-sanitize=bounds-strict",
)
MULTIPROCESSORS = 3  # an odd number, so that a cluster of two leaves one out; loops do loop


# Where each kernel is, and what CMake defines for its architecture.
SOURCES = {
    **{f"sm_{sm}a": dict.fromkeys(
        ("gated_linear_fwd", "gated_linear_bwd", "linear_act_fwd", "linear_act_bwd"),
        f"csrc/gated_linear_sm{sm}.cu") for sm in (90, 100)},
    "sm_80": {
        "binary_linear_fwd": "csrc/binary_gemv.cu",
        "binary_gated_linear_fwd": "csrc/binary_gemv.cu",
        "masked_gated_linear_fwd": "csrc/masked_gated_gemv.cu",
        "top1_route_fwd": "csrc/moe_route.cu",
        "route_to_fwd": "csrc/moe_route.cu",
    },
}  # fmt: skip
DEFINES = {
    "sm_90a": 'FUSEDMLP_SM90="sm_90a"', "sm_100a": 'FUSEDMLP_SM100="sm_100a"',
    "sm_80": 'FUSEDMLP_PORTABLE="sm_80"',
}  # fmt: skip


@functools.cache
def _built():
    """The module, and each source's library; apart, for the runner keeps a library's thread-local
    memory for __shared__."""
    sources = {source for of in SOURCES.values() for source in of.values()}
    libraries = {source: simt_build.load(source) for source in sorted(sources)}
    archs = f'FUSEDMLP_ARCHS="{" ".join(SOURCES)}"'
    defines = (*DEFINES.values(), archs, 'FUSEDMLP_CUDA_VERSION="host"')
    paths = ",".join(str(library.path) for library in libraries.values())
    flags = (*FLAGS, f"-Wl,--no-as-needed,{paths}")
    path = simt_build.load("csrc/bindings.cpp", *defines, flags=flags).path
    loader = importlib.machinery.ExtensionFileLoader("host._C", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("host._C", loader))
    loader.exec_module(module)
    return module, libraries


def libraries(arch: str) -> list:
    """Those of an architecture's kernels."""
    _, built = _built()
    return [built[source] for source in sorted(set(SOURCES[arch].values()))]


def extension(arch: str, seed: int = 0):
    """What `loader.load` finds of a build for one architecture; launchers run with `seed`, and what
    the runner finds wrong raises."""
    module, built = _built()

    def on_runner(kernel, launcher):
        def launch(*arguments):
            with built[SOURCES[arch][kernel]].running(kernel, seed=seed):
                launcher(*arguments)

        return launch

    ops = {key: on_runner(key[0], module.OPS[key]) for key in module.OPS if key[1] == arch}
    others = {name: getattr(module, name) for name in vars(module) if name != "OPS"}
    return SimpleNamespace(OPS=ops, **(others | {"ARCHS": arch}))


@contextmanager
def installed(monkeypatch, arch: str, seed: int = 0, multiprocessors: int = MULTIPROCESSORS):
    monkeypatch.setattr(loader, "load", lambda: (extension(arch, seed), ""))
    monkeypatch.setattr(driver, "version", lambda: 0)  # there is none to be too old
    for launchers in (cuda_binary, cuda_gated_linear, cuda_masked, cuda_route):
        monkeypatch.setattr(launchers, "stream", lambda device: 0)
    loader.find.cache_clear()
    choice.SERVED.clear()
    try:
        capability = int(arch.removeprefix("sm_").removesuffix("a"))
        with pretend(arch_for(capability), multiprocessors):
            yield
    finally:
        loader.find.cache_clear()
        choice.SERVED.clear()
