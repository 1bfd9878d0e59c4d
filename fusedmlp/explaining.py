"""explain(): which implementation runs each op here, and why."""

from __future__ import annotations

import torch
import triton
from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import running
from .backends import choice
from .backends.cuda import loader
from .backends.op import public_ops
from .kernels.device import arch_of, capability_of
from .kernels.pick import LAST
from .layers.gmlp import SpatialGatingUnit
from .patching.swap import Patched

_LAYERS = (f"{__package__}.layers.", f"{__package__}.hyperglu.")


def _device_line(device: torch.device) -> str:
    try:
        x = torch.empty(0, dtype=torch.bfloat16, device=device)
        where = choice.pick("gated_linear", x)
    except RuntimeError as error:
        return f"{device.type} tensors: none: {error}"
    if where == "reference":
        asked = choice.chosen() == "reference"
        why = "asked for" if asked else "no GPU kernel runs on CPU tensors"
        return f"{device.type} tensors: reference ({why})"
    if device.type == "cpu":
        return "cpu tensors: triton, in Triton's interpreter (TRITON_INTERPRET=1)"
    if where == "cuda":
        if choice.chosen() == "cuda":
            return f"{device.type} tensors: cuda (asked for)"
        return f"{device.type} tensors: cuda where it takes them, else triton"
    arch = arch_of(device)
    return f"{device.type} tensors: triton, tiles of {arch.name}"


def _last_launch(kernel: str) -> str:
    served = choice.SERVED.get(kernel, "triton")
    if served == "cuda":
        return f"last launch of {kernel}: cuda"
    why = served.removeprefix("triton")
    return f"last launch of {kernel}: tile {LAST.get(kernel, 'none, it was empty')}{why}"


def _path(module: nn.Module) -> str | None:
    if isinstance(module, Patched):
        return module._path()
    # A submodule, or another library's method, may have the name.
    method = getattr(type(module), "path", None)
    ours = getattr(method, "__module__", "").startswith(f"{__package__}.")
    return method(module) if callable(method) and ours else None


def _layer_lines(layer: nn.Module) -> list[str]:
    """One line for each module in `layer` that chooses between a fused call and PyTorch's."""
    return [
        f"{name or 'the layer'} ({type(module).__name__}): {path}"
        for name, module in layer.named_modules()
        if (path := _path(module))
    ]


def _width_lines(layer: nn.Module) -> list[str]:
    """One line for each width of a weight that fast loads in 16 bits do not take: rows must begin
    at multiples of 16 bytes."""
    # What PyTorch multiplies, whatever its strides.
    modules = (m for m in layer.modules() if isinstance(m, (SpatialGatingUnit, _ConvNd)))
    others = {id(t) for m in modules for t in m.parameters()}
    widths: dict[int, list[str]] = {}
    for outer, module in layer.named_modules():
        if not isinstance(module, Patched) and not type(module).__module__.startswith(_LAYERS):
            continue
        for name, t in module.named_parameters(prefix=outer):
            matrix = name.endswith(("weight", "original")) and t.dim() in (2, 3)
            if matrix and id(t) not in others:
                widths.setdefault(t.shape[-1], []).append(name)
    return [
        f"width {width} of {names[0]}"
        + (f" and {more} more" if (more := len(dict.fromkeys(names)) - 1) else "")
        + " is no multiple of 8: in 16 bits kernels take element loads and small tiles; "
        f"{-(-width // 8) * 8} would have vector or TMA loads"
        for width, names in widths.items()
        if width % 8
    ]


def explain(layer: nn.Module | None = None) -> str:
    """A text of what runs where: which copy of this package, versions, the chosen backend, what the
    CUDA extension holds or why it is not there, each device's backend, what each kernel was last
    launched with, which calls in `layer` are fused, and which of its widths no fast load takes.

    Raises TypeError unless `layer` is an nn.Module or None.

    Examples:
        >>> import fusedmlp
        >>> from fusedmlp.layers import FeedForward
        >>> "SiLU fused as 'silu'" in fusedmlp.explain(FeedForward(64, glu_variant="swiglu"))
        True
    """
    if layer is not None and not isinstance(layer, nn.Module):
        raise TypeError(f"explain: layer must be an nn.Module or None, got {layer!r}")
    lines = [
        *running.describe(),
        f"torch {torch.__version__}, triton {triton.__version__}, "
        f"backend {choice.chosen()!r} (backend(), FUSEDMLP_BACKEND)",
    ]
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    lines += loader.describe(capability_of(gpu) if gpu else 0)
    lines.append(_device_line(torch.device("cpu")))
    lines.append(_device_line(gpu) if gpu else "cuda tensors: none, torch finds no GPU")
    lines.append("second derivatives, torch.func, forward-mode AD: reference")
    lines.append(f"ops: {', '.join(public_ops())}")
    lines += [_last_launch(kernel) for kernel in sorted(LAST.keys() | choice.SERVED.keys())]
    if layer is not None:
        lines += _layer_lines(layer)
        lines += _width_lines(layer)
    return "\n".join(lines)
