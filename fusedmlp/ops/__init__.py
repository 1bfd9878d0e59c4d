"""One file per op: shape rule, registered ops, autograd Function, public function, and its row.

Every file of this folder is loaded with it: a new one needs no other mention. Rows stand in the
order of their names, whichever file has loaded which.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..backends.op import OPS

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_rows = sorted(OPS.items())
OPS.clear()
OPS.update(_rows)
