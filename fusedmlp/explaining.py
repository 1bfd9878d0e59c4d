"""explain(): which implementation runs each op here, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor, nn

from . import running
from .backends import choice
from .backends.cuda import loader
from .backends.cutlass import loader as cutlass
from .backends.op import public_ops
from .dry.driver import ONE
from .dry.lines import (
    GPUS,
    TOKENS,
    Gpu,
    gpu_here,
    gpu_lines,
    named_gpu,
    obstacle_lines,
    op_lines,
    op_of,
    where_lines,
)
from .invariance import invariant
from .kernels.device import arch_of, capability_of
from .kernels.pick import LAST, ROWS
from .kernels.plans import plans_are_off
from .layers.parts.block import positive_int
from .layers.parts.widths import Reader, off_fast_loads
from .patching.swap import Patched


def _device_line(device: torch.device) -> str:
    try:
        x = torch.empty(0, dtype=torch.bfloat16, device=device)
        where = choice.pick("gated_linear", x)
    except (RuntimeError, loader.Unfit) as error:
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
    if where == "cutlass":
        return f"{device.type} tensors: cutlass (asked for)"
    arch = arch_of(device)
    return f"{device.type} tensors: triton, tiles of {arch.name}"


def _last_launch(kernel: str) -> str:
    served = choice.SERVED.get(kernel, "triton")
    if served in ("cuda", "cutlass"):
        return f"last launch of {kernel}: {served}"
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
    """One line for each width or stride of a weight in `layer` that no fast load takes."""
    sizes: list[tuple[str, Tensor | int]] = []
    outside: tuple[str, ...] = ()  # what holds others has named their matrices
    for outer, module in layer.named_modules():
        if isinstance(module, (Reader, Patched)) and not outer.startswith(outside):
            sizes += ((f"{outer}.{name}".lstrip("."), size) for name, size in module._reads())
            if isinstance(module, Reader):
                outside = (*outside, f"{outer}." if outer else "")
    return off_fast_loads(sizes)


def _gpu(gpu: str | None, tokens: int | None) -> Gpu | None:
    """The GPU to plan for, if any is asked for."""
    if tokens is not None:
        positive_int("explain", "tokens", tokens)
    if gpu is not None or tokens is None:
        return None if gpu is None else named_gpu("explain", gpu)
    here = gpu_here()
    if here is None:
        raise ValueError(
            f"explain: gpu must be one of {', '.join(GPUS)} with tokens={tokens} where torch finds "
            "no GPU, got None"
        )
    return here


def _layer(layer: nn.Module | Callable[..., Any], gpu: Gpu | None, tokens: int) -> list[str]:
    if not isinstance(layer, nn.Module):
        op = op_of(layer)
        assert op is not None, "explain() has looked"
        return op_lines(op, gpu)
    lines = [*_layer_lines(layer), *where_lines(layer, gpu), *obstacle_lines(layer)]
    return [*lines, *_width_lines(layer), *(gpu_lines(layer, gpu, tokens) if gpu else ())]


def explain(
    layer: nn.Module | Callable[..., Any] | None = None,
    *,
    gpu: str | None = None,
    tokens: int | None = None,
) -> str:
    """A text of what runs where: this copy of the package, versions, the chosen backend, what the
    extensions hold or why they are not there, the backend of each device, and each kernel's last
    launch.

    Of `layer`: which of its calls are fused, where they run, what stands in the way (dropout at
    work, a hook, a dtype) and which widths or strides no fast load takes. With `gpu`: what each
    fused block would launch there, kernels and tiles, forward and, in train(), backward; its FLOPs,
    the least bytes that it moves and the least time that a datasheet allows. Those are planned and
    computed: nothing is run, and memory is not touched.

    Args:
        layer: a layer, a model, patched or not, or a function of this package.
        gpu: "H100", "H200" or "B200"; None: the GPU here, if `tokens` are given.
        tokens: rows of x; None: 8192 where `gpu` is given.

    Raises TypeError for another layer, and for tokens that are no int; ValueError for a gpu that is
    not known, or none where there is none here.

    Examples:
        >>> import fusedmlp
        >>> from fusedmlp.layers import FeedForward
        >>> layer = FeedForward(1024, hidden=2752, glu_variant="swiglu").bfloat16()
        >>> "SiLU fused as 'silu'" in fusedmlp.explain(layer)
        True
        >>> "gated_mlp by triton: gated_linear_fwd (" in fusedmlp.explain(layer, gpu="H100")
        True
    """
    function = layer is not None and not isinstance(layer, nn.Module)
    if function and (not callable(layer) or op_of(layer) is None):
        raise TypeError(
            f"explain: layer must be an nn.Module or None, or a function of fusedmlp, got {layer!r}"
        )
    planned = _gpu(gpu, tokens)
    if planned is not None and layer is None:
        raise ValueError(f"explain: layer must be given with gpu or tokens, got {layer!r}")
    lines = [
        *running.describe(),
        f"torch {torch.__version__}, triton {triton.__version__}, "
        f"backend {choice.chosen()!r} (backend(), FUSEDMLP_BACKEND)",
    ]
    device = torch.device("cuda") if torch.cuda.is_available() else None
    capability = capability_of(device) if device else 0
    lines += [*loader.describe(capability), cutlass.describe(capability)]
    lines.append(_device_line(torch.device("cpu")))
    if choice.chosen() == "auto":
        lines.append(
            "of these, experts, trees, one-bit weights, steps of HyperGLU and what blocks keep for "
            "backward: fusedmlp/backends/cpu, tested against the reference"
        )
    lines.append(_device_line(device) if device else "cuda tensors: none, torch finds no GPU")
    off = plans_are_off()
    lines.append(f"launch plans: {f'none, {off}' if off else 'on'}")
    if invariant():
        lines.append(
            f"batch invariance: on in this thread, as for {ROWS} rows, products by our own kernels "
            "(batch_invariant(), FUSEDMLP_BATCH_INVARIANT)"
        )
    lines.append("second derivatives, torch.func, forward-mode AD: reference")
    lines.append(f"ops: {', '.join(public_ops())}")
    with ONE:  # a dry run of another thread's has launches of its own there
        lines += [_last_launch(kernel) for kernel in sorted(LAST.keys() | choice.SERVED.keys())]
    if layer is not None:
        lines += _layer(layer, planned, tokens or TOKENS)
    return "\n".join(lines)
