"""python -m fusedmlp.hub FOLDER: write the folder of a Hub kernel; see fusedmlp.hub."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from .. import _api
from ..kernels.arch import ARCHES
from ..version import __version__
from . import layers, texts

PACKAGE = Path(__file__).absolute().parents[1]
NAME = "fusedmlp"
REPO_ID = f"{NAME}/{NAME}"
# By the Hub's convention 0 is what may still change.
VERSION = 0
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda")

INIT = '''\
"""fusedmlp as a kernel of the Hub: its functions, and `layers` without state."""

from . import _api
from ._api import *  # noqa: F403
from .hub import layers
from .version import __version__

__all__ = ["layers", *(name for name in _api.__all__ if name != "layers")]
'''


def write(folder: Path, repo_id: str = REPO_ID) -> None:
    """The project for kernel-builder and the build variants for `kernels`, into `folder`, which
    must be new or empty. `repo_id` is where it will be uploaded."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"fusedmlp.hub: folder must be new or empty, got {folder}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"fusedmlp.hub: repo_id must be OWNER/NAME, got {repo_id!r}")
    variants = {backend: folder / "build" / f"torch-{backend}" for backend in BACKENDS}
    for target in (folder / "torch-ext" / NAME, *variants.values()):
        # Not the bench, the pages, nor what a build left: Python files alone, links as folders.
        leave = shutil.ignore_patterns("bench", "docs", "__pycache__", "*.so", "*.md", "py.typed")
        shutil.copytree(PACKAGE, target, ignore=leave)
        (target / "__init__.py").write_text(INIT)
    for backend, variant in variants.items():
        told = json.dumps(metadata(variant, backend), indent=2)
        (variant / "metadata.json").write_text(told + "\n")
    for name, text in files(repo_id).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def capabilities() -> list[str]:
    """Those of the GPU generations that there are kernels for."""
    return [f"{c // 10}.{c % 10}" for c in sorted(arch.capability for arch in ARCHES.values())]


def files(repo_id: str) -> dict[str, str]:
    """What stands beside the package, by its path in the folder."""
    own = {"name": NAME, "version": VERSION, "license": LICENSE, "repo_id": repo_id}
    card = texts.CARD.substitute(
        own,
        license_tag=LICENSE.lower(),
        package_version=__version__,
        layers="\n".join(f"* `{name}`" for name, _ in stateless()),
        functions=", ".join(f"`{name}`" for name in _api.__all__ if name != "layers"),
    )
    archs = ", ".join(f'"{capability}"' for capability in capabilities())
    return {
        "build.toml": texts.BUILD_TOML.substitute(own, capabilities=archs),
        "flake.nix": texts.FLAKE,
        "CARD.md": card,
        "build/CARD.md": card,  # from where an upload takes it
        "tests/__init__.py": "",
        f"tests/test_{NAME}.py": texts.TESTS.substitute(own),
    }


def stateless() -> list[tuple[str, Any]]:
    """The layers, under all their names."""
    return [(name, of) for name, of in vars(layers).items() if hasattr(of, "can_torch_compile")]


def metadata(variant: Path, backend: str = "cuda") -> dict[str, object]:
    """What the Hub asks to know of a build variant; the digest is of its files."""
    code = {str(p.relative_to(variant)): p.read_bytes() for p in sorted(variant.rglob("*.py"))}
    digests = {name: hashlib.sha256(text).digest() for name, text in code.items()}
    whole = hashlib.sha256(b"".join(digests.values())).hexdigest()
    return {
        "id": f"_{NAME}_{backend}_{whole[:7]}",
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": capabilities()} if backend == "cuda" else {}),
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(d).decode() for name, d in digests.items()},
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fusedmlp.hub", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo-id", default=REPO_ID, help=f"OWNER/NAME on the Hub; {REPO_ID}")
    args = parser.parse_args()
    try:
        write(args.folder, args.repo_id)
    except (ValueError, OSError) as error:
        parser.error(str(error))
