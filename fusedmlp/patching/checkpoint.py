"""A checkpoint's model without its weights, as from_pretrained would build it, on the meta device.

Dtypes and quantisation are by transformers' own rules: its quantiser converts the model where the
package that it needs is installed. Where it is not, a stand-in takes the place of each projection
that the quantiser would convert.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .projection import transposed

# Lists of what stays as it is, by the names that quantisers have for them.
_SKIPS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "exclude")
# Those that convert a Conv1D.
_TRANSPOSED = ("bitsandbytes", "gptq")


class _Quantised(nn.Module):
    """Stands where a quantiser will put a projection of its own."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.in_features = getattr(linear, "in_features", None) or getattr(linear, "nx", None)
        self.out_features = getattr(linear, "out_features", None) or getattr(linear, "nf", None)


def empty_model(folder: Path) -> nn.Module:
    """The model that a folder's config.json describes, as patch() would find it loaded on a device
    whose kernels take the quantised weights."""
    import transformers
    from transformers.quantizers.auto import AutoHfQuantizer

    from .pretrained import NAME

    # Never code that lies beside the configuration.
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings = _quantization(config)
    known = settings and AutoHfQuantizer.supports_quant_method(settings)
    if not known or settings.get("dequantize"):
        return _built(config)
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
        return _converted(config, quantizer)
    except ImportError:  # the quantiser's package is not here
        if settings.get("quant_method") == NAME:
            raise
        return _stood_in(_built(config), settings)


def _built(config: Any, dtype: Any = None) -> Any:
    """In the dtypes of loading: a parameter that its module makes in another keeps that one."""
    import transformers

    config = copy.deepcopy(config)  # a model built of it writes into it
    config.dtype = dtype or config.dtype
    # Its own may name a kernel, which would be fetched. Attention does not run here.
    config._attn_implementation = "eager"
    names = getattr(config, "architectures", None) or []
    cls: Any = next((c for n in names if (c := getattr(transformers, n, None))), None)
    # Below get_kernel, which modules of models import by name: they keep what they find.
    with _in_place_of("get_kernel_hub", _unfetched), torch.device("meta"):
        if cls is not None:
            model = cls._from_config(config)
        else:
            model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    plan = model._get_dtype_plan(config.dtype or torch.get_default_dtype())
    for pattern, kept in plan.items():
        for name, p in model.named_parameters():
            if re.search(pattern.replace("*", ".*"), name):
                p.data = p.data.to(kept)
    return model


def _quantization(config: Any) -> dict[str, Any]:
    """What the configuration holds, or its text model's, where transformers looks next."""
    found = getattr(config, "quantization_config", None)
    if not found and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if found and not isinstance(found, dict):
        found = found.to_dict()
    return found or {}


def _converted(config: Any, quantizer: Any) -> Any:
    """By transformers' own quantiser."""
    from transformers.utils.import_utils import get_current_accelerator

    here = get_current_accelerator()
    lacks: ImportError | None = None
    # It asks for a GPU, which a report needs not, and says what it would do without.
    try:
        with _quiet(), _in_place_of("get_kernel_hub", _unfetched):
            quantizer.validate_environment(device_map=here and {"": here}, weights_only=True)
    except ImportError as error:
        lacks = error  # what transformers itself has modules for is converted without the package
    except RuntimeError:
        pass  # no GPU
    if hasattr(quantizer.quantization_config, "dequantize"):
        quantizer.quantization_config.dequantize = False  # True where it found no GPU
    model = _built(config, quantizer.update_dtype(config.dtype))
    try:
        _convert(quantizer, model)
    except (AttributeError, NameError):  # names of the package, perhaps
        if lacks is None:
            raise
        raise lacks from None
    return model


def _convert(quantizer: Any, model: Any) -> None:
    from transformers.utils.import_utils import get_current_accelerator

    # No kernel runs, so None is one. Asked for on a CPU, they keep mxfp4 as it is.
    with _in_place_of("get_kernel", lambda *_, **__: None), torch.device("meta"):
        quantizer.preprocess_model(
            model=model, dtype=model.dtype, device_map=None, checkpoint_files=None,
            use_kernels=get_current_accelerator() is None,
        )  # fmt: skip
        for name, module in list(model.named_modules()):
            # torchao's and the like are tensors of another class in the same module.
            path = f"{name}.weight"
            if type(module) is nn.Linear and quantizer.param_needs_quantization(model, path):
                weight = {path: [module.weight]}
                quantizer.get_quantize_ops().convert(
                    weight, model=model, full_layer_name=path, missing_keys=set()
                )


def _unfetched(name: str, **_: Any) -> None:
    # transformers goes on without a kernel that it cannot find, where it has code of its own.
    raise FileNotFoundError(f"no kernel is fetched for a report, and {name} is one")


@contextlib.contextmanager
def _in_place_of(name: str, function: Callable[..., None]) -> Iterator[None]:
    """Has `function` where transformers has the one that fetches kernels: another thread that loads
    a model meanwhile meets it too."""
    from transformers.integrations import hub_kernels

    own = getattr(hub_kernels, name, None)
    if own is None:  # the package that fetches is not here
        yield
        return
    setattr(hub_kernels, name, function)
    try:
        yield
    finally:
        setattr(hub_kernels, name, own)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _stood_in(model: Any, settings: dict[str, Any]) -> Any:
    method = settings.get("quant_method", "quantization_config")
    method = str(getattr(method, "value", method))
    skipped = [name for key in _SKIPS for name in settings.get(key) or ()]
    stays = _rule(model, skipped or None)
    only = [n for block in settings.get("modules_in_block_to_quantize") or () for n in block]
    kind = type("Linear", (_Quantised,), {"__module__": method})
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear and not (transposed(module) and method in _TRANSPOSED):
            continue
        if stays(name) or (only and not any(name.endswith(n) for n in only)):
            continue
        model.set_submodule(name, kind(module))
    return model


def _rule(model: Any, skipped: list[str] | None) -> Any:
    """name -> whether the module stays as it is."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    plain = None if skipped is None else [n for n in skipped if not n.startswith("re:")]
    regular = [re.compile(n[3:]) for n in skipped or () if n.startswith("re:")]
    kept = getattr(model, "_keep_in_fp32_modules", None)
    patterns = HfQuantizer.get_modules_to_not_convert(model, plain, kept)

    def stays(name: str) -> bool:
        if any(pattern.match(name) for pattern in regular):
            return True
        return not should_convert_module(name, patterns)

    return stays
