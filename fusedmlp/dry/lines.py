"""What explain() says of a model: its fused blocks, what stands in their way, and what they would
launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..backends import choice
from ..backends.op import OPS, TRITON_DTYPES, Kernel, Op
from ..kernels.arch import ARCHES, Arch
from ..kernels.arch.roof import Roof
from ..kernels.device import arch_of, multiprocessors
from ..layers.parts.around import hooked
from ..layers.parts.block import DROPOUTS
from ..patching.plan import child
from ..patching.steps import paths
from ..patching.swap import Patched
from .blocks import Block, blocks_of
from .expected import Expected, expected

TOKENS = 8192


class Gpu(NamedTuple):
    """roof: its datasheet, where a row of kernels/arch has it."""

    name: str
    arch: Arch
    multiprocessors: int
    roof: Roof | None


GPUS = {
    roof.name: Gpu(roof.name, arch, roof.multiprocessors, roof)
    for arch in ARCHES.values()
    for roof in arch.roofs
}


def named_gpu(op: str, name: object) -> Gpu:
    if isinstance(name, str) and name.upper() in GPUS:
        return GPUS[name.upper()]
    raise ValueError(f"{op}: gpu must be one of {', '.join(GPUS)}, got {name!r}")


def gpu_here() -> Gpu | None:
    """The current GPU."""
    if not torch.cuda.is_available():
        return None
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    roof = next((gpu.roof for gpu in GPUS.values() if gpu.name in name), None)
    return Gpu(name, arch_of(device), multiprocessors(device), roof)


def where_lines(model: nn.Module, gpu: Gpu | None) -> list[str]:
    """Where its blocks run; or that there are none, and what makes some. For a GPU `gpu_lines` says
    what each of them calls, and they are not run for it here too."""
    groups = _alike(model)
    if groups:
        if gpu or any(_fuses(first) for first, *_ in groups):
            return [f"its fused calls: {_where(groups[0][0].like)}"]
        return ["none of its calls is fused: all of it runs in PyTorch"]
    if next(model.parameters(), None) is None:
        return []
    return [
        f"{type(model).__name__} holds no layer of fusedmlp and no patched module: all of it runs "
        "in PyTorch; fusedmlp.patch(model) finds its MLPs and runs them fused"
    ]


def _alike(model: nn.Module) -> list[list[Block]]:
    """Its blocks, those of the same launches together."""
    groups: dict[object, list[Block]] = {}
    for block in blocks_of(model):
        groups.setdefault(block.alike(), []).append(block)
    return list(groups.values())


def _fuses(block: Block) -> bool:
    """Whether a forward of one row would call a kernel of ours on a GPU. One that reads what was
    not computed has no answer, and has fused calls to read."""
    try:
        return any(p.kernels for p in expected(block, 1, next(iter(ARCHES.values())), 1))
    except Exception:
        return True


def _where(sample: torch.Tensor) -> str:
    try:
        here = choice.pick("explain", sample)
    except (RuntimeError, TypeError) as error:
        return f"none runs: {str(error).partition(': ')[2]}"
    elsewhere = choice.elsewhere(here)
    return f"on CUDA: {elsewhere}; here: {here}" if elsewhere else f"by {here}"


def obstacle_lines(model: nn.Module) -> list[str]:
    """A line for what keeps a block from being fused as it is now; widths have lines of their
    own."""
    found: dict[str, list[str]] = {}
    for block in blocks_of(model):
        for path, module in _inside(block.module):
            for why in _obstacles(module):
                name = f"{block.name}.{path}".lstrip(".")
                found.setdefault(why, []).append(f"{name} ({type(module).__name__})")
        for why in _dtypes(block):
            found.setdefault(why, []).append(block.kind)
    return [f"{names[0]}{_more(len(names) - 1)} {why}" for why, names in found.items()]


def _inside(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a fused call would take in, by their paths; of a patched module's others
    nothing is fused."""
    if not isinstance(module, Patched):
        return [(path, inner) for path, inner in module.named_modules() if path]
    between = paths(getattr(module._plan, "between", ()))
    return [(path, child(module, path)) for path in (*module._plan.bypassed(), *between)]


