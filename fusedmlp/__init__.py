"""fusedmlp: handwritten fused kernels for the MLP side of a transformer, each with a PyTorch
reference. The command `fusedmlp docs` prints the pages of the documentation.

The public names live in `_api` and are loaded on first use: Triton alone takes 0.3 s to import.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from .arrival import once_loaded
from .version import __version__ as __version__

if TYPE_CHECKING:
    from ._api import *  # noqa: F403
    from .typed_ops import *  # noqa: F403


def _load() -> dict[str, object]:
    from . import _api

    public = {name: getattr(_api, name) for name in _api.__all__}
    globals().update(public, __all__=_api.__all__)
    return globals()


def __getattr__(name: str) -> object:
    # Dunder and private probes (inspect, pickle, doctest) must not cost an import.
    if name != "__all__" and name.startswith("_"):
        raise AttributeError(f"module 'fusedmlp' has no attribute {name!r}")
    # A module is imported alone: it may be what `_api` is waiting for.
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    try:
        return _load()[name]
    except KeyError:
        raise AttributeError(f"module 'fusedmlp' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(_load())


def _enter_experts() -> None:
    importlib.import_module(f"{__name__}.patching.experts").register_experts()


# experts_implementation="fusedmlp" asks transformers' table alone, and may be the first that needs
# anything of this package. transformers loads the table with its first model class.
once_loaded("transformers.integrations.moe", _enter_experts)


def _enter_quantizer() -> None:
    importlib.import_module(f"{__name__}.patching.pretrained")


# from_pretrained asks transformers' table of quantisers for the one that a configuration names.
once_loaded("transformers.quantizers.auto", _enter_quantizer)
