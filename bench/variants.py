"""Our own providers by name: what auto takes, the CUDA kernels as they choose, and each variant of
the sm_90a kernels that can be forced."""

from __future__ import annotations

from .work import DGLU

DEFAULT, CUDA = "fusedmlp", "fusedmlp-cuda"

# kernel -> its variants, in the order of the extension's own table.
_BY_KERNEL = {
    "gated_linear_fwd": (
        "cooperative-cluster2",
        "cooperative-cluster1",
        "pingpong-cluster2",
        "pingpong-cluster1",
    ),
    "gated_linear_bwd": ("pingpong-cluster2", "pingpong-cluster1"),
}
# kernel -> the op and the phase that time it alone.
TIMED = {
    "gated_linear_fwd": ("gated_linear", "forward"),
    "gated_linear_bwd": ("gated_mlp", DGLU),
}

KERNELS = tuple(_BY_KERNEL)
VARIANTS = tuple(dict.fromkeys(name for names in _BY_KERNEL.values() for name in names))


def variants_of(kernel: str) -> tuple[str, ...]:
    return _BY_KERNEL[kernel]


def provider(variant: str) -> str:
    return f"{CUDA}-{variant}"
