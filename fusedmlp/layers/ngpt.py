"""The feed-forward step of nGPT: hidden states on the unit sphere, moved along it.

    h = norm(x), m = norm(net(h)), y = norm(h + alpha * (m - h))

where norm divides by the L2 norm over features, and net is by default

    net(h) = (silu(h Wg') * (h Wh')) Wo'

with the rows of Wg and Wh and the columns of Wo of unit norm at every access.

| tensor | shape | |
|---|---|---|
| x, y | (..., D) | D = dim |
| alpha | (D,) or (1,) | learned; `alpha_m` |
| Wg, Wh | (H, D) | `norm_linear_gate`, `norm_linear_hidden`; H = floor(dim * mult * 2 / 3) |
| Wo | (D, H) | `norm_linear_out` |

dtype: x has the parameters' floating dtype, which is kept (under autocast: x's own); norms are
computed in float32 at least. Source: Loshchilov et al., nGPT, arXiv 2410.01131; names and defaults
are mlp_utils'. They differ from the authors' code (NVIDIA/ngpt), which paper=True follows:

| | default | paper=True |
|---|---|---|
| alpha at the start | 0.5 | 0.05 |
| alpha's sign | free | its magnitude is used |
| default net | as above | silu(sqrt(D) s_v * (h Wg')) * (s_u * (h Wh')), s_u and s_v (H,) learned |

There, weights are normalised after each optimiser step, here at each access; the function is one.
Their hidden width is 4 D: NGPT(dim, SwiGLU(dim, mult=6, scaled=True), paper=True).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..check.layer import check_x
from ..check.numbers import finite, number
from ..ops.gated_act import gated_act
from ..ops.gated_mlp import gated_mlp
from .parts.around import bare
from .parts.block import positive_int, reset_tree
from .parts.freezing import Freezing
from .parts.widths import Default, Reader, hidden_width, scaled_width


def l2norm(t: Tensor, dim: int = -1, norm_eps: float = 0.0) -> Tensor:
    """t with unit L2 norm along dim, in t's dtype.

    norm_eps = 0: t / max(|t|, 1e-12); a zero vector stays zero. norm_eps > 0: a norm within
    1 +- norm_eps is left alone, another is brought to the nearer edge; the edge is a constant for
    autograd.
    """
    return _wide_l2norm(t, dim, norm_eps).to(t.dtype)


def _wide_l2norm(t: Tensor, dim: int, norm_eps: float) -> Tensor:
    """`l2norm` before it is rounded to t's dtype."""
    wide = torch.promote_types(t.dtype, torch.float32)
    norm = torch.linalg.vector_norm(t, dim=dim, keepdim=True, dtype=wide)
    if norm_eps == 0:
        return t / norm.clamp_min(1e-12)
    target = norm.detach().clamp(1 - norm_eps, 1 + norm_eps)
    floor = 1e-5 if t.dtype == torch.float16 else 1e-10
    return t * (target / norm.clamp_min(floor))


