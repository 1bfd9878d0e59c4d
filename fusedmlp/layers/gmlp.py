"""gMLP: blocks that mix tokens by a gate that is linear along the sequence.

    block(x) = (gelu(u) * sgu(v)) Wo' + bo, where [u | v] = x Wi' + bi
    sgu(v) = v * (Ws norm(v) + bs)       canonical_gate=True: sgu(v) = Ws norm(v) + bs
    y = x + block(norm(x)), `depth` times

| tensor | shape | |
|---|---|---|
| x, y | (B, N, D) | N = seq_len, D = dim |
| proj_in (Wi, bi) | (2 F, D), (2 F,) | F = dim_ff; u first |
| sgu.proj (Ws, bs) | (N, N), (N,) | along the sequence, one for all channels; starts at 0 and 1 |
| proj_out (Wo, bo) | (D, F), (D,) | |

dtype: x has the parameters' floating dtype, which is kept (under autocast the residual stream keeps
x's own). gelu is the exact (erf) one. gelu(u) * sgu(v) is one fused call. Source: Liu et al., Pay
Attention to MLPs, arXiv 2105.08050; constructor and names are mlp_utils', which differs from the
paper: there gelu acts on u and v both, and the gate does not multiply its own input.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..check.layer import check_x
from ..ops.gated_act import gated_act
from .parts.activation import build
from .parts.block import build_norm, positive_int, probability, reset_tree

NormLayer = Callable[[int], nn.Module]


def _check_sequence(owner: str, x: Tensor, seq_len: int, dim: int, linear: object) -> None:
    """x is (..., seq_len, dim), in the dtype of `linear` unless that was replaced."""
    if isinstance(x, Tensor) and x.shape[-2:] != (seq_len, dim):
        raise ValueError(
            f"{owner}: x must be (..., {seq_len}, {dim}): seq_len, dim; got {tuple(x.shape)}"
        )
    if type(linear) is nn.Linear:
        check_x(owner, x, dim, linear.weight.dtype)


class SpatialGatingUnit(nn.Module):
    """v * (proj norm(v)), with proj along the sequence: 1 * v at the start.

    Args:
        dim: channels of v.
        seq_len: length N of the sequence; no other is accepted.
        norm_layer: a callable that makes the norm from dim alone.
        canonical_gate: leave out the factor v, as the paper does.
        gate_activation: a module on the gate; None: none.

    Raises ValueError or TypeError for a bad argument, and in forward for an x of another shape or
    dtype.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        norm_layer: NormLayer = nn.LayerNorm,
        canonical_gate: bool = False,
        gate_activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        positive_int("SpatialGatingUnit", "dim", dim)
        positive_int("SpatialGatingUnit", "seq_len", seq_len)
        self.dim, self.seq_len = dim, seq_len
        if not isinstance(gate_activation, nn.Module | None):
            raise TypeError(
                "SpatialGatingUnit: gate_activation must be an nn.Module or None, got "
                f"{gate_activation!r}"
            )
        self.norm = build_norm("SpatialGatingUnit", norm_layer, dim)
        self.proj = nn.Linear(seq_len, seq_len)
        self.gate_activation = gate_activation
        self.canonical_gate = canonical_gate
        self._init_proj()

    def _init_proj(self) -> None:
        nn.init.zeros_(self.proj.weight)
        nn.init.ones_(self.proj.bias)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        for child in self.children():
            reset_tree(self, child)
        self._init_proj()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N, dim) -> (..., N, dim)."""
        _check_sequence("SpatialGatingUnit", x, self.seq_len, self.dim, self.proj)
        gate = self.proj(self.norm(x).mT).mT
        if self.gate_activation is not None:
            gate = self.gate_activation(gate)
        return gate if self.canonical_gate else x * gate

    def extra_repr(self) -> str:
        return f"canonical_gate={self.canonical_gate}"


class GMLPBlock(nn.Module):
    """proj_out(gelu(u) * sgu(v)), where [u | v] = proj_in(x); no norm of x, no residual.

    Args:
        dim: width of x and y.
        dim_ff: width of u and v.
        seq_len: length of the sequence.
        norm_layer, canonical_gate, gate_activation: SpatialGatingUnit's.
        bias: give proj_in and proj_out biases.

    Raises ValueError or TypeError for a bad argument, and in forward for an x of another shape or
    dtype.
    """

    def __init__(
        self,
        dim: int,
        dim_ff: int,
        seq_len: int,
        norm_layer: NormLayer = nn.LayerNorm,
        canonical_gate: bool = False,
        gate_activation: nn.Module | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        positive_int("GMLPBlock", "dim", dim)
        positive_int("GMLPBlock", "dim_ff", dim_ff)
        self.dim, self.seq_len = dim, seq_len
        self.proj_in = nn.Linear(dim, 2 * dim_ff, bias)
        self.sgu = SpatialGatingUnit(dim_ff, seq_len, norm_layer, canonical_gate, gate_activation)
        self.proj_out = nn.Linear(dim_ff, dim, bias)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        for child in self.children():
            reset_tree(self, child)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N, dim) -> (..., N, dim)."""
        _check_sequence("GMLPBlock", x, self.seq_len, self.dim, self.proj_in)
        u, v = self.proj_in(x).chunk(2, -1)
        return self.proj_out(gated_act(u, self.sgu(v), activation="gelu"))

    def path(self) -> str:
        """For explain()."""
        return "one gated_act, 'gelu', between linears in PyTorch"


