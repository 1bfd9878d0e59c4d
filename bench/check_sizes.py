"""The sizes that `check` visits if it is given none."""

from __future__ import annotations

# label, (M, D, H), dtype if none is asked for. Between them the defaults visit every dtype and
# every way of loading: TMA or vectors, single elements, K cut into parts.
Class = tuple[str, tuple[int, int, int], str]
ON_GPU: tuple[Class, ...] = (
    ("aligned", (512, 1024, 2816), "bfloat16"),
    ("aligned", (512, 1024, 2816), "float16"),
    ("ragged", (509, 1021, 1531), "bfloat16"),
    ("aligned", (128, 256, 384), "float32"),
    ("ragged", (251, 509, 763), "float32"),
    ("skinny", (16, 4096, 2048), "bfloat16"),
    ("one token", (1, 1024, 2048), "float16"),
)
SMALL: tuple[Class, ...] = (
    ("aligned", (33, 40, 40), "bfloat16"),
    ("ragged", (33, 35, 37), "float32"),
    ("skinny", (5, 128, 40), "float16"),
)
# What the CUDA kernels take: 16 bits, D and H in eights. Tiles that outnumber the multiprocessors
# several times over, tails of every block, one row of tiles.
ON_CUDA: tuple[Class, ...] = (
    ("aligned", (512, 1024, 2816), "bfloat16"),
    ("aligned", (512, 1024, 2816), "float16"),
    ("many tiles", (4096, 320, 4352), "bfloat16"),
    ("ragged", (509, 1032, 1544), "bfloat16"),
    ("ragged", (1031, 72, 776), "float16"),
    ("skinny", (16, 4096, 2048), "bfloat16"),
    ("one token", (1, 1024, 2048), "float16"),
)
