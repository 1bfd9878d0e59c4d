"""Which copy of the package runs: a checkout's files, or an installed copy's."""

from __future__ import annotations

import sys
from pathlib import Path

from .version import __version__

# Not resolved further: an installed copy may itself be a link, and it is what was asked for.
FOLDER = Path(__file__).absolute().parent
EXTENSION = "_C.*.so"


def is_checkout() -> bool:
    """Do these files lie in the project's own tree? pyproject.toml is never installed."""
    return (FOLDER.parent / "pyproject.toml").is_file()


def with_extension() -> Path | None:
    """Another copy on sys.path that has the CUDA extension, where this one has none."""
    if any(FOLDER.glob(EXTENSION)):
        return None
    folders = [Path(entry or ".").absolute() / FOLDER.name for entry in sys.path]
    return next((f for f in folders if f != FOLDER and any(f.glob(EXTENSION))), None)


def describe() -> list[str]:
    """The version and the files that run; and whether `python -m` has passed over a better copy."""
    kind = "checkout" if is_checkout() else "installed"
    lines = [f"fusedmlp {__version__}, {kind}: {FOLDER}"]
    if is_checkout() and (other := with_extension()):
        lines.append(
            f"{other} has the CUDA extension, which this checkout lacks: the command fusedmlp "
            "runs that copy, python -m fusedmlp in the checkout's folder this one"
        )
    return lines
