"""Which modules are projections, and which of them are read without being called.

| projection | in a fused call |
|---|---|
| nn.Linear, transformers' Conv1D, with nothing around them | weight and bias are read |
| with hooks, or a forward on the instance (accelerate, DeepSpeed, pruning) | called |
| of another class (adapters, quantised, subclasses of nn.Linear) | called |
| convolutions of one element, over channels that do not lie last | called |
| whose weight is a tensor of another class (torchao), or of whole numbers | called |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.parts.around import bare
from .around import stands_around

# As torch defines it; where another library has replaced it, every nn.Linear is called.
_FORWARD = nn.Linear.forward
_OURS = _FORWARD.__code__.co_filename == nn.modules.linear.__file__
_SIZES = ("in_features", "infeatures", "nf")


def transposed(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers, whose weight is (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _plain(module: nn.Module) -> bool:
    # The class of scripted modules has no forward.
    return _OURS and getattr(type(module), "forward", None) is _FORWARD is nn.Linear.forward


def is_projection(module: nn.Module) -> bool:
    """x W' + b and nothing else: what is added to it by a subclass would be lost."""
    return _plain(module) or transposed(module)


def like_a_projection(module: nn.Module) -> bool:
    """A projection of any library: sized like one, or with quantised values, as it may not say its
    sizes."""
    if any(hasattr(module, name) for name in _SIZES) or _pointwise(module):
        return True
    values = (*module._parameters.values(), *module._buffers.values())
    whole = (torch.int8, torch.uint8, torch.int32)
    return any(v is not None and v.dtype in whole and v.dim() == 2 for v in values)


def _pointwise(module: nn.Module) -> bool:
    """A convolution of one element: a projection of channels that do not lie last."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and {*module.kernel_size} == {1}


def projections(module: nn.Module) -> Iterator[nn.Module]:
    """Those inside it, of any library."""
    for inner in module.children():
        if like_a_projection(inner):
            yield inner
        else:
            yield from projections(inner)


def read(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias, this rank's part of them; None where the module must be called."""
    # Every call of every block asks this.
    if not bare(module) or not is_projection(module):
        return None
    parameters = module.__dict__["_parameters"]
    weight = parameters.get("weight")
    if weight is None:  # a replica of DataParallel has it as an attribute
        if hasattr(type(module), "weight"):
            return None
        weight = module.weight
    if not _own_memory(weight):
        return None
    bias = parameters.get("bias", _NONE)
    bias = module.bias if bias is _NONE else bias
    kind = type(weight)
    if kind is not nn.Parameter and kind is not Tensor:
        weight, bias = local(weight), local(bias)
    return weight.t() if transposed(module) else weight, bias


_NONE = object()


def _own_memory(weight: Any) -> bool:
    """Whether a kernel that reads the memory of `weight` reads its values."""
    kind = type(weight)
    if kind is not nn.Parameter and kind is not Tensor and kind.__module__[:6] != "torch.":
        return False
    return weight.is_floating_point()


def called(module: nn.Module) -> str | None:
    """Why `module` must be called; None where its parameters are read."""
    if not is_projection(module):
        return f"is a {full_name(type(module))}"
    if around := stands_around(module):
        return around
    if module._parameters.get("weight") is None and hasattr(type(module), "weight"):
        return "computes its weight on access (parametrised)"
    if not _own_memory(weight := module.weight):
        return f"has a weight that is a {full_name(type(weight))} of {weight.dtype}"
    return None


def full_name(kind: type) -> str:
    """With its module: many libraries have a class Linear."""
    return f"{kind.__module__}.{kind.__name__}"


def width(module: nn.Module) -> int | None:
    """Columns of its result, where it says so."""
    for name in ("out_features", "outfeatures", "nf"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    return None


def local(t: Any) -> Any:
    """A DTensor's part on this rank; anything else as it is."""
    return t.to_local() if hasattr(t, "to_local") else t