def _more(count: int) -> str:
    return f" and {count} more" if count else ""


def _obstacles(module: nn.Module) -> Iterator[str]:
    if isinstance(module, DROPOUTS) and module.training and module.p > 0:
        yield "is at work, so a block around it is two calls; not in eval() or at p = 0"
    if around := hooked(module):
        yield f"{around}, so it is called, and what is behind it is not fused with it"


def _dtypes(block: Block) -> Iterator[str]:
    matrices = (p for p in block.module.parameters() if p.dim() in (2, 3))
    dtypes = {p.dtype: None for p in matrices if p.is_floating_point()}
    if refused := [str(d)[6:] for d in dtypes if d not in TRITON_DTYPES]:
        yield f"has parameters of {', '.join(refused)}, which no kernel takes: cast it to bfloat16"
    elif len(dtypes) > 1:
        names = ", ".join(str(d)[6:] for d in dtypes)
        yield f"has parameters of {names}: a call takes one dtype, or autocast"


def gpu_lines(model: nn.Module, gpu: Gpu, tokens: int) -> list[str]:
    """What each block would launch there."""
    groups = _alike(model)
    if not groups:
        return []
    lines = [f"on {gpu.name}, {tokens} tokens: planned and computed, nothing was run"]
    for first, *others in groups:
        name = first.kind + _more(len(others))
        try:
            phases = expected(first, tokens, gpu.arch, gpu.multiprocessors)
        except Exception as error:  # its call may ask anything of what was not computed
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            lines.append(f"  {name}: cannot be planned: its call raises on results of zeros: {why}")
            continue
        dtype = str(first.like.dtype).removeprefix("torch.")
        lines += (f"  {name}, {p.phase}, {dtype}: {_phase(p, gpu.roof, dtype)}" for p in phases)
    return lines


def _phase(phase: Expected, roof: Roof | None, dtype: str) -> str:
    kernels = [name if tile is None else f"{name} ({tile})" for name, tile in phase.kernels]
    ops = f"{', '.join(phase.ops)} by triton: " if phase.ops else ""
    launched = f"{ops}{', '.join(kernels)}" if kernels else "PyTorch alone"
    if not kernels and not phase.ops and phase.flops == 0:
        return launched
    cost = f"{phase.flops / 1e9:.3g} GFLOP, {phase.moved / 1e6:.3g} MB"
    if roof is not None and dtype in roof.flops:
        flops, moved = phase.flops, phase.moved
        least, bound = roof.milliseconds(flops, moved, dtype), roof.bound(flops, moved, dtype)
        cost += f", at best {least:.3g} ms by {bound}"
    return f"{launched}; {cost}"


def op_of(function: Callable[..., Any]) -> Op | None:
    return next((op for op in OPS.values() if op.function is function), None)


def op_lines(op: Op, gpu: Gpu | None) -> list[str]:
    """What a function launches; which tile it is, its sizes say."""
    lines = [f"{op.name}: {_where(torch.empty(0))}"]
    for phase, kernels in (("forward", op.forward), ("backward", op.backward)):
        if kernels:
            lines.append(f"{op.name}, {phase}: {', '.join(map(_kernel, kernels))}")
    for kernel in op.kernels if gpu is not None else ():
        assert gpu is not None
        if tiles := gpu.arch.tiles.get((kernel.name, 2)):
            own = "; ".join(map(str, tiles))
            lines.append(f"tiles of {kernel.name} on {gpu.name} in 16 bits, by sizes: {own}")
    return lines


def _kernel(kernel: Kernel) -> str:
    return f"{kernel.name} (triton, or cuda)" if kernel.cuda else f"{kernel.name} (triton)"
