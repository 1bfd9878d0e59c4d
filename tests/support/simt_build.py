"""Builds a .cu for the host SIMT runner (tests/simt) and calls it with guarded buffers.

    kernels = load("csrc/gemv.cu")
    w, x, y = guarded(w), guarded(x), empty(rows, dtype=torch.float32)
    kernels.run_gemv(w, x, y, rows, columns, seed=1)   # extern "C" int run_gemv(const void* w, ...)
    y.tensor

A library has what the source exports as extern "C". Guarded tensors go in as pointers, Python's int
as int64 (whose lower half an int parameter takes), float as float, a tuple of floats as a pointer
to them; the result is a cudaError_t.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from fusedmlp.reference.activations import resolve

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "tests" / "simt"
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fno-strict-aliasing"),
    # Two libraries with a template in common must not share its `__shared__` variables.
    *("-Wl,-Bsymbolic", "-fno-semantic-interposition", "-fno-gnu-unique"),
    "-U_FORTIFY_SOURCE",  # it takes a jump out of a signal handler for an attack
    *("-fsanitize=bounds-strict", "-fsanitize-undefined-trap-on-error"),
)


def _rows(table: str) -> list[tuple[str, str]]:
    """The rows of a table of csrc/activations.cuh, such as FUSEDMLP_GATES."""
    text = (ROOT / "csrc" / "activations.cuh").read_text()
    body = re.search(rf"#define {table}\(ROW\)((?:.*\\\n)*.*)", text)[1]
    return re.findall(r"ROW\((\w+), +(\w+)\)", body)


# What has a functor: the plain ones, and those that need a u; NUMBERS in a params struct.
PLAIN = [name for name, _ in _rows("FUSEDMLP_ACTIVATIONS")]
_OWN = [*PLAIN, *(name for name, _ in _rows("FUSEDMLP_GATES"))]
NUMBERS = {name: i for i, name in enumerate(_OWN)}
NUMBERS |= {name: NUMBERS[same] for name, same in _rows("FUSEDMLP_SAME")}
GATES = [name for name in NUMBERS if name not in PLAIN]
FUNCTORS = list(NUMBERS)


def chosen(activation: str) -> tuple[int, tuple[float, ...]]:
    """An argument `activation` as a kernel takes it: its number and three scalars."""
    row, scalars = resolve(activation)
    return NUMBERS[row.name], (*scalars, 0.0, 0.0, 0.0)[:3]


SEEDS = (0, 1, 2, 3, 4)  # late, early, warp by warp, two at random: see tests/simt/scheduler.h
UNWRITTEN = 0xFF  # a NaN in every floating-point format; the runner fills shared memory with it
PAGE = mmap.PAGESIZE


class SimtError(RuntimeError):
    """What the runner found wrong with a kernel."""


def cuda_headers() -> list[Path]:
    """The folders to include: the CUDA toolkit's, else what Triton bundles of it."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent]
    for folder in [Path(home) / "include" for home in homes if home]:
        if (folder / "cuda_bf16.h").exists():
            return [folder]
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not (folder / "cuda_bf16.h").exists():
        raise SimtError(
            f"no cuda_bf16.h: set CUDA_HOME, put nvcc on PATH or install a Triton that has {folder}"
        )
    return [folder, RUNNER / "include"]


def compile_command() -> list[str]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise SimtError("no g++: install it, or name a compiler with CXX")
    includes = [f"-isystem{folder}" for folder in cuda_headers()]
    return [compiler, *FLAGS, *includes, f"-I{ROOT / 'csrc'}", f"-I{RUNNER}"]


