"""What this machine is, and what the datasheets say of GPUs that are not here.

`describe()` is what every result file says of where its numbers come from.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from .. import running
from ..kernels.arch import ARCHES, Arch
from ..kernels.arch.roof import Roof
from ..version import __version__

# What has to be on sys.path for `import fusedmlp`: a checkout's root, or site-packages.
ROOT = Path(__file__).absolute().parents[2]


# GPU -> what its datasheet says, and its generation: all that rows of kernels/arch know.
ROOFS: dict[str, Roof] = {roof.name: roof for arch in ARCHES.values() for roof in arch.roofs}
ARCH_OF: dict[str, Arch] = {roof.name: arch for arch in ARCHES.values() for roof in arch.roofs}


def shortest_ms(flops: float, moved: float, dtype: str) -> float:
    """The roofline time on the fastest GPU of ROOFS."""
    return min(roof.milliseconds(flops, moved, dtype) for roof in ROOFS.values())


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """A command's output, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where tracked files differ from it; None outside git."""
    if not (ROOT / ".git").exists():
        return None  # installed; git would answer for whatever repository lies around it
    return _output("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*", cwd=ROOT)


def _query(*fields: str) -> list[str] | None:
    """What nvidia-smi says of torch's current GPU. It only reads: nothing is ever set from here."""
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    line = _output(
        "nvidia-smi", "-i", uuid, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"
    )
    return None if line is None else [field.strip() for field in line.split(",")]


def clocks() -> dict[str, int] | None:
    """Clocks at this moment in MHz; None without a GPU or where they cannot be read."""
    if not torch.cuda.is_available():
        return None
    values = _query("clocks.sm", "clocks.mem", "clocks.max.sm")
    if values is None or not all(value.isdigit() for value in values):
        return None
    return dict(zip(("sm_mhz", "memory_mhz", "sm_max_mhz"), map(int, values), strict=True))


def device_name() -> str:
    """The name that records carry: the GPU's, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def describe() -> dict[str, Any]:
    """Everything about this machine that a number may depend on; None where it has none."""
    found: dict[str, Any] = {
        "gpu": None,
        "capability": None,
        "multiprocessors": None,
        "l2_bytes": None,
        "memory_bytes": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fusedmlp": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": platform.machine(),
        "commit": commit(),
        "clocks": clocks(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        driver = _query("driver_version")
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": driver[0] if driver else None,
        }
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    """`describe()` for people."""
    if found["gpu"] is None:
        gpu = "GPU: none found by torch"
    else:
        gpu = (
            f"GPU: {found['gpu']}, capability {found['capability']}, "
            f"{found['multiprocessors']} multiprocessors, L2 {found['l2_bytes'] >> 20} MiB, "
            f"memory {found['memory_bytes'] / 2**30:.0f} GiB, driver {found['driver'] or 'unknown'}"
        )
        now = found["clocks"]
        gpu += f", SM clock {now['sm_mhz']} of {now['sm_max_mhz']} MHz" if now else ""
    return [
        *running.describe(),
        gpu,
        f"torch {found['torch']}, triton {found['triton']}, CUDA {found['cuda'] or 'none'}, "
        f"Python {found['python']}",
        *([f"commit {found['commit']}"] if found["commit"] else []),
    ]
