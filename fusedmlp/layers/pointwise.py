"""PointwiseMLP: channel mixing, the same two-layer MLP at every position of a channels-last tensor.

| activation | y |
|---|---|
| relu, gelu, silu | W2 drop(act(W1 x)) |
| glu, swiglu | W2 drop(act(a) * b), where [a, b] = W1 x; act is sigmoid, silu |

| tensor | shape | |
|---|---|---|
| x, y | (B, *spatial, C) | C = dim; any number of leading dimensions |
| W1 = layer1.weight | (H, C); gated (2 H, C) | H = floor(expansion_factor * C) |
| W2 = layer2.weight | (C, H) | |
| biases | (H,) or (2 H,), (C,) | if bias=True |

gelu is the exact (erf) one. dtype: x has the parameters' floating dtype, which is kept (under
autocast: the autocast dtype). Parameter names and arguments are those of nvSubquadratic's MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

from torch import Tensor, nn

from .. import reference
from ..packing import Packed
from ..reference.activations import resolve
from .parts.block import (
    block_path,
    check_input,
    gated_block,
    plain_block,
    positive_int,
    reset_others,
)
from .parts.config import ModuleConfig, build_module
from .parts.widths import Default, Reader, hidden_width

PointwiseActivation = Literal["relu", "gelu", "silu", "glu", "swiglu"]
Backend = Literal["torch", "fused"]
GluOrder = Literal["gate_first", "torch"]
InitMethod = Callable[[int], Callable[[Tensor], object]]

_GATES = {"glu": "sigmoid", "swiglu": "silu"}


class PointwiseMLP(Reader):
    """layer2(dropout(act(layer1(x)))), or gated: layer2(dropout(act(a) * b)), [a, b] = layer1(x).

    Args:
        dim: channels C of x and y.
        activation: "relu", "gelu", "silu", "glu" or "swiglu". The last two are gated: layer1 is
            twice as wide, so at one expansion_factor they have 3 C H weights where the others have
            2 C H.
        dropout_cfg: what stands between the activation and layer2: None (nothing), an nn.Module, a
            class, a mapping with `__target__` (dotted path) and keyword arguments, or a
            LazyConfig-like builder. A config is code: resolving it imports and calls what it names.
        expansion_factor: H = floor(expansion_factor * dim).
        bias: give both layers a bias.
        backend: "torch" calls layer1 and layer2 and runs everywhere. "fused" computes the same
            function with fusedmlp's kernels (on CPU tensors: their PyTorch reference), whose dtypes
            on a GPU are bfloat16, float16 and float32; it has no further constraint: any width,
            bias or activation of the list, dropout active or not.
        init_method_in: curried initialiser of layer1.weight, called as
            f(layer1.out_features)(weight), in place. None: nn.Linear's own.
        init_method_out: the same for layer2.weight, called with dim.
        glu_order: which half of layer1 gates "glu": "gate_first", sigmoid(a) * b, as the
            documentation of this layer has it; "torch", a * sigmoid(b), as F.glu has it, for
            checkpoints of code that calls F.glu. Swiglu is silu(a) * b in either code and takes
            "gate_first" only.
        hidden: H itself, in place of expansion_factor.
        multiple_of: round expansion_factor's H up to a multiple of this; 64 suits every kernel.
        recompute: save x alone for backward, where the block is one call, and run the first GEMM
            again there.

    Biases start at zero, with or without an initialiser. Attributes: layer1, dropout, layer2,
    hidden_dim, activation, is_glu_variant, backend, glu_order. Backend "fused" reads the parameters
    of layer1 and layer2 without calling them, unless a hook stands on one; a replacement of either
    that is no nn.Linear raises TypeError.

    Raises ValueError or TypeError for a bad argument, at construction, and in forward for an x of
    another width or dtype.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import PointwiseMLP
        >>> layer = PointwiseMLP(64, "swiglu", expansion_factor=2.0, backend="fused")
        >>> layer(torch.randn(2, 4, 4, 64)).shape  # channels last
        torch.Size([2, 4, 4, 64])
    """

    def __init__(
        self,
        dim: int,
        activation: PointwiseActivation,
        dropout_cfg: ModuleConfig = None,
        expansion_factor: float = Default(2.0),
        bias: bool = False,
        backend: Backend = "torch",
        init_method_in: InitMethod | None = None,
        init_method_out: InitMethod | None = None,
        glu_order: GluOrder = "gate_first",
        *,
        hidden: int | None = None,
        multiple_of: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        positive_int("PointwiseMLP", "dim", dim)
        _check_choices(activation, backend, glu_order)
        self.hidden_dim = hidden_width(
            "PointwiseMLP", dim, "expansion_factor", expansion_factor, hidden, multiple_of
        )
        self.activation = activation
        self.is_glu_variant = activation in _GATES
        self.backend = backend
        self.glu_order = glu_order
        self.layer1 = nn.Linear(dim, self.hidden_dim * (2 if self.is_glu_variant else 1), bias)
        self.dropout = build_module("PointwiseMLP: dropout_cfg", dropout_cfg)
        self.layer2 = nn.Linear(self.hidden_dim, dim, bias)
        self._init_methods = (_kept(init_method_in), _kept(init_method_out))
        self.recompute = recompute
        self._check_recompute(recompute)
        self._init_layers()

    def _init_layers(self) -> None:
        for layer, init_method in zip((self.layer1, self.layer2), self._init_methods, strict=True):
            if init_method is not None:
                init_method(layer.out_features)(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta.

        A dropout module with parameters is reset by its own `reset_parameters`; raises TypeError if
        it has none. Raises RuntimeError on a layer that had initialisers and was pickled, because
        they stay behind.
        """
        self.layer1.reset_parameters()
        self.layer2.reset_parameters()
        self._init_layers()
        reset_others(self)

    def flop_count(self, num_tokens: int) -> int:
        """FLOPs of one forward on num_tokens positions.

        2 T in out for each layer, T H for the activation and T H for the product of a gated one;
        biases and dropout count nothing.
        """
        first, second = self.layer1, self.layer2
        elementwise = (2 if self.is_glu_variant else 1) * self.hidden_dim
        return num_tokens * (
            2 * first.in_features * first.out_features
            + elementwise
            + 2 * second.in_features * second.out_features
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, *spatial, C) -> (B, *spatial, C)."""
        check_input("PointwiseMLP", x, self.layer1)
        if not self.is_glu_variant:
            if self.backend == "fused":
                return plain_block(
                    self, x, self.layer1, self.layer2, self.dropout,
                    activation=self.activation, recompute=self.recompute,
                )  # fmt: skip
            h = resolve(self.activation).phi(self.layer1(x))
            return self.layer2(self.dropout(h))
        gate = _GATES[self.activation]
        packed: Packed = "gate_up" if self.glu_order == "gate_first" else "up_gate"
        if self.backend == "fused":
            return gated_block(
                self,
                x,
                self.layer1,
                None,
                self.layer2,
                self.dropout,
                activation=gate,
                packed=packed,
                recompute=self.recompute,
            )
        return self.layer2(self.dropout(reference.gated_act(self.layer1(x), None, gate, packed)))

    def path(self) -> str:
        """For explain()."""
        if self.backend == "torch":
            return f"every call in PyTorch, {self.activation!r}: backend='torch'"
        gate = _GATES.get(self.activation)
        return block_path(self.dropout, activation=gate or self.activation, gated=bool(gate))

    def extra_repr(self) -> str:
        order = f", glu_order={self.glu_order!r}" if self.activation == "glu" else ""
        order += ", recompute=True" if self.recompute else ""
        return self._noted(f"activation={self.activation!r}, backend={self.backend!r}{order}")

    def _reads(self) -> Iterator[tuple[str, Tensor | int]]:
        return super()._reads() if self.backend == "fused" else iter(())


MLP = PointwiseMLP


class _Kept:
    """An initialiser in a layer's state: usually a closure, which pickle refuses: left behind."""

    def __init__(self, init_method: InitMethod) -> None:
        self.init_method = init_method

    def __call__(self, features: int) -> Callable[[Tensor], object]:
        return self.init_method(features)

    def __deepcopy__(self, memo: object) -> _Kept:
        return self

    def __reduce__(self) -> tuple[type[_Kept], tuple[InitMethod]]:
        return _Kept, (_left_behind,)


def _kept(init_method: InitMethod | None) -> _Kept | None:
    return None if init_method is None else _Kept(init_method)


def _left_behind(features: int) -> Callable[[Tensor], object]:
    raise RuntimeError(
        "PointwiseMLP: init_method_in and init_method_out must be given to a new layer, got a "
        "layer that was pickled, without its initialisers"
    )


def _check_choices(activation: str, backend: str, glu_order: str) -> None:
    if activation not in get_args(PointwiseActivation):
        raise ValueError(
            f"PointwiseMLP: activation must be one of {', '.join(get_args(PointwiseActivation))}, "
            f"got {activation!r}"
        )
    if backend not in get_args(Backend):
        raise ValueError(
            f'PointwiseMLP: backend must be "torch" or "fused", got {backend!r}; '
            'use backend="fused", which is what quack promised'
        )
    if glu_order not in get_args(GluOrder):
        raise ValueError(
            f'PointwiseMLP: glu_order must be "gate_first" or "torch", got {glu_order!r}'
        )
    if glu_order == "torch" and activation != "glu":
        raise ValueError(
            'PointwiseMLP: glu_order must be "gate_first" unless activation is "glu", '
            f'got "torch" with activation {activation!r}'
        )
