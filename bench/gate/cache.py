"""A folder of compiled kernels that is carried to another machine, and the extension beside it: a
stamp says of which sources they are, and whoever takes them refuses stale ones.

Triton's groups of files hold absolute paths, so a folder that was moved is mended when it is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ...kernels.arch import ARCHES
from ...kernels.arch.assembler import assembler
from ..machine import ROOT
from ..options import Refusal

STAMP = "stamp.json"
ARCHIVE = ".tar.xz"
# What Triton reads of a kernel that it finds; the rest of what it writes is for people.
KEPT = (".cubin", ".json")
EXTENSION_STAMP = ROOT / "fusedmlp" / "_C.stamp"


def hash_of(paths: Iterable[Path]) -> str:
    """The hash of files of this project: names and content."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def kernel_sources() -> str:
    """The hash of all code that decides what is compiled and launched."""
    folders = ("fusedmlp", "kernels")
    return hash_of(p for folder in folders for p in (ROOT / folder).rglob("*.py") if p.is_file())


def extension_sources() -> str:
    """The hash of all that the extension is built of."""
    kinds = (".cu", ".cuh", ".h", ".cpp")
    found = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds)
    return hash_of([*found, ROOT / "CMakeLists.txt"])


def kernel_stamp() -> dict[str, str]:
    """These sources, this Triton, of which another Python has other files, and the assemblers, by
    which tiles are chosen."""
    return {
        "sources": kernel_sources(),
        "triton": metadata.version("triton"),
        "ptxas": ", ".join(sorted({assembler(arch.capability) for arch in ARCHES.values()})),
        "python": str(sys.implementation.cache_tag),
    }


def extension_stamp() -> dict[str, str]:
    return {"sources": extension_sources(), "python": str(sysconfig.get_config_var("EXT_SUFFIX"))}


def differences(stamp: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """What of a stamp is not as it is now; nothing where all is."""
    return ", ".join(
        f"{name} {stamp.get(name)} there, {value} here"
        for name, value in now.items()
        if stamp.get(name) != value
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def begin(folder: Path) -> None:
    """Make or take up a folder to fill. Refusal where it holds something else: what is not a kernel
    would be deleted from it."""
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"{folder} is a file: give `gate fill-cache` a folder (nothing was changed)")
    if folder.is_dir() and any(folder.iterdir()) and not _read(folder / STAMP):
        raise Refusal(
            f"{folder} is no folder that `gate fill-cache` has filled: give it a new one (nothing "
            "was changed)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_stamp(folder)


def prune(folder: Path) -> int:
    """Delete what Triton does not read of its own kernels; returns the bytes that are left."""
    left = 0
    for path in folder.glob("*/*"):
        if path.is_file() and path.suffix in KEPT:
            left += path.stat().st_size
        elif path.is_file():
            path.unlink()
    # A group that names a file which is not there counts as none to newer releases.
    for path, children in _groups(folder):
        _write_group(path, {n: c for n, c in children.items() if Path(n).suffix in KEPT})
    return left


def _groups(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Each of Triton's groups of files: its own file, and name -> path of what is in it."""
    for path in folder.glob("*/__grp__*.json"):
        yield path, _read(path).get("child_paths", {})


def _write_group(path: Path, children: Mapping[str, str]) -> None:
    path.write_text(json.dumps({"child_paths": dict(children)}), encoding="utf-8")


def write_stamp(folder: Path) -> None:
    stamp = {**kernel_stamp(), "path": str(folder.resolve())}
    (folder / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def archive_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ARCHIVE)


def pack(folder: Path) -> int:
    """Write the folder into one archive beside it, an eighth of its size; returns its bytes."""
    archive = archive_of(folder.resolve())
    begun = archive.with_suffix(".begun")
    with tarfile.open(begun, "w:xz", preset=6) as tar:
        tar.add(folder, folder.resolve().name)
    os.replace(begun, archive)
    return archive.stat().st_size


def _unpacked(archive: Path) -> Path:
    """The folder that an archive holds, beside it; one that is there already is left as it is."""
    folder = archive.with_name(archive.name.removesuffix(ARCHIVE))
    if not folder.exists():
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(archive.parent, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise Refusal(f"the cache {archive} cannot be unpacked: {error}") from error
    return folder


def take(folder: Path) -> Path:
    """The folder, or the one that an archive holds, as it is to stand in TRITON_CACHE_DIR; Refusal
    where it is stale."""
    folder = folder.resolve()
    if folder.name.endswith(ARCHIVE):
        folder = _unpacked(folder)
    stamp = _read(folder / STAMP)
    remedy = (
        f"delete it, if an archive of it is newer, or fill it again: python -m fusedmlp.bench gate "
        f"fill-cache {folder}"
    )
    if not stamp:
        raise Refusal(
            f"{folder} holds no {STAMP}, so nobody knows of which sources it is: {remedy}"
        )
    if wrong := differences(stamp, kernel_stamp()):
        raise Refusal(f"the cache {folder} is stale ({wrong}): {remedy}")
    if stamp.get("path") != str(folder):
        _move(folder, str(stamp.get("path")))
    return folder


def _move(folder: Path, old: str) -> None:
    """Let the groups of a folder that was moved name its files where they lie now."""
    for path, children in _groups(folder):
        moved = {n: str(folder / os.path.relpath(child, old)) for n, child in children.items()}
        _write_group(path, moved)
    write_stamp(folder)


def stamp_extension() -> None:
    EXTENSION_STAMP.write_text(json.dumps(extension_stamp()) + "\n", encoding="utf-8")


def extension_is_carried() -> bool:
    """Is there an extension with a stamp, of these very sources? Refusal where it is stale; False
    where there is none, or one that was built here without a stamp."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    built = EXTENSION_STAMP.with_name(f"_C{suffix}")
    stamp = _read(EXTENSION_STAMP)
    if not stamp or not built.exists():
        return False
    if wrong := differences(stamp, extension_stamp()):
        raise Refusal(
            f"the extension {built} is stale ({wrong}): build it again with `gate fill-cache DIR "
            f"--extension`, or delete {EXTENSION_STAMP}, and it is built on the GPU's machine"
        )
    return True