def cache_folder() -> Path:
    default = Path.home() / ".cache" / "fusedmlp-simt"
    folder = Path(os.environ.get("FUSEDMLP_SIMT_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def contents(dependencies: Path) -> str:
    """The hash of every file that a build read, as make's rule in `dependencies` lists them."""
    files = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return digest(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files)


def build(source: Path, defines: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Path:
    """The shared library of a source, built once for what its files hold."""
    command = [*compile_command(), *flags, *(f"-D{define}" for define in defines)]
    stem = f"{source.stem}-{digest([source, *command])}"
    folder = cache_folder()
    rule = folder / f"{stem}.d"
    with open(folder / f"{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of one test run build it once
        with contextlib.suppress(FileNotFoundError):
            library = folder / f"{stem}-{contents(rule)}.so"
            if library.exists():
                return library
        built = folder / f"{stem}.so"
        command += ["-MD", "-MF", str(rule), "-o", str(built), str(source), "-lrt"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SimtError(f"{source} does not compile for the host:\n{result.stderr}")
        for outdated in folder.glob(f"{stem}-*.so"):
            outdated.unlink()
        library = folder / f"{stem}-{contents(rule)}.so"
        built.rename(library)
        return library


class Guarded:
    """A tensor in memory of its own, whose end meets a page that faults.

    It keeps the strides of the tensor it copies. Elements that the strides leave out, and up to 15
    bytes of alignment at the end, hold a NaN and must still hold it after a call; an input's pages
    are read-only for a kernel.
    """

    def __init__(self, like: torch.Tensor, *, written: bool):
        length = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
        size = like.element_size()
        self.bytes = length * size if like.numel() else 0
        inside = -(-max(self.bytes, 1) // PAGE) * PAGE
        self._memory = mmap.mmap(-1, inside + 2 * PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + PAGE
        # PyTorch's own allocations begin at multiples of 16 bytes and more.
        start = PAGE + inside - -(-self.bytes // 16) * 16
        self.address = self._first - PAGE + start
        self._inside = torch.frombuffer(self._memory, dtype=torch.uint8, offset=PAGE, count=inside)
        self._inside.fill_(UNWRITTEN)
        self._owned = torch.zeros_like(self._inside, dtype=torch.bool)
        if self.bytes:
            flat = torch.frombuffer(self._memory, dtype=like.dtype, offset=start, count=length)
            self.tensor = flat.as_strided(like.shape, like.stride())
            owned = torch.zeros(length, dtype=torch.bool)
            owned.as_strided(like.shape, like.stride()).fill_(True)
            first = start - PAGE
            self._owned[first : first + self.bytes] = owned.repeat_interleave(size)
        else:
            self.tensor = torch.empty_like(like)
        self.written = written
        self._protect(0, PAGE, 0)
        self._protect(PAGE + inside, PAGE, 0)
        if self.bytes and not written:
            self.tensor.copy_(like)
            self._protect(PAGE, inside, mmap.PROT_READ)

    def _protect(self, offset: int, count: int, access: int) -> None:
        address = ctypes.c_void_p(self._first - PAGE + offset)
        if ctypes.CDLL(None, use_errno=True).mprotect(address, ctypes.c_size_t(count), access):
            raise OSError(ctypes.get_errno(), "mprotect")

    def overwritten(self) -> bool:
        return bool((self._inside[~self._owned] != UNWRITTEN).any())

    def locate(self, address: int) -> str | None:
        """Where an address is, seen from this buffer; None if far off."""
        if self.address <= address < self.address + self.bytes:
            return "inside, but it is an input"
        if self.address + self.bytes <= address < self._first + self._inside.numel() + PAGE:
            return f"{address - self.address - self.bytes} bytes past the end"
        if self._first - PAGE <= address < self.address:
            return f"{self.address - address} bytes before the start"
        return None


def guarded(tensor: torch.Tensor) -> Guarded:
    """An input with the values and strides of `tensor`."""
    return Guarded(tensor, written=False)


def output(like: torch.Tensor) -> Guarded:
    """An output of `like`'s shape, strides and dtype, filled with NaN."""
    return Guarded(like, written=True)


def empty(*shape: int, dtype: torch.dtype) -> Guarded:
    return output(torch.empty(shape, dtype=dtype))


def in_out(tensor: torch.Tensor) -> Guarded:
    """A buffer that a kernel reads and writes."""
    buffer = output(tensor)
    buffer.tensor.copy_(tensor)
    return buffer


@dataclass(frozen=True)
class Library:
    source: Path
    path: Path

    @functools.cached_property
    def _handle(self) -> ctypes.CDLL:
        handle = ctypes.CDLL(str(self.path))
        handle.simt_begin.argtypes = [ctypes.c_uint64, ctypes.c_double]
        handle.simt_error.restype = ctypes.c_char_p
        return handle

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self.call, name)

    def call(self, name: str, *arguments, seed: int = 0, seconds: float = 300.0) -> None:
        """Runs an exported function; raises what the runner or the guards found."""
        function = getattr(self._handle, name)
        function.restype = ctypes.c_int
        buffers = [(i, a) for i, a in enumerate(arguments) if isinstance(a, Guarded)]
        with self.running(name, buffers, seed, seconds):
            status = function(*map(_as_c, arguments))
        if status:
            raise SimtError(f"{name}, seed {seed}: returned error {status}")
        for index, buffer in buffers:
            if buffer.overwritten():
                raise SimtError(f"{name}, seed {seed}: wrote beside argument {index}'s elements")

    @contextlib.contextmanager
    def running(self, name: str, buffers=(), seed: int = 0, seconds: float = 300.0):
        """Around launches of this library's kernels; raises what the runner found."""
        self._handle.simt_begin(seed, seconds)
        failure = None
        try:
            yield
        except RuntimeError as error:  # the kernel's own host code, which knows less
            failure = error
        if error := self._handle.simt_error().decode(errors="replace"):
            raise SimtError(f"{name}, seed {seed}: {self._explain(error, buffers)}") from failure
        if failure is not None:
            raise failure

    def _explain(self, error: str, buffers: list[tuple[int, Guarded]]) -> str:
        if match := re.search(r"address (0x[0-9a-f]+)", error):
            for index, buffer in buffers:
                if place := buffer.locate(int(match[1], 16)):
                    error = error.replace(match[0], f"argument {index}, {place}")
        if match := re.search(r" \[instruction (0x[0-9a-f]+)\]", error):
            error = error.replace(match[0], self._lines(match[1]))
        return error

    def _lines(self, offset: str) -> str:
        if not shutil.which("addr2line"):
            return f" [instruction {offset} of {self.path}]"
        command = ["addr2line", "-i", "-s", "-e", str(self.path), offset]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        return ", at " + " in ".join(line.split(" ")[0] for line in lines if line)


def _as_c(argument):
    if isinstance(argument, Guarded):
        return ctypes.c_void_p(argument.address)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, tuple):
        return (ctypes.c_float * len(argument))(*argument)
    return argument


@functools.cache
def load(source: str, *defines: str, flags: tuple[str, ...] = ()) -> Library:
    """The library of a source, its path given from the repository's root."""
    path = ROOT / source
    return Library(path, build(path, defines, flags))


def faulty(source: str, right: str, wrong: str, folder: Path) -> Library:
    """The library of a source with a fault in it: `wrong` stands where `right` stood."""
    text = (ROOT / source).read_text()
    if (count := text.count(right)) != 1:
        raise SimtError(f"{source}: must hold the text to be replaced once, holds it {count} times")
    path = folder / Path(source).name
    path.write_text(text.replace(right, wrong))
    return Library(path, build(path))
