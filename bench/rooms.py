"""Which rooms of the bench are here.

A wheel leaves out what an installed user cannot run: the campaign, the report on its ledgers, the
training experiments, the gate of csrc/ and the PTX machine work on a checkout's files. So no room
that ships imports one that may be missing: it asks here, by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from .options import Refusal


def has(module: str) -> bool:
    """Is `module`, named from this package on, installed?"""
    try:
        return importlib.util.find_spec(f"{__package__}.{module}") is not None
    except ModuleNotFoundError:  # nor is the package around it
        return False


def load(module: str, command: str) -> ModuleType:
    """The module; Refusal in the name of `command` where it is not here."""
    if not has(module):
        raise Refusal(missing(command))
    return importlib.import_module(f".{module}", __package__)


def missing(command: str) -> str:
    return (
        f"{command} needs a checkout of fusedmlp's repository, which an installed wheel is not: "
        "clone it and run pip install -e . there"
    )