class GMLP(nn.Module):
    """x = x + block(norm(x)), `depth` times, on sequences of one length.

    Args:
        dim: width of x and y.
        dim_ff: width of u and v; None: 4 dim.
        seq_len: length of the sequence.
        depth: number of blocks.
        norm_layer: a callable that makes a norm from its width alone.
        canonical_gate: the paper's gate, without the factor v.
        gate_activation: a callable that makes a module on the gate of each block, or an
            activation's name; None: none.
        drop_path: probability of leaving a block out for one sequence in training, in [0, 1); a
            block that stays is divided by the probability of staying.
        bias: give proj_in and proj_out biases; the gate along the sequence keeps its own, which
            starts at 1.

    Attribute: `blocks`, of which each is a Sequential of the norm and a GMLPBlock. Linears start
    with nn.Linear's own values, those along the sequence with weight 0 and bias 1: a fresh model
    mixes no tokens.

    Raises ValueError or TypeError for a bad argument, and in forward for an x that is not
    (B, seq_len, dim) or has another dtype.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import GMLP
        >>> GMLP(64, seq_len=8, depth=2)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    def __init__(
        self,
        dim: int,
        dim_ff: int | None = None,
        seq_len: int | None = None,
        depth: int | None = None,
        norm_layer: NormLayer = nn.LayerNorm,
        canonical_gate: bool = False,
        gate_activation: Callable[[], nn.Module] | str | None = None,
        drop_path: float = 0.0,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        positive_int("GMLP", "dim", dim)
        dim_ff = 4 * dim if dim_ff is None else dim_ff
        positive_int("GMLP", "dim_ff", dim_ff)
        # They follow an optional argument, so they have a default; they are required all the same.
        positive_int("GMLP", "seq_len", seq_len)
        positive_int("GMLP", "depth", depth)
        assert seq_len is not None and depth is not None
        probability("GMLP", "drop_path", drop_path)
        self.dim, self.seq_len, self.drop_path = dim, seq_len, drop_path
        gates: list[nn.Module | None] = [None] * depth
        if gate_activation is not None:
            gates = [build("GMLP: gate_activation", gate_activation, False) for _ in gates]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                build_norm("GMLP", norm_layer, dim),
                GMLPBlock(dim, dim_ff, seq_len, norm_layer, canonical_gate, gate, bias=bias),
            )
            for gate in gates
        )

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        for block in self.blocks:
            reset_tree(self, block)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, seq_len, dim) -> (B, seq_len, dim)."""
        if isinstance(x, Tensor) and (x.dim() != 3 or x.shape[1:] != (self.seq_len, self.dim)):
            raise ValueError(
                f"GMLP: x must be (B, {self.seq_len}, {self.dim}): batch, seq_len, dim; "
                f"got {tuple(x.shape)}"
            )
        first = self.blocks[0]._modules.get("1")  # None where a block was wrapped
        _check_sequence("GMLP", x, self.seq_len, self.dim, getattr(first, "proj_in", None))
        for block in self.blocks:
            x = x + self._drop(block(x))
        return x

    def _drop(self, y: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return y
        keep = 1 - self.drop_path
        return y * (y.new_empty(y.shape[0], 1, 1).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"seq_len={self.seq_len}, drop_path={self.drop_path}"
