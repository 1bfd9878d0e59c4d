"""GatingMechanism: gate values from a bottleneck MLP, for the caller to multiply by.

    gate(x) = sigmoid(drop(act(norm(x W1' + b1))) W2' + b2)

| tensor | shape | |
|---|---|---|
| x | (..., input_dim) | |
| W1, b1 | (B, input_dim), (B,) | B = bottleneck_dim or floor(input_dim * bottleneck_factor) |
| W2, b2 | (output_dim, B), (output_dim,) | |
| gate(x) | (..., output_dim) | in (0, 1) with the sigmoid |

dtype: x has the parameters' floating dtype, which is kept (under autocast: the autocast dtype).
Constructor, names and initial values are mlp_utils'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from .init_weights import initialize_weights
from .parts.activation import build
from .parts.block import (
    build_norm,
    check_input,
    positive_int,
    probability,
    reset_others,
)
from .parts.sequential import FusedSequential, first_two
from .parts.widths import hidden_width


class GatingMechanism(nn.Module):
    """Gate values in (0, 1), near sigmoid(1) = 0.73 at the start. x is not multiplied.

    Args:
        input_dim: width of x.
        output_dim: width of the gate; None: input_dim.
        bottleneck_factor, bottleneck_dim: the width between the two linears, as a share of
            input_dim or itself; exactly one of them.
        dropout: probability of zeroing a bottleneck value in training, in [0, 1); at 0 there is no
            dropout module.
        act_fn: an activation module, or a class or other callable that makes it without arguments,
            or a name of `fusedmlp.reference.activations.ACTIVATIONS` that is no gate.
        use_norm: normalise the bottleneck, before act_fn, or x with pre_norm.
        norm_layer: a callable that makes the norm from its width alone.
        sigmoid_output: without it the gate is the second linear's output.
        pre_norm: normalise x instead of the bottleneck. act_fn is then fused with the first linear,
            if `fusedmlp` has a kernel for it; otherwise the sigmoid is with the second.
        multiple_of: round bottleneck_factor's width up to a multiple of this; 64 suits every
            kernel. Not together with bottleneck_dim.
        bias: give both linears biases.
        recompute: save the first linear's input alone for backward, where both linears are one
            call, and run the first again there.

    Attribute: `gate`, a Sequential in the order of the equation. Weights start Xavier-uniform with
    gain 0.1 and every bias at 1. A child of `gate` with hooks is called, not fused.

    Raises AssertionError unless one of the two bottleneck arguments is given, and ValueError or
    TypeError for a bad argument, and in forward for an x of another width or dtype.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import GatingMechanism
        >>> gate = GatingMechanism(64, bottleneck_factor=0.25).eval()
        >>> values = gate(torch.randn(2, 8, 64))
        >>> bool(values.min() > 0 and values.max() < 1)
        True
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int | None = None,
        bottleneck_factor: float | None = None,
        bottleneck_dim: int | None = None,
        dropout: float = 0.1,
        act_fn: nn.Module | Callable[[], nn.Module] | str = nn.GELU,
        use_norm: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.RMSNorm,
        sigmoid_output: bool = True,
        pre_norm: bool = False,
        *,
        multiple_of: int | None = None,
        bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        positive_int("GatingMechanism", "input_dim", input_dim)
        output_dim = input_dim if output_dim is None else output_dim
        positive_int("GatingMechanism", "output_dim", output_dim)
        bottleneck = _bottleneck(input_dim, bottleneck_factor, bottleneck_dim, multiple_of)
        probability("GatingMechanism", "dropout", dropout)
        norm = functools.partial(build_norm, "GatingMechanism", norm_layer)
        layers = [
            norm(input_dim) if use_norm and pre_norm else None,
            nn.Linear(input_dim, bottleneck, bias),
            norm(bottleneck) if use_norm and not pre_norm else None,
            build("GatingMechanism: act_fn", act_fn),
            nn.Dropout(dropout) if dropout > 0 else None,
            nn.Linear(bottleneck, output_dim, bias),
            nn.Sigmoid() if sigmoid_output else None,
        ]
        self.gate = FusedSequential(*(layer for layer in layers if layer is not None))
        if recompute:
            self.gate.recomputing("GatingMechanism")
        self._init_children()

    def _init_children(self) -> None:
        for child in self.gate:
            initialize_weights(child, "gating")

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta.

        A norm or an activation with parameters is reset by its own `reset_parameters`; raises
        TypeError if it has none.
        """
        reset_others(self)
        self._init_children()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., input_dim) -> (..., output_dim)."""
        check_input("GatingMechanism", x, *first_two(self.gate))
        return self.gate(x)


def _bottleneck(
    input_dim: int, factor: float | None, dim: int | None, multiple_of: int | None
) -> int:
    if (factor is None) == (dim is None):
        # mlp_utils' own type of error, which its users test for.
        raise AssertionError(
            "GatingMechanism: exactly one of bottleneck_factor and bottleneck_dim must be given, "
            f"got bottleneck_factor={factor} and bottleneck_dim={dim}"
        )
    if dim is None:
        assert factor is not None
        return hidden_width(
            "GatingMechanism", input_dim, "bottleneck_factor", factor, multiple_of=multiple_of
        )
    if multiple_of is not None:
        positive_int("GatingMechanism", "multiple_of", multiple_of)
        raise ValueError(
            "GatingMechanism: bottleneck_dim and multiple_of must not be given together, since "
            f"either sets the width, got bottleneck_dim={dim!r} and multiple_of={multiple_of!r}; "
            "leave one out"
        )
    positive_int("GatingMechanism", "bottleneck_dim", dim)
    return dim
