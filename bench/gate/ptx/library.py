"""The machine itself: machine/*.h and machine.cpp, built once for their content and this CPU."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["MachineError", "machine", "operands_of"]

_SOURCES = Path(__file__).parent / "machine"
_FLAGS = ("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")


class MachineError(RuntimeError):
    """The machine cannot be built here."""


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("flags")), platform.machine())


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "fusedmlp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fusedmlp"))
    return folder


def _build(compiler: str, library: Path) -> None:
    part = library.with_suffix(".part")
    done = subprocess.run(
        [compiler, *_FLAGS, "-o", str(part), str(_SOURCES / "machine.cpp")],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise MachineError(f"{compiler} cannot build the PTX machine:\n{done.stderr[-2000:]}")
    part.replace(library)  # whole or not there, wherever the build was stopped


@functools.cache
def machine() -> ctypes.CDLL:
    """The library, which takes half a minute to build the first time. Raises MachineError without
    a compiler of C++20."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise MachineError(f"no {compiler} to build the PTX machine with: install g++ 11 or newer")
    sources = sorted(_SOURCES.iterdir())
    content = b"".join(s.read_bytes() for s in sources)
    key = hashlib.sha256(content + repr((compiler, _FLAGS, _cpu())).encode()).hexdigest()[:16]
    library = _folder() / f"ptx_{key}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others wait
        if not library.exists():
            _build(compiler, library)
    loaded = ctypes.CDLL(str(library))
    loaded.ptx_load.restype = ctypes.c_void_p
    loaded.ptx_free.argtypes = [ctypes.c_void_p]
    loaded.ptx_operands.restype = loaded.ptx_names.restype = ctypes.c_char_p
    return loaded


@functools.cache
def operands_of(name: str) -> str | None:
    """The widths of an instruction's operands, "2", "4", "8" or "p" with commas; "" where its form
    is its own; None where the machine has no such instruction."""
    found = machine().ptx_operands(name.encode())
    return None if found is None else found.decode()
