"""csrc/cutlass/ on the PTX machine: its host code runs over a stand-in for the CUDA runtime, with
the checks and tensor maps of CUTLASS, and at a launch runs the PTX that nvcc makes of it."""

import ctypes
import functools
import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import cutlass_fake
import ptx_csrc
import pybind11
import simt_build
import torch

from fusedmlp.bench.gate.ptx import Order, Program, load
from fusedmlp.bench.gate.ptx.memory import Fresh, Regions

CSRC = simt_build.ROOT / "csrc"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr")
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def _headers() -> str:
    find = [sys.executable, str(CSRC / "cutlass/find.py")]
    said = subprocess.run(find, check=True, capture_output=True, text=True).stdout
    return said.strip().partition(";")[2]


def _made(name: str, key: str, command: list[str]) -> Path:
    """What a command makes with "-o" and a path, kept by content."""
    stem, suffix = name.split(".")
    made = simt_build.cache_folder() / f"{stem}-{key}.{suffix}"
    if not made.exists():
        part = made.with_name(f"{stem}-{key}.part.{suffix}")
        subprocess.run([*command, "-o", str(part)], check=True)
        part.rename(made)
    return made


@functools.cache
def _key() -> str:
    files = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp"))
    runtime = Path(__file__).with_name("cutlass_runtime.cpp")
    return simt_build.digest([*FLAGS, *(p.read_bytes() for p in (*files, runtime))])


@functools.cache
def extension(sm: int):
    """The module and its library."""
    source, arch = CSRC / f"cutlass/cutlass_sm{sm}.cu", f"sm_{sm}a"
    nvcc = ["nvcc", *FLAGS, "-I", _headers()]
    # The host's side alone matters here, and it is the same for every architecture of the family.
    device = [f"-gencode=arch=compute_{sm}a,code=compute_{sm}a", "-Xcompiler=-fPIC", "-c"]
    item = _made(f"cutlass_sm{sm}.o", _key(), [*nvcc, *device, str(source)])
    defines = [
        f'-DFUSEDMLP_SM{sm}="{arch}"', f'-DFUSEDMLP_ARCHS="{arch}"',
        '-DFUSEDMLP_CUDA_VERSION="13.0"', '-DFUSEDMLP_CUTLASS_VERSION="4.2"',
    ]  # fmt: skip
    includes = [sysconfig.get_path("include"), pybind11.get_include(), _cuda_headers()]
    sources = [CSRC / "cutlass/bindings.cpp", Path(__file__).with_name("cutlass_runtime.cpp"), item]
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++17", *defines]
    command += [f"-isystem{folder}" for folder in includes]
    path = _made(f"cutlass_sm{sm}.so", _key(), [*command, *map(str, sources)])
    name = f"sm{sm}._cutlass"  # pybind11 hands out one module for each name
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module, ctypes.CDLL(str(path))


def _cuda_headers() -> str:
    text = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="-I([^"]+?)"', text)
    assert found is not None, text
    return found[1]


@functools.cache
def text(sm: int) -> str:
    source = CSRC / f"cutlass/cutlass_sm{sm}.cu"
    command = ["nvcc", "-ptx", "-lineinfo", *FLAGS, "-I", _headers(), f"-arch=compute_{sm}a"]
    ptx = _made(f"cutlass_sm{sm}.ptx", _key(), [*command, str(source)]).read_text()
    # What the machine has other words for. Clusters are of two blocks along x, and no lane of a
    # product of tcgen05 is disabled.
    ptx = ptx.replace("%cluster_ctaid.x", "%cluster_ctarank")
    ptx = re.sub(r"%cluster_ctaid\.[yz]", "0", ptx)
    ptx = re.sub(r"(tcgen05\.mma[^;{]*), \{[^}]*\}", r"\1", ptx)
    return re.sub(r"(tcgen05\.ld[\w.]*)\{", r"\1 {", ptx)


def program(sm: int, name: str) -> Program:
    return load(text(sm), name)


@contextmanager
def installed(sm: int, tensors: list[torch.Tensor], order: Order):
    """Inside, backend("cutlass") runs on CPU tensors, and a launch may touch `tensors` alone;
    yields the names of kernels that ran."""
    module, library = extension(sm)
    ran: list[str] = []
    raised: list[BaseException] = []

    def run(name: str, dims: list[int], shared: int, arguments) -> None:
        found, regions, places = program(sm, name), Regions(Fresh()), []
        for t in tensors:
            address = regions.tensor(f"tensor of {tuple(t.shape)}", t)
            begin, end, host, _ = regions.rows[-1]
            places.append((host, end - begin, address))
        sizes = found.lowered.kernel.param_sizes
        given = [ctypes.string_at(arguments[k], size) for k, size in enumerate(sizes)]
        # No races: CUTLASS lets one thread of a warpgroup say that its four warps have read a
        # stage, for their product is one; the machine orders each warp by its own word.
        # Not strict: CUTLASS leaves it to ptxas to wait between tcgen05.ld and a move.
        found.run(
            dims[3:6], [ptx_csrc._translated(data, places) for data in given], regions,
            threads=dims[6] * dims[7] * dims[8], cluster=tuple(dims[:3]), shared=shared,
            order=order, elements=2, strict=sm == 90, races=False, budget=60_000_000,
        )  # fmt: skip
        ran.append(name)

    def launch(name, dims, shared, arguments) -> int:
        try:
            run(name.decode(), [dims[k] for k in range(9)], shared, arguments)
        except BaseException as error:
            raised.append(error)
            return 1
        return 0

    hook = _LAUNCH(launch)
    library.runtime_hook(hook)
    try:
        with cutlass_fake.installed(gpu=sm, loaded=(module, ""), version=0, multiprocessors=4):
            yield ran
    except Exception:
        if raised:
            raise raised[0] from None
        raise
    finally:
        library.runtime_hook(_LAUNCH())
