"""explain(): which implementation runs each op here, and why."""

from __future__ import annotations

import torch
import triton

from . import _backend
from .kernels.arch import LAST, arch_of
from .ops import gated_act, gated_linear, gated_mlp, linear_act, mlp

OPS = (gated_act.OP, gated_linear.OP, gated_mlp.OP, linear_act.OP, mlp.OP)


def _device_line(device: torch.device) -> str:
    try:
        where = _backend.pick("op", torch.empty(0, device=device))
    except RuntimeError as error:
        return f"{device.type} tensors: none: {error}"
    if where == "reference":
        asked = _backend.chosen() == "reference"
        why = "asked for" if asked else "no GPU kernel runs on CPU tensors"
        return f"{device.type} tensors: reference ({why})"
    if device.type == "cpu":
        return "cpu tensors: triton, in Triton's interpreter (TRITON_INTERPRET=1)"
    arch = arch_of(device)
    return f"{device.type} tensors: triton, tiles of {arch.name}"


def explain() -> str:
    """A text of what runs where: versions, the chosen backend, each op's backend per device and the
    last tile that each kernel was launched with."""
    lines = [
        f"torch {torch.__version__}, triton {triton.__version__}, "
        f"backend {_backend.chosen()!r} (backend(), FUSEDMLP_BACKEND)",
        "cuda backend: this build holds no CUDA kernels; triton serves every op",
        _device_line(torch.device("cpu")),
    ]
    if torch.cuda.is_available():
        lines.append(_device_line(torch.device("cuda")))
    else:
        lines.append("cuda tensors: none, torch finds no GPU")
    lines.append(f"ops: {', '.join(OPS)}")
    lines += [f"last launch of {kernel}: tile {tile}" for kernel, tile in sorted(LAST.items())]
    return "\n".join(lines)