class L2Norm(nn.Module):
    """`l2norm` as a module, without parameters.

    Args:
        dim: the dimension that gets unit norm.
        norm_eps: half the width of the band around 1 that is left alone, in [0, 1).

    Raises ValueError for a norm_eps out of range.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import L2Norm
        >>> L2Norm()(torch.tensor([3.0, 4.0])).norm().item()
        1.0
    """

    def __init__(self, dim: int = -1, norm_eps: float = 0.0) -> None:
        super().__init__()
        _check_eps("L2Norm", norm_eps)
        self.dim, self.norm_eps = dim, norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return l2norm(x, self.dim, self.norm_eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, norm_eps={self.norm_eps}"


class Scale(nn.Module):
    """A learned vector that starts at `init` while the optimiser sees values of size `scale`.

    Args:
        dim: its length.
        init: its value at the start.
        scale: the stored parameter's value at the start; not 0. Adam's steps are alike for all
            parameters, so a smaller scale makes faster changes relative to init.

    Parameter: `scale` (dim,). Called without arguments: returns scale * (init / scale at start).
    """

    def __init__(self, dim: int, init: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        positive_int("Scale", "dim", dim)
        finite("Scale", "init", init)
        finite("Scale", "scale", scale)
        if scale == 0:
            raise ValueError("Scale: scale must not be 0, got 0")
        self._start, self._factor = scale, init / scale
        self.scale = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self._start)

    def forward(self) -> Tensor:
        return self.scale * self._factor

    def extra_repr(self) -> str:
        return f"{self.scale.numel()}, init={self._start * self._factor}, scale={self._start}"


class _Original(nn.Module):
    """The stored weight of a normalised linear, in the place where torch's parametrize puts it."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.original = nn.Parameter(torch.empty(dim_out, dim_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.original, a=5**0.5)  # nn.Linear's own

    def forward(self) -> Tensor:
        return self.original


class _UnitLinear(nn.Module):
    """x W', W normalised at each access. State key: parametrizations.weight.original.

    Not by torch.nn.utils.parametrize: a module that it made cannot be pickled.
    """

    def __init__(self, dim_in: int, dim_out: int, norm_dim_in: bool, norm_eps: float) -> None:
        super().__init__()
        self.parametrizations = nn.Module()
        self.parametrizations.weight = _Original(dim_in, dim_out)
        self._norm_dim, self._norm_eps = -1 if norm_dim_in else 0, norm_eps

    @property
    def weight(self) -> Tensor:
        return self.scaled_weight(None)

    def scaled_weight(self, rows: Scale | None) -> Tensor:
        """The normalised weight, its rows times `rows`, rounded once."""
        stored = self.parametrizations.weight()  # type: ignore[operator]
        weight = _wide_l2norm(stored, self._norm_dim, self._norm_eps)
        if rows is not None:
            weight = weight * rows().unsqueeze(-1)
        return weight.to(stored.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class NormLinear(nn.Module):
    """x W' without bias, with rows or columns of W of unit norm.

    Args:
        dim_in: width of x.
        dim_out: width of the result.
        norm_dim_in: normalise each row of W (over dim_in); False: each column.
        norm_eps: l2norm's.

    Attributes: `linear`, whose `weight` is the normalised W, computed at each access from the
    parameter `linear.parametrizations.weight.original`; `weight`, the same.
    """

    def __init__(
        self, dim_in: int, dim_out: int, norm_dim_in: bool = True, norm_eps: float = 0.0
    ) -> None:
        super().__init__()
        positive_int("NormLinear", "dim_in", dim_in)
        positive_int("NormLinear", "dim_out", dim_out)
        _check_eps("NormLinear", norm_eps)
        self.linear = _UnitLinear(dim_in, dim_out, norm_dim_in, norm_eps)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def init_weights_(self) -> None:
        """Give the parameter its initial value again, or at last on a layer built on meta."""
        reset_tree(self, self.linear)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim_in) -> (..., dim_out)."""
        return self.linear(x)


class SwiGLU(Reader):
    """norm_linear_out(silu(norm_linear_gate(x)) * norm_linear_hidden(x)), in one fused call.

    Args:
        dim: width of x and y.
        mult: H = floor(dim * mult * 2 / 3).
        hidden: H itself, in place of mult.
        multiple_of: round mult's H up to a multiple of this; 64 suits every kernel.
        recompute: save x alone for backward, where the block is one call, and run the first GEMM
            again there.
        norm_eps: l2norm's, for the weights.
        scaled: multiply gate and hidden values by the learned sqrt(dim) s_v and s_u, as nGPT's
            authors do; they are folded into the weights.
    """

    def __init__(
        self,
        dim: int,
        mult: float = Default(4),
        norm_eps: float = 0.0,
        scaled: bool = False,
        *,
        hidden: int | None = None,
        multiple_of: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        positive_int("SwiGLU", "dim", dim)
        inner = hidden_width("SwiGLU", dim, "mult", mult, hidden, multiple_of, _two_thirds)
        self.recompute = recompute
        self.norm_linear_hidden = NormLinear(dim, inner, norm_eps=norm_eps)
        self.norm_linear_gate = NormLinear(dim, inner, norm_eps=norm_eps)
        self.norm_linear_out = NormLinear(inner, dim, norm_dim_in=False, norm_eps=norm_eps)
        self.s_u = Scale(inner) if scaled else None
        self.s_v = Scale(inner, init=dim**0.5) if scaled else None

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        for child in self.children():
            reset_tree(self, child)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        layers = (self.norm_linear_gate, self.norm_linear_hidden, self.norm_linear_out)
        if not bare(*layers, *(layer.linear for layer in layers)):
            return self._called(x)
        gate = self.norm_linear_gate.linear.scaled_weight(self.s_v)
        hidden = self.norm_linear_hidden.linear.scaled_weight(self.s_u)
        options: Any = {"activation": "silu", "recompute": self.recompute}
        return gated_mlp(x, gate, hidden, self.norm_linear_out.weight, **options)

    def _called(self, x: Tensor) -> Tensor:
        gate, hidden = self.norm_linear_gate(x), self.norm_linear_hidden(x)
        gate = gate if self.s_v is None else (gate * self.s_v()).to(gate.dtype)
        hidden = hidden if self.s_u is None else (hidden * self.s_u()).to(hidden.dtype)
        return self.norm_linear_out(gated_act(gate, hidden, activation="silu"))

    def path(self) -> str:
        """For explain()."""
        return "one gated_mlp, 'silu', of weights normalised in PyTorch"

    def extra_repr(self) -> str:
        return self._noted("recompute=True" if self.recompute else "")


class NGPT(Freezing):
    """norm(h + alpha * (norm(net(h)) - h)), where h = norm(x).

    A drop-in for a feed-forward block together with its norm and its residual: y is the new hidden
    state, of unit norm.

    Args:
        dim: width of x and y.
        feedforward_net: the net, any module that returns one tensor of x's shape; None: the
            module's SwiGLU of NormLinears, without biases.
        scalar_alpha: one alpha for all features.
        alpha_m_init: alpha at the start; None: 0.5, with paper=True 0.05.
        alpha_m_scale: the size at which alpha is stored, see Scale; None: dim**-0.5, of a scalar
            alpha 1.
        norm_eps: l2norm's, for hidden states and for the default net's weights.
        paper: follow the authors' code: alpha counts by its magnitude, and gate and hidden values
            have learned scales.
        hidden, multiple_of, recompute: the default net's, as in its SwiGLU: its hidden width, what
            8/3 dim is rounded up to a multiple of, and whether it saves its input alone for
            backward. Not together with feedforward_net.

    Attributes: `feedforward_net`, `alpha_m`, `norm`; `needs_normalized_target`, always True, for a
    training script that compares y with targets.

    Raises ValueError or TypeError for a bad argument, and in forward for an x of another width or
    dtype and for a net that does not return one tensor of x's shape.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import NGPT
        >>> y = NGPT(64)(torch.randn(2, 8, 64))
        >>> torch.allclose(y.norm(dim=-1), torch.ones(2, 8))
        True
    """

    def __init__(
        self,
        dim: int,
        feedforward_net: nn.Module | None = None,
        scalar_alpha: bool = False,
        alpha_m_init: float | None = None,
        alpha_m_scale: float | None = None,
        norm_eps: float = 0.0,
        paper: bool = False,
        *,
        hidden: int | None = None,
        multiple_of: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        positive_int("NGPT", "dim", dim)
        if alpha_m_init is None:
            alpha_m_init = 0.05 if paper else 0.5
        if alpha_m_scale is None:
            alpha_m_scale = 1.0 if scalar_alpha else dim**-0.5
        self.dim, self.paper = dim, paper
        self.norm = L2Norm(norm_eps=norm_eps)
        if feedforward_net is None:
            feedforward_net = SwiGLU(
                dim, norm_eps=norm_eps, scaled=paper, hidden=hidden, multiple_of=multiple_of,
                recompute=recompute,
            )  # fmt: skip
        elif not isinstance(feedforward_net, nn.Module):
            raise TypeError(
                f"NGPT: feedforward_net must be an nn.Module or None, got {feedforward_net!r}"
            )
        elif (hidden, multiple_of, recompute) != (None, None, False):
            raise ValueError(
                "NGPT: hidden, multiple_of and recompute must be left alone with a "
                f"feedforward_net, got {hidden!r}, {multiple_of!r} and {recompute!r}; give them to "
                "the net"
            )
        self.feedforward_net = feedforward_net
        self.alpha_m = Scale(1 if scalar_alpha else dim, alpha_m_init, alpha_m_scale)

    @property
    def needs_normalized_target(self) -> bool:
        return True

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta.

        A given net's by its own init_weights_() or reset_parameters(); raises TypeError if a module
        with parameters has neither.
        """
        reset_tree(self, self.feedforward_net)
        reset_tree(self, self.alpha_m)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        check_x("NGPT", x, self.dim, self.alpha_m.scale.dtype)
        h = self.norm(x)
        m = self.feedforward_net(h)
        if not isinstance(m, Tensor):
            raise TypeError(
                "NGPT: feedforward_net must return one tensor, got "
                f"{type(m).__name__} from {type(self.feedforward_net).__name__}"
            )
        if m.shape != h.shape:
            raise ValueError(
                f"NGPT: feedforward_net must keep x's shape {tuple(h.shape)}, got "
                f"{tuple(m.shape)} from {type(self.feedforward_net).__name__}"
            )
        alpha = self.alpha_m().abs() if self.paper else self.alpha_m()
        return self.norm(h + alpha * (self.norm(m) - h))

    def path(self) -> str:
        """For explain(): what stands around the net, which speaks for itself."""
        return "norms and step in PyTorch"

    def extra_repr(self) -> str:
        return f"paper={self.paper}"


def _two_thirds(owner: str, dim: int, name: str, mult: float) -> int:
    scaled_width(owner, dim, name, mult)
    inner = int(dim * mult * 2 / 3)
    positive_int(owner, "hidden width dim * mult * 2 / 3", inner)
    return inner


def _check_eps(owner: str, norm_eps: float) -> None:
    number(owner, "norm_eps", norm_eps)
    if not 0 <= norm_eps < 1:
        raise ValueError(f"{owner}: norm_eps must be in [0, 1), got {norm_eps}")
