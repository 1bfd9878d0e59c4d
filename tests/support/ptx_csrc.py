"""csrc/ on the PTX machine: the host code of a .cu runs as for the SIMT runner, and at a launch the
PTX that nvcc makes of the same source takes the runner's place."""

import bisect
import ctypes
import functools
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

import simt_build
import simt_extension
import torch

from fusedmlp.bench.gate.ptx import Order, Program, load
from fusedmlp.bench.gate.ptx.memory import Fresh, Regions
from fusedmlp.bench.gate.ptx.tensor_map import TensorMap
from fusedmlp.testing import poison

ARCHES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100a": "compute_100a"}
FLAGS = ("-ptx", "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo")  # CMake's, and lines for findings
RUNNER_MAP = 0x7E4507A911DEA5ED  # simt::Tensor::MAGIC
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.c_int,
)  # fmt: skip


def short(mangled: list[str]) -> list[str]:
    """Templates and their arguments, without namespaces and parameters: nvcc and g++ name what is
    in an anonymous namespace in ways of their own."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True)
    names = [
        re.sub(r"\(anonymous namespace\)::|fusedmlp::|^void ", "", n)
        for n in done.stdout.split("\n")
    ]
    return [re.sub(r"\(.*", "", n).replace(" >", ">") for n in names[: len(mangled)]]


@functools.cache
def _text(source: Path, arch: str) -> str:
    folder = simt_build.cache_folder()
    files = sorted((simt_build.ROOT / "csrc").iterdir())
    key = simt_build.digest([arch, *FLAGS, *(f.read_bytes() for f in files if f.is_file())])
    made = folder / f"{source.stem}-{arch}-{key}.ptx"
    if not made.exists():
        part = made.with_suffix(f".{id(made)}")
        command = ["nvcc", *FLAGS, f"-arch={ARCHES[arch]}", "-o", str(part), str(source)]
        subprocess.run(command, check=True)
        part.rename(made)
    return made.read_text()


@functools.cache
def _entries(source: Path, arch: str) -> dict[str, str]:
    """short name -> the name in the PTX"""
    names = re.findall(r"\.entry\s+([$\w]+)", _text(source, arch))
    return dict(zip(short(names), names, strict=True))


@functools.cache
def _symbols(library: Path) -> tuple[list[int], list[str]]:
    """Offsets and short names of a library's functions, those of no linkage too."""
    out = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True)
    rows = sorted(
        (int(p[0], 16), p[2]) for p in map(str.split, out.stdout.splitlines()) if len(p) == 3
    )
    return [address for address, _ in rows], short([name for _, name in rows])


def program(source: Path, arch: str, name: str) -> Program:
    return load(_text(source, arch), _entries(source, arch)[name])


class Launches:
    """What becomes of launches while it is in place. tensors: whose addresses Python has asked for
    since the last call."""

    def __init__(self, arch: str, order: Order) -> None:
        self.arch, self.order = arch, order
        self.tensors: dict[object, torch.Tensor] = {}
        self.fresh = Fresh()
        self.raised: BaseException | None = None
        self.ran: list[str] = []

    def hook(self, library: simt_build.Library):
        """A C function for simt_elsewhere; keep it alive."""
        addresses, names = _symbols(library.path)
        handle = library._handle
        base = ctypes.cast(handle.simt_error, ctypes.c_void_p).value
        base -= addresses[names.index("simt_error")]

        def launch(kernel, dims, shared, arguments, sizes, count) -> int:
            try:
                name = names[bisect.bisect_right(addresses, kernel - base) - 1]
                given = [ctypes.string_at(arguments[k], sizes[k]) for k in range(count)]
                self.run(library.source, name, [dims[k] for k in range(9)], shared, given)
            except BaseException as error:
                self.raised = error
                return 1
            return 0

        return _LAUNCH(launch)

    def run(self, source, name, dims, shared, given) -> None:
        regions = Regions(self.fresh)
        places = []
        for t in list(self.tensors.values()):
            if t.numel():
                address = regions.tensor(f"tensor of {tuple(t.shape)}", t)
                begin, end, host, _ = regions.rows[-1]
                places.append((host, end - begin, address))
        params = [_translated(data, places) for data in given]
        self.ran.append(name)
        program(source, self.arch, name).run(
            dims[3:6], params, regions, threads=dims[6] * dims[7] * dims[8],
            cluster=tuple(dims[:3]), shared=shared, order=self.order, elements=2, strict=True,
            budget=20_000_000,
        )  # fmt: skip


def _translated(data: bytes, places: list[tuple[int, int, int]]) -> bytes:
    """The machine's addresses for those of this process, and its tensor maps for the runner's."""
    words = [int.from_bytes(data[k : k + 8], "little") for k in range(0, len(data) // 8 * 8, 8)]

    def moved(word: int) -> int:
        for host, size, address in sorted(places, key=lambda p: p[1]):
            if host <= word < host + size:
                return word - host + address
        return word

    out = b"".join(moved(word).to_bytes(8, "little") for word in words) + data[len(words) * 8 :]
    for k, word in enumerate(words):
        if word == RUNNER_MAP:
            base, *sizes = words[k + 1 : k + 5]
            strides = [2 * s for s in words[k + 5 : k + 7]]
            box = [words[k + 7] & 0xFFFFFFFF, words[k + 7] >> 32, words[k + 8] & 0xFFFFFFFF]
            swizzle = 3 * (words[k + 8] >> 32 & 1)
            made = TensorMap(moved(base), sizes, strides, box, 2, swizzle)
            refusals = made.refusals()
            assert not refusals, refusals
            out = out[: 8 * k] + made.encoded() + out[8 * k + 128 :]
    return out


@contextmanager
def installed(monkeypatch, arch: str, order: Order):
    """As simt_extension.installed; yields what was launched."""
    launches = Launches(arch, order)
    data_ptr = torch.Tensor.data_ptr

    def noted(t: torch.Tensor) -> int:
        at = data_ptr(t)
        launches.tensors[at, tuple(t.shape), t.stride()] = t
        return at

    monkeypatch.setattr(torch.Tensor, "data_ptr", noted)
    libraries = simt_extension.libraries(arch)
    hooks = [(library._handle, launches.hook(library)) for library in libraries]
    for handle, hook in hooks:
        handle.simt_elsewhere(hook)
    try:
        with simt_extension.installed(monkeypatch, arch), poison(launches.fresh.note):
            yield launches
    except Exception:
        if launches.raised is not None:
            raise launches.raised from None
        raise
    finally:
        for handle, _ in hooks:
            handle.simt_elsewhere(None)
        monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)
