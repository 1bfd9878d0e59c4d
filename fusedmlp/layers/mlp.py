"""MLP: two linears with norms around the activation, of any widths.

| norm_mode | y |
|---|---|
| none | drop(act(x W1' + b1)) W2' + b2 |
| post | norm(drop(act(norm(x W1' + b1))) W2' + b2) |
| pre | norm(drop(act(norm(x) W1' + b1)) W2' + b2) |
| both | norm(drop(act(norm(norm(x) W1' + b1))) W2' + b2) |

| tensor | shape | |
|---|---|---|
| x | (..., input_dim) | |
| W1, b1 | (H, input_dim), (H,) | H = floor(input_dim * hidden_factor) |
| W2, b2 | (output_dim, H), (output_dim,) | |
| y | (..., output_dim) | x is added with residual=True |

dtype: x has the parameters' floating dtype, which is kept (under autocast: the autocast dtype, if
the norms keep it). Constructor, names and the norm of the output are mlp_utils'.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Literal, cast, get_args

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
from .parts.widths import Default, hidden_width
from .residual import ResidualWrapper

NormMode = Literal["pre", "post", "both", "none"]


class MLP(nn.Module):
    """y = act(x W1' + b1) W2' + b2, with norms where `norm_mode` says, and dropout after act.

    Args:
        input_dim: width of x.
        output_dim: width of y; None: input_dim.
        hidden_factor: hidden width over input_dim; may be fractional.
        dropout: probability of zeroing a hidden value in training, in [0, 1); at 0 there is no
            dropout module.
        act_fn: an activation module, or a class or other callable that makes it without arguments.
            Or a name of `fusedmlp.reference.activations.ACTIVATIONS` that is no gate.
            Fused with the first linear if `fusedmlp` has a kernel for it and no norm stands between
            them (norm_mode "pre" or "none"); the repr of `model` says what runs as one call.
        use_norm: False is norm_mode="none".
        norm_layer: a callable that makes a norm from its width alone.
        residual: add x to y, by a ResidualWrapper; needs input_dim == output_dim, else it is not
            added, and a UserWarning says so.
        pre_norm: True is norm_mode="pre"; False leaves it to the others.
        norm_mode: "pre" normalises x, "post" what act takes, "both" both, "none" nothing; None:
            what use_norm and pre_norm say, "post" by default.
        output_norm: normalise y too, unless norm_mode is "none".
        hidden: the hidden width itself, in place of hidden_factor.
        multiple_of: round hidden_factor's hidden width up to a multiple of this; 64 suits every
            kernel.
        bias: give both linears biases.
        recompute: save the first linear's input alone for backward, where both linears are one
            call, and run the first again there.

    Attributes: `model`, a Sequential in the order of the equation, or a ResidualWrapper of it;
    `input_dim`, `output_dim`, `norm_mode`. Every Linear starts with Kaiming-normal weights (fan-in,
    relu) and zero bias. A child of `model` with hooks is called, not fused.

    Raises ValueError or TypeError for a bad argument, and in forward for an x of another width or
    dtype.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import MLP
        >>> MLP(64, 32, act_fn=torch.nn.SiLU, norm_mode="pre")(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 32])
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int | None = None,
        hidden_factor: float = Default(4),
        dropout: float = 0.1,
        act_fn: nn.Module | Callable[[], nn.Module] | str = nn.GELU,
        use_norm: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.RMSNorm,
        residual: bool = False,
        pre_norm: bool = False,
        norm_mode: NormMode | None = None,
        output_norm: bool = True,
        *,
        hidden: int | None = None,
        multiple_of: int | None = None,
        bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        positive_int("MLP", "input_dim", input_dim)
        output_dim = input_dim if output_dim is None else output_dim
        positive_int("MLP", "output_dim", output_dim)
        if isinstance(hidden_factor, int | float) and hidden_factor <= 0:
            raise ValueError(f"MLP: hidden_factor must be positive, got {hidden_factor}")
        hidden = hidden_width("MLP", input_dim, "hidden_factor", hidden_factor, hidden, multiple_of)
        probability("MLP", "dropout", dropout)
        self.input_dim, self.output_dim = input_dim, output_dim
        self.norm_mode = mode = _norm_mode(norm_mode, use_norm, pre_norm)
        norm = functools.partial(build_norm, "MLP", norm_layer)
        layers = [
            norm(input_dim) if mode in ("pre", "both") else None,
            nn.Linear(input_dim, hidden, bias),
            norm(hidden) if mode in ("post", "both") else None,
            build("MLP: act_fn", act_fn),
            nn.Dropout(dropout) if dropout > 0 else None,
            nn.Linear(hidden, output_dim, bias),
            norm(output_dim) if output_norm and mode != "none" else None,
        ]
        net = FusedSequential(*(layer for layer in layers if layer is not None))
        if recompute:
            net.recomputing("MLP")
        self.model = self._wrapped(net) if residual else net
        self._init_children()

    def _wrapped(self, net: FusedSequential) -> nn.Module:
        if self.input_dim == self.output_dim:
            return ResidualWrapper(net)
        warnings.warn(
            f"MLP: residual=True is not used, because input_dim {self.input_dim} and output_dim "
            f"{self.output_dim} differ",
            stacklevel=3,
        )
        return net

    @property
    def _net(self) -> FusedSequential:
        wrapped = isinstance(self.model, ResidualWrapper)
        return cast(FusedSequential, self.model.module if wrapped else self.model)

    def _init_children(self) -> None:
        for child in self._net:
            initialize_weights(child)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta.

        A norm or an activation with parameters is reset by its own `reset_parameters`; raises
        TypeError if it has none.
        """
        reset_others(self)
        self._init_children()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., input_dim) -> (..., output_dim)."""
        check_input("MLP", x, *first_two(self._net))
        return self.model(x)


def _norm_mode(norm_mode: NormMode | None, use_norm: bool, pre_norm: bool) -> NormMode:
    if norm_mode is None:
        if not use_norm:
            return "none"
        return "pre" if pre_norm else "post"
    if norm_mode not in get_args(NormMode):
        modes = ", ".join(get_args(NormMode))
        raise ValueError(f"MLP: norm_mode must be None or one of {modes}; got {norm_mode!r}")
    if (not use_norm and norm_mode != "none") or (pre_norm and norm_mode not in ("pre", "both")):
        raise ValueError(
            "MLP: norm_mode must agree with use_norm and pre_norm, got "
            f"norm_mode={norm_mode!r}, use_norm={use_norm}, pre_norm={pre_norm}"
        )
    return norm_mode
