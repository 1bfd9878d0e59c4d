"""FeedForward: the position-wise block of a transformer, plain or gated.

| glu_variant | y |
|---|---|
| none | act(x W1' + b1) W2' + b2 |
| glu, geglu, swiglu, reglu, bilinear | (v * act(g)) W2' + b2, where [v | g] = x W1' + b1 |
| a name of ACTIVATIONS | the same, or of a gate phi(g) psi(v) in the place of v * act(g) |
| mglu, mgeglu, mswiglu, mreglu, mbilinear | MGLU(x) W2' + b2 and so on: see masked_glu.py |

| tensor | shape | |
|---|---|---|
| x, y | (..., dim) | |
| W1, b1 | (H, dim), (H,); in row 2 (2 H, dim), (2 H,), value half first | H = floor(dim * mult) |
| W2, b2 | (dim, H), (dim,) | |

Dropout acts between the two projections; there is no residual. dtype: x has the parameters'
floating dtype, which is kept (under autocast: the autocast dtype). Source: Shazeer, GLU Variants
Improve Transformer, arXiv 2002.05202; constructor, parameter names and the order of the halves are
mlp_utils'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import check
from ..check.numbers import number
from ..reference.activations import ACTIVATIONS
from ..reference.values import has_values
from .glu import GLU, Bilinear, GeGLU, GLUBase, ReGLU, SwiGLU
from .masked_glu import MGLU, BilinearMGLU, GeMGLU, MaskedGLU, ReMGLU, SwiMGLU
from .parts.activation import build, describe, name_of
from .parts.around import bare, hooked
from .parts.block import (
    build_norm,
    calls,
    check_input,
    gated_block,
    plain_block,
    positive_int,
    reset_others,
)
from .parts.freezing import Freezing
from .parts.widths import Default, Reader, hidden_width

GLU_VARIANTS: dict[str, Callable[[int, int, bool], GLUBase]] = {
    "glu": GLU,
    "geglu": GeGLU,
    "swiglu": SwiGLU,
    "reglu": ReGLU,
    "bilinear": Bilinear,
}
MASKED_VARIANTS: dict[str, Callable[..., MaskedGLU]] = {
    "mglu": MGLU,
    "mgeglu": GeMGLU,
    "mswiglu": SwiMGLU,
    "mreglu": ReMGLU,
    "mbilinear": BilinearMGLU,
}
VARIANTS = ("none", *GLU_VARIANTS, *MASKED_VARIANTS)


class FeedForward(Freezing, Reader):
    """net(pre_norm(x)): two projections with an activation or a gate between them.

    Args:
        dim: width of x and y.
        mult: hidden width over dim; may be fractional. A gated variant is not narrowed for its
            third matrix: it has 1.5 times the parameters.
        hidden: the hidden width itself, in place of mult.
        multiple_of: round mult's hidden width up to a multiple of this. 64 suits every kernel; a
            width that is no multiple of 8 takes slow loads, and the layer's repr says so.
        bias: give both projections biases.
        recompute: save x alone for backward, where the block is one call, and run the first GEMM
            again there.
        dropout: probability of zeroing a hidden value in training, in [0, 1].
        activation: a class, or another callable without arguments, that makes the activation module
            of glu_variant="none", or a name of `fusedmlp.reference.activations.ACTIVATIONS` that
            is no gate. Fused if `fusedmlp` has a kernel for what it makes: one of the
            `modules` in `fusedmlp.reference.activations.ACTIVATIONS`, such as nn.GELU with either
            `approximate`, or a class of `fusedmlp.activations` that has a row there. Any other
            module runs in PyTorch between nn.Linear calls. The layer's repr says which. A gated
            variant brings its own; another one given is not used, and says so in a UserWarning.
        glu_variant: "none", "glu", "geglu", "swiglu", "reglu", "bilinear", or the masked "mglu",
            "mgeglu", "mswiglu", "mreglu", "mbilinear"; or a name of ACTIVATIONS, a gate with
            parameters among them: "swiglu_oai(limit=5.0)". In any case.
        pre_norm: normalise x first.
        norm_layer: a callable that makes the norm from dim alone.
        mask_mode, num_masks: of a masked variant, as in MaskedGLU.

    Attributes: `net`, a Sequential of [Linear, activation, Dropout, Linear] or [GLU layer, Dropout,
    Linear]; `proj`, its first Linear; `pre_norm`, the norm or None; `glu_variant`, in lower case.
    load_state_dict takes mlp_utils' checkpoints, which hold `proj` a second time under that name.
    Every Linear starts with Kaiming-normal weights (fan-in, relu) and zero bias.

    The modules in `net` hold parameters and settings; forward reads them and does not call them
    (dropout excepted, where it is active). Where a hook stands on one of them, all are called.

    Raises ValueError or TypeError for a bad argument, and TypeError in forward if a Linear in `net`
    was replaced by something that computes something else.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import FeedForward
        >>> block = FeedForward(64, mult=8 / 3, multiple_of=64, glu_variant="swiglu", bias=False)
        >>> block(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    def __init__(
        self,
        dim: int,
        mult: float = Default(4),
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] | str = nn.GELU,
        glu_variant: str = "none",
        pre_norm: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.RMSNorm,
        *,
        mask_mode: str = "channel",
        num_masks: int = 1,
        hidden: int | None = None,
        multiple_of: int | None = None,
        bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        positive_int("FeedForward", "dim", dim)
        hidden = hidden_width("FeedForward", dim, "mult", mult, hidden, multiple_of)
        number("FeedForward", "dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"FeedForward: dropout must be in [0, 1], got {dropout}")
        self.glu_variant = _variant(glu_variant)
        self.pre_norm = build_norm("FeedForward", norm_layer, dim) if pre_norm else None
        positive_int("FeedForward", "num_masks", num_masks)
        if self.glu_variant not in MASKED_VARIANTS and (mask_mode, num_masks) != ("channel", 1):
            raise ValueError(
                "FeedForward: mask_mode and num_masks must be left alone without a masked "
                f"glu_variant, got {mask_mode!r} and {num_masks!r} with {self.glu_variant!r}"
            )
        first: list[nn.Module]
        if self.glu_variant == "none":
            first = [
                nn.Linear(dim, hidden, bias),
                build("FeedForward: activation", activation, False),
            ]
        else:
            masks = (mask_mode, num_masks)
            first = [_gated(self.glu_variant, dim, hidden, bias, *masks)]
            if activation is not nn.GELU:
                warnings.warn(
                    f"FeedForward: activation {activation!r} is not used, because glu_variant "
                    f"{self.glu_variant!r} has its own",
                    stacklevel=2,
                )
        self.net = nn.Sequential(*first, nn.Dropout(dropout), nn.Linear(hidden, dim, bias))
        self.recompute = recompute
        self._check_recompute(recompute)
        self._init_linears()
        self.register_load_state_dict_pre_hook(drop_aliases)

    @property
    def proj(self) -> nn.Linear:
        """The first projection, (H, dim) or gated (2 H, dim): a property, so no state_dict key."""
        first = self.net[0]
        return first.proj if isinstance(first, GLUBase | MaskedGLU) else first  # type: ignore[return-value]

    def _init_linears(self) -> None:
        for linear in (self.proj, cast(nn.Linear, self.net[-1])):
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta.

        A norm or an activation with parameters is reset by its own `reset_parameters`; raises
        TypeError if it has none.
        """
        self._init_linears()
        reset_others(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        check_input("FeedForward", x, self.proj)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        if self.glu_variant == "none":
            first, act, dropout, second = self.net
            activation = name_of(act)
            if activation is None or not bare(self.net, first, act, dropout, second):
                return self.net(x)
            options: Any = {"activation": activation, "recompute": self.recompute}
            return plain_block(self, x, first, second, dropout, **options)
        glu: Any
        glu, dropout, second = self.net
        if not bare(self.net, glu, glu.proj, glu.activation, dropout, second):
            return self.net(x)  # the GLU layer checks x
        if isinstance(glu, MaskedGLU):
            return glu.block(x, dropout, second, self.recompute)
        activation = name_of(glu.activation)
        if activation is None:
            return self.net(x)
        options = {"activation": activation, "recompute": self.recompute}
        return gated_block(self, x, glu.proj, None, second, dropout, packed="up_gate", **options)

    def path(self) -> str:
        """For explain(): the calls that the block makes as it is now."""
        glu: Any
        glu, *plain, dropout, second = self.net
        act = plain[0] if plain else glu.activation
        inner = (act,) if plain else (glu.proj, act)
        for module in (self.net, glu, *inner, dropout, second):
            if around := hooked(module):
                return f"its modules one by one, since {type(module).__name__} {around}"
        if isinstance(glu, MaskedGLU):
            if glu.mask_mode == "channel":
                return f"{glu.path()}, linears too"
            what = f"{name_of(act)!r}, {glu.described_masks()}"
            return calls(dropout, "masked_gated_mlp", "masked_gated_linear", what)
        if name_of(act) is None:
            return describe(act)
        if plain:
            return calls(dropout, "mlp", "linear_act", describe(act))
        return calls(dropout, "gated_mlp", "gated_linear", repr(name_of(act)))

    def _reads(self) -> Iterator[tuple[str, Tensor | int]]:
        first: Any = self.net[0]
        act = self.net[1] if self.glu_variant == "none" else first.activation
        channels = isinstance(first, MaskedGLU) and first.mask_mode == "channel"
        return iter(()) if channels or name_of(act) is None else super()._reads()

    def extra_repr(self) -> str:
        own = "recompute=True" if self.recompute else ""
        # A GLU layer speaks for itself.
        return self._noted(describe(self.net[1]), own) if self.glu_variant == "none" else own


def drop_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """mlp_utils registers the first projection twice: leave out of `state` what its `proj` repeats.

    A `proj` that differs from what it repeats stays, and is reported as unexpected.
    """
    gated = isinstance(cast(FeedForward, module).net[0], GLUBase | MaskedGLU)
    for leaf in ("weight", "bias"):
        alias = f"{prefix}proj.{leaf}"
        own = f"{prefix}net.0.proj.{leaf}" if gated else f"{prefix}net.0.{leaf}"
        if alias in state and own in state and _same(state[alias], state[own]):
            del state[alias]


def _same(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return not has_values(a) or torch.equal(a, b)


def _variant(glu_variant: str) -> str:
    """glu_variant in lower case, if it is one that this version has."""
    if not isinstance(glu_variant, str):
        raise TypeError(f"FeedForward: glu_variant must be a str, got {glu_variant!r}")
    name = glu_variant.lower()
    if name in VARIANTS:
        return name
    if name.partition("(")[0] in ACTIVATIONS:
        check.activation("FeedForward", name, called="glu_variant")
        return name
    raise ValueError(
        f"FeedForward: Unknown GLU variant: {name}; glu_variant must be one of "
        f"{', '.join(VARIANTS)}, or the name of an activation or a gate: {', '.join(ACTIVATIONS)}"
    )


def _gated(
    variant: str, dim: int, hidden: int, bias: bool, mask_mode: str, num_masks: int
) -> nn.Module:
    if variant in MASKED_VARIANTS:
        # With masks over elements there is no bias, and True is refused.
        own = None if bias else False
        return MASKED_VARIANTS[variant](dim, hidden, own, mask_mode=mask_mode, num_masks=num_masks)
    if variant in GLU_VARIANTS:
        return GLU_VARIANTS[variant](dim, hidden, bias)
    return GLUBase(dim, hidden, variant, bias)
