"""Gated linear units: h = v * act(g), where [v | g] = x W' + b.

| class | act |
|---|---|
| GLU | sigmoid |
| Bilinear | identity |
| ReGLU | relu |
| SwiGLU | silu |
| GeGLU | gelu, exact (erf) |

| tensor | shape | |
|---|---|---|
| x | (..., dim_in) | |
| proj.weight | (2 * dim_out, dim_in) | rows of the value v first, rows of the gate g second |
| proj.bias | (2 * dim_out,) | or None |
| h | (..., dim_out) | |

dtype: x has the parameters' floating dtype, which is kept (under autocast: the autocast dtype).
Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202; the order of the halves is
mlp_utils'.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..check.layer import check_x
from ..ops.gated_linear import gated_linear
from .masked_glu import MGLU, BilinearMGLU, GeMGLU, MaskedGLU, ReMGLU, SwiMGLU
from .parts.activation import describe, gate, gate_module, name_of
from .parts.around import bare
from .parts.block import affine, positive_int, reset_others
from .parts.widths import Reader

__all__ = [
    "GLU",
    "MGLU",
    "Bilinear",
    "BilinearMGLU",
    "GLUBase",
    "GeGLU",
    "GeMGLU",
    "MaskedGLU",
    "ReGLU",
    "ReMGLU",
    "SwiGLU",
    "SwiMGLU",
]


class GLUBase(Reader):
    """v * activation(g), where [v | g] = proj(x): value half first, gate half second. Of a gate of
    two factors, such as "swiglu_oai", phi(g) psi(v).

    An activation that `fusedmlp` has a kernel for is fused with the projection; any other module
    runs in PyTorch behind `proj`. The fused path reads the parameters of `proj` without calling it;
    where a hook stands on `proj` or `activation`, both are called.

    Args:
        dim_in: width of x.
        dim_out: width of the result.
        activation: an elementwise module, kept as the attribute `activation`; or a name of
            `fusedmlp.reference.activations.ACTIVATIONS`, with parameters where its row has some:
            "swiglu_oai(limit=5.0)".
        bias: give `proj` a bias.

    `proj` starts with nn.Linear's own initialisation. Raises ValueError or TypeError for a width
    that is no positive int or an activation that is none, and TypeError in forward if `proj` was
    replaced by something else than an nn.Linear.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers.glu import GLUBase
        >>> GLUBase(64, 128, "clamped_swiglu(limit=5.0)")(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    def __init__(
        self, dim_in: int, dim_out: int, activation: nn.Module | str, bias: bool = True
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        positive_int(owner, "dim_in", dim_in)
        positive_int(owner, "dim_out", dim_out)
        made = gate_module(owner, activation)
        self.proj = nn.Linear(dim_in, 2 * dim_out, bias)
        self.activation = made

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta.

        An activation with parameters is reset by its own `reset_parameters`; raises TypeError if it
        has none.
        """
        self.proj.reset_parameters()
        reset_others(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim_in) -> (..., dim_out)."""
        activation = name_of(self.activation)
        w, b = affine(self, self.proj)
        check_x(type(self).__name__, x, w.shape[1], w.dtype)
        if activation is None or not bare(self.proj, self.activation):
            value, g = self.proj(x).chunk(2, -1)
            return gate(self.activation, g, value)
        return gated_linear(x, w, None, b, activation=activation, packed="up_gate")

    def path(self) -> str:
        """Where the activation runs."""
        return describe(self.activation)

    def _reads(self) -> Iterator[tuple[str, Tensor | int]]:
        if name_of(self.activation) is not None:
            yield from super()._reads()
            yield "dim_out", self.proj.weight.shape[0] // 2

    def extra_repr(self) -> str:
        return self._noted(self.path())


class GLU(GLUBase):
    """h = v * sigmoid(g), where [v | g] = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype. W = `proj.weight` is (2 dim_out, dim_in), the
    rows of v first; b = `proj.bias` is (2 dim_out,) or None. Arguments, dtypes and errors are those
    of `GLUBase`, but for `activation`, which this class brings.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import GLU
        >>> GLU(64, 128)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__(dim_in, dim_out, nn.Sigmoid(), bias)


class Bilinear(GLUBase):
    """h = v * g, where [v | g] = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype. W = `proj.weight` is (2 dim_out, dim_in), the
    rows of v first; b = `proj.bias` is (2 dim_out,) or None. Arguments, dtypes and errors are those
    of `GLUBase`, but for `activation`, which this class brings.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import Bilinear
        >>> Bilinear(64, 128)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__(dim_in, dim_out, nn.Identity(), bias)


class ReGLU(GLUBase):
    """h = v * relu(g), where [v | g] = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype. W = `proj.weight` is (2 dim_out, dim_in), the
    rows of v first; b = `proj.bias` is (2 dim_out,) or None. Arguments, dtypes and errors are those
    of `GLUBase`, but for `activation`, which this class brings.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import ReGLU
        >>> ReGLU(64, 128)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__(dim_in, dim_out, nn.ReLU(), bias)


class SwiGLU(GLUBase):
    """h = v * silu(g), where [v | g] = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype. W = `proj.weight` is (2 dim_out, dim_in), the
    rows of v first; b = `proj.bias` is (2 dim_out,) or None. Arguments, dtypes and errors are those
    of `GLUBase`, but for `activation`, which this class brings.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import SwiGLU
        >>> SwiGLU(64, 128)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__(dim_in, dim_out, nn.SiLU(), bias)


class GeGLU(GLUBase):
    """h = v * gelu(g), where [v | g] = x W' + b; gelu is the exact (erf) one.

    x is (..., dim_in), h (..., dim_out) in x's dtype. W = `proj.weight` is (2 dim_out, dim_in), the
    rows of v first; b = `proj.bias` is (2 dim_out,) or None. Arguments, dtypes and errors are those
    of `GLUBase`, but for `activation`, which this class brings.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import GeGLU
        >>> GeGLU(64, 128)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__(dim_in, dim_out, nn.GELU(), bias)
