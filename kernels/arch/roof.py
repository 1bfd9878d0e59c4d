"""What a datasheet says of one GPU. It serves computed figures only: a measured time is set against
cuBLAS and copy of the same run, never against a datasheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Roof:
    """A GPU's limits by its datasheet. flops: dtype -> dense FLOP/s.

    float32 is that of the CUDA cores, since PyTorch's default precision keeps TF32 off.
    """

    name: str
    multiprocessors: int
    bytes_per_s: float
    flops: Mapping[str, float]

    def milliseconds(self, flops: float, moved: float, dtype: str) -> float:
        """The longer of computing and moving: no kernel can be faster, most are slower."""
        return max(flops / self.flops[dtype], moved / self.bytes_per_s) * 1e3

    def bound(self, flops: float, moved: float, dtype: str) -> str:
        computing = flops / self.flops[dtype] > moved / self.bytes_per_s
        return "compute" if computing else "memory"


def _roof(name: str, multiprocessors: int, tb_per_s: float, half: float, single: float) -> Roof:
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Roof(name, multiprocessors, tb_per_s * 1e12, flops)


# These are NVIDIA's own figures, without sparsity: "H100 Tensor Core GPU" and "H200 Tensor Core
# GPU" datasheets (SXM columns), "Blackwell Architecture Technical Brief" (HGX B200). The number of
# multiprocessors is the driver's.
H100 = _roof("H100", 132, 3.35, 989.4, 66.9)
H200 = _roof("H200", 132, 4.8, 989.4, 66.9)
B200 = _roof("B200", 148, 8.0, 2250.0, 80.0)
