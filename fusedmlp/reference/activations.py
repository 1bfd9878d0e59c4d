"""The table of all activations: a name, its formula in PyTorch, and whether its slope jumps at 0.

A row here and a device function of its name in kernels/activations.py are all it takes: layers
accept the name, error messages list it, and the tests, the ahead-of-time gate and the bench run it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

BSILU_ALPHA = 1.67  # SUGAR's B-SiLU, arXiv 2505.22074: (x + a) sigmoid(x) - a / 2


@dataclass(frozen=True)
class Activation:
    """One activation: `reference` is its formula in PyTorch, for any floating dtype.

    `kink`: its slope jumps at 0, so an input within rounding of 0 has no single right gradient.
    """

    name: str
    reference: Callable[[Tensor], Tensor]
    kink: bool = False


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("silu", F.silu),
        Activation("gelu", F.gelu),
        Activation("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        Activation("quick_gelu", lambda x: x * (1.702 * x).sigmoid()),
        Activation("relu", F.relu, kink=True),
        Activation("relu_sq", lambda x: F.relu(x).square()),
        Activation("sigmoid", lambda x: x.sigmoid()),
        Activation("tanh", lambda x: x.tanh()),
        Activation("identity", lambda x: x),
        Activation("gelu2", lambda x: F.gelu(x).square()),
        Activation("bsilu", lambda x: (x + BSILU_ALPHA) * x.sigmoid() - BSILU_ALPHA / 2),
    )
}
