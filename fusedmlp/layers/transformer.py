"""The MLPs of a nanochat-style train.py: no biases, only matrices, c_proj starting at zero.

| class | y | hidden width H |
|---|---|---|
| SwiGLUMLP | (silu(x Wg') * (x Wu')) Wp' | 8/3 n, rounded up to a multiple of 64 |
| ReluSquaredMLP | relu(x Wf')^2 Wp' | 4 n |
| GELUMLP | gelu(x Wf') Wp', exact (erf) | 4 n |
| SiLUMLP | silu(x Wf') Wp' | 4 n |

| tensor | shape | |
|---|---|---|
| x, y | (..., n) | n = config.n_embd |
| c_gate.weight (Wg), c_up.weight (Wu) | (H, n) | SwiGLUMLP |
| c_fc.weight (Wf) | (H, n) | the others |
| c_proj.weight (Wp) | (n, H) | |

dtype: x has the parameters' floating dtype, which is kept (under autocast: the autocast dtype).

Initial values: input projections uniform in +-sqrt(3 / n), whose standard deviation is 1 / sqrt(n);
c_proj zero. So a fresh block returns 0, and the first backward pass gives a gradient to c_proj
alone. Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202; names and initial values
are nanochat's.
"""

from __future__ import annotations

import warnings
from typing import Protocol

from torch import Tensor, nn

from .parts.block import block_path, gated_block, plain_block, positive_int
from .parts.widths import Reader


class HasWidth(Protocol):
    """A config: anything with the attribute n_embd."""

    n_embd: int


def swiglu_hidden(n_embd: int) -> int:
    """8/3 n_embd, rounded up to a multiple of 64.

    At 8/3, SwiGLU's three matrices have as many weights as two of width 4 n_embd.
    """
    return (int(n_embd * 8 / 3) + 63) // 64 * 64


class _TransformerMLP(Reader):
    """Input projections, then c_proj. Subclasses build the former and say what lies between."""

    c_proj: nn.Linear
    recompute: bool

    def extra_repr(self) -> str:
        return self._noted("recompute=True" if self.recompute else "")

    @classmethod
    def _width(cls, config: HasWidth | int) -> int:
        n_embd = config if isinstance(config, int) else getattr(config, "n_embd", None)
        if n_embd is None:
            raise TypeError(
                f"{cls.__name__}: config must be an int or have an attribute n_embd, got {config!r}"
            )
        positive_int(cls.__name__, "n_embd", n_embd)
        for name in ("bias", "dropout"):
            if value := getattr(config, name, None):
                warnings.warn(
                    f"{cls.__name__}: config.{name} is {value!r}, and this layer has none: "
                    f"FeedForward has; {cls.__name__}(config.n_embd) says that none is wanted",
                    stacklevel=3,
                )
        return n_embd

    @classmethod
    def _hidden(cls, given: int | None, scaled: int) -> int:
        if given is None:
            return scaled
        positive_int(cls.__name__, "hidden", given)
        return given

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        bound = (3 / self.c_proj.out_features) ** 0.5
        for linear in self.children():
            assert isinstance(linear, nn.Linear)
            if linear is self.c_proj:
                nn.init.zeros_(linear.weight)
            else:
                nn.init.uniform_(linear.weight, -bound, bound)


class SwiGLUMLP(_TransformerMLP):
    """c_proj(silu(c_gate(x)) * c_up(x)), hidden width 8/3 n_embd rounded up to a multiple of 64.

    Args:
        config: anything with the attribute `n_embd`, or that width itself. A `bias` or `dropout`
            of it that is at work is warned of, since the layer has neither.
        hidden: the hidden width itself.
        recompute: save x alone for backward, where the block is one call, and run the first GEMM
            again there.

    forward reads the weights of the projections and does not call them; where a hook stands on one,
    all are called.

    Raises ValueError or TypeError for a width that is no positive int, and TypeError in forward if
    a projection was replaced by something else than an nn.Linear.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import SwiGLUMLP
        >>> mlp = SwiGLUMLP(64)
        >>> mlp.c_gate.weight.shape
        torch.Size([192, 64])
        >>> mlp(torch.randn(2, 8, 64)).any().item()  # zero until c_proj has learned
        False
    """

    def __init__(
        self, config: HasWidth | int, *, hidden: int | None = None, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        n_embd = self._width(config)
        hidden = self._hidden(hidden, swiglu_hidden(n_embd))
        self.c_gate = nn.Linear(n_embd, hidden, bias=False)
        self.c_up = nn.Linear(n_embd, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, n_embd, bias=False)
        self.init_weights_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_embd) -> (..., n_embd)."""
        return gated_block(
            self, x, self.c_gate, self.c_up, self.c_proj, None,
            activation="silu", recompute=self.recompute,
        )  # fmt: skip

    def path(self) -> str:
        """For explain()."""
        return block_path(None, activation="silu", gated=True)


class _TwoMatrixMLP(_TransformerMLP):
    """c_proj(act(c_fc(x))), hidden width 4 n_embd."""

    _activation: str

    def __init__(
        self, config: HasWidth | int, *, hidden: int | None = None, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        n_embd = self._width(config)
        hidden = self._hidden(hidden, 4 * n_embd)
        self.c_fc = nn.Linear(n_embd, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, n_embd, bias=False)
        self.init_weights_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_embd) -> (..., n_embd)."""
        return plain_block(
            self, x, self.c_fc, self.c_proj, None,
            activation=self._activation, recompute=self.recompute,
        )  # fmt: skip

    def path(self) -> str:
        """For explain()."""
        return block_path(None, activation=self._activation, gated=False)


class ReluSquaredMLP(_TwoMatrixMLP):
    """c_proj(relu(c_fc(x))^2), hidden width 4 n_embd.

    Arguments, hooks and errors as in SwiGLUMLP.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import ReluSquaredMLP
        >>> ReluSquaredMLP(64)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    _activation = "relu_sq"


class GELUMLP(_TwoMatrixMLP):
    """c_proj(gelu(c_fc(x))), exact gelu, hidden width 4 n_embd.

    Arguments, hooks and errors as in SwiGLUMLP.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import GELUMLP
        >>> GELUMLP(64)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    _activation = "gelu"


class SiLUMLP(_TwoMatrixMLP):
    """c_proj(silu(c_fc(x))), hidden width 4 n_embd.

    Arguments, hooks and errors as in SwiGLUMLP.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import SiLUMLP
        >>> SiLUMLP(64)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    _activation = "silu"
