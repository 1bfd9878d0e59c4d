"""The families in transformers' table of experts implementations, found in the source of the
installed release: a family that a later release adds is found too."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from torch import nn

DECORATOR = "use_experts_implementation"
_DECORATED = re.compile(rf"^@{DECORATOR}\b(?:\(.*?\))?\s*\nclass (\w+)", re.MULTILINE | re.DOTALL)
# Experts that are alike but outside the table; patch() takes them.
OUTSIDE = {"step3p7": ("Step3p7Experts",)}


def _folder() -> Path:
    (folder,) = find_spec("transformers").submodule_search_locations  # type: ignore[union-attr]
    return Path(folder) / "models"


def _sources() -> Iterator[tuple[str, str]]:
    for path in sorted(_folder().glob("*/modeling_*.py")):
        yield path.parent.name, path.read_text()


@functools.cache
def families() -> dict[str, tuple[str, ...]]:
    """family -> its classes of experts. A file that names the decorator and decorates no class that
    is seen here has none, which no row of the table may have."""
    found: dict[str, tuple[str, ...]] = {}
    for family, source in _sources():
        if DECORATOR in source:
            found[family] = (*found.get(family, ()), *_DECORATED.findall(source))
        elif family in OUTSIDE:
            found[family] = OUTSIDE[family]
    return found


def modeling(family: str) -> object:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def router_classes(family: str) -> list[str]:
    """Those of its modules that are called routers or gates and choose."""
    found = [c for c in vars(modeling(family)).values() if inspect.isclass(c)]
    own = [c for c in found if issubclass(c, nn.Module) and re.search(r"Router$|Gate$", c.__name__)]
    return [c.__name__ for c in own if "topk(" in inspect.getsource(c)]
