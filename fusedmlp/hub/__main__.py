"""python -m fusedmlp.hub FOLDER: write the folder of a Hub kernel; see fusedmlp.hub."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

from ..kernels.arch import ARCHES

PACKAGE = Path(__file__).absolute().parents[1]
NAME = "fusedmlp"
# By the Hub's convention 0 is what may still change.
VERSION = 0
LICENSE = "Apache-2.0"

BUILD_TOML = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["cuda"]

[torch-noarch]
"""

INIT = '''\
"""fusedmlp as a kernel of the Hub: its functions, and `layers` without state."""

from . import _api
from ._api import *  # noqa: F403
from .hub import layers
from .version import __version__

__all__ = ["layers", *(name for name in _api.__all__ if name != "layers")]
'''


def write(folder: Path) -> None:
    """The source tree for kernel-builder and the build variant for `kernels`, into `folder`, which
    must be new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"fusedmlp.hub: folder must be new or empty, got {folder}")
    source, variant = folder / "torch-ext" / NAME, folder / "build" / "torch-cuda"
    for target in (source, variant):
        # Not the bench, the pages, nor what a build left: Python files alone, links as folders.
        leave = shutil.ignore_patterns("bench", "docs", "__pycache__", "*.so", "README.md")
        shutil.copytree(PACKAGE, target, ignore=leave)
        (target / "__init__.py").write_text(INIT)
    (folder / "build.toml").write_text(BUILD_TOML)
    (variant / "metadata.json").write_text(json.dumps(metadata(variant), indent=2) + "\n")


def metadata(variant: Path) -> dict[str, object]:
    """What the Hub asks to know of a build variant; the digest is of its files."""
    files = {str(p.relative_to(variant)): p.read_bytes() for p in sorted(variant.rglob("*.py"))}
    digests = {name: hashlib.sha256(text).digest() for name, text in files.items()}
    whole = hashlib.sha256(b"".join(digests.values())).hexdigest()
    archs = sorted(arch.capability for arch in ARCHES.values())
    return {
        "id": f"_{NAME}_cuda_{whole[:7]}",
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cuda", "archs": [f"{c // 10}.{c % 10}" for c in archs]},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(d).decode() for name, d in digests.items()},
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fusedmlp.hub", description=__doc__)
    parser.add_argument("folder", type=Path)
    try:
        write(parser.parse_args().folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
