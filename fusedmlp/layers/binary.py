"""Layers of one-bit weights: trained on latent weights, then packed.

| class | y | with |
|---|---|---|
| BinaryLinear | x w' + b | w = scale * sign(v) of the latent weight v, or packed |
| BinaryGatedMLP | down(act(gate(x)) * up(x)) | three BinaryLinears |

| tensor | shape | |
|---|---|---|
| x | (..., D) | D a multiple of 128 unless padded, and so H of a BinaryGatedMLP |
| weight v | (H, D) | until `pack()` |
| packed | BinaryWeight (H, D) | from `pack()` on |
| bias | (H,) | or None |

In training scale = mean |v| of 128 neighbours of a row, rounded to float16 as it will be packed;
sign(0) = 1. The gradient passes sign and rounding straight through: dv = scale * dw, where `clip`
is given only for |v| <= clip, plus, unless `detach_scale`, that of mean |v|. Packed and latent
weights are the same numbers, so packing changes no result but by the order of sums, and in bfloat16
by the rounding of scales, which a packed weight keeps in float16. Scales are
float16 in training too: a mean |v| below 3e-8 is 0 there, and one above 65504 makes y NaN. forward
does not look, which would wait for the GPU; `pack()` does, and warns or raises.

dtype: x has the parameters' floating dtype, which is kept (under autocast: the autocast dtype).
Sources: Rastegari et al., XNOR-Net, arXiv 1603.05279 (scale and straight-through gradient); Q1_0 of
llama.cpp and Bonsai (format). How Bonsai was trained is not published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import check
from ..check.layer import check_x
from ..invariance import invariant
from ..ops.binary_gated_mlp import binary_gated_mlp
from ..ops.binary_linear import binary_linear
from ..ops.gated_act import gated_act
from ..ops.gated_mlp import gated_mlp
from ..reference.binary import GROUP, binary_scales
from ..reference.lora import Adapter, Lora
from ..weights.binary import BinaryWeight, quantize_binary
from .parts.activation import name_of
from .parts.around import bare, hooked
from .parts.block import positive_int
from .parts.widths import Reader


def binarized(v: Tensor, clip: float | None = None, detach_scale: bool = False) -> Tensor:
    """scale * sign(v) with a straight-through gradient; see the file."""
    exact = binary_scales(v.detach() if detach_scale else v)
    # The differences are 0 wherever anything is finite; they carry the gradients.
    scales = (exact.detach().half().to(exact.dtype) + (exact - exact.detach())).to(v.dtype)
    passing = v if clip is None else v * (v.detach().abs() <= clip)
    signs = torch.where(v.detach() >= 0, 1.0, -1.0).to(v.dtype) + (passing - passing.detach())
    return signs * scales.repeat_interleave(GROUP, 1)[:, : v.shape[1]]


class BinaryLinear(nn.Module):
    """y = x w' + b with w = scale * sign(v): trained on the latent weight v, then packed.

    The scale is the mean |v| of 128 neighbours of a row, in float16; the gradient passes the sign
    straight through. x is (..., in_features), y (..., out_features) in x's dtype.

    Args:
        in_features: a multiple of 128, or any with `pad`.
        out_features: any.
        bias: whether to add one; Q1_0 models have none.
        clip: latent weights larger than this get no gradient through their sign; None: all do.
        detach_scale: treat the scales as constants in backward.
        pad: let the last group of a row have fewer weights than the 128 that it is stored as.

    `weight` starts with nn.Linear's own initialisation. Raises ValueError or TypeError for a bad
    argument.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import BinaryLinear
        >>> layer, x = BinaryLinear(128, 64), torch.randn(4, 128)
        >>> y = layer(x)
        >>> torch.allclose(layer.pack()(x), y, rtol=1e-3, atol=1e-3)
        True
        >>> list(layer.parameters())
        []
    """

    weight: nn.Parameter
    packed: BinaryWeight | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        clip: float | None = None,
        detach_scale: bool = False,
        pad: bool = False,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        positive_int(owner, "in_features", in_features)
        positive_int(owner, "out_features", out_features)
        if in_features % GROUP and not pad:
            raise ValueError(
                f"{owner}: in_features must be a multiple of {GROUP}, got {in_features}; pad=True "
                "pads the last group of each row"
            )
        kind = isinstance(clip, int | float) and not isinstance(clip, bool)
        if clip is not None and not (kind and clip > 0):
            raise ValueError(f"{owner}: clip must be None or positive, got {clip!r}")
        self.in_features, self.out_features = in_features, out_features
        self.clip, self.detach_scale, self.pad = clip, detach_scale, pad
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.packed = None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> BinaryLinear:
        """A layer whose latent weight and bias are copies of those of `linear`; options: clip,
        detach_scale and pad."""
        layer = cls._like(linear, **options)
        layer.weight = nn.Parameter(linear.weight.detach().clone())
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer.train(linear.training)

    @classmethod
    def packing(cls, linear: nn.Linear, *, pad: bool = False) -> BinaryLinear:
        """A packed layer of `linear`, whose bias it shares; no latent copy is made."""
        layer = cls._like(linear, pad=pad)
        layer.bias = linear.bias
        layer._set(quantize_binary(linear.weight, pad=pad))
        return layer.train(linear.training)

    @classmethod
    def from_packed(cls, w: BinaryWeight, bias: Tensor | None = None) -> BinaryLinear:
        """A packed layer, of the tensors of a file say. Raises TypeError for another type,
        ValueError for a bias of another shape than (H,)."""
        if not isinstance(w, BinaryWeight):
            raise TypeError(f"{cls.__name__}: w must be a BinaryWeight, got {type(w).__name__}")
        H, D = w.shape
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"{cls.__name__}: bias must be a Tensor, got {type(bias).__name__}")
        if bias is not None and bias.shape != (H,):
            got = tuple(bias.shape)
            raise ValueError(f"{cls.__name__}: bias must have shape ({H},), got {got}")
        with torch.device("meta"):
            layer = cls(D, H, pad=True)
        layer.bias = None if bias is None else nn.Parameter(bias)
        layer._set(w)
        return layer

    @classmethod
    def _like(cls, linear: nn.Linear, **options: Any) -> BinaryLinear:
        if type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                f"{cls.__name__}: linear must be a plain nn.Linear, got {type(linear).__name__}; "
                "merge an adapter first"
            )
        with torch.device("meta"):
            return cls(linear.in_features, linear.out_features, **options)

    @property
    def qweight(self) -> Tensor:
        """The bits of a packed layer, by the name that PEFT asks quantised layers for, to see where
        they lie. Raises AttributeError before `pack()`."""
        packed: Any = self.packed  # None has none
        return packed.qweight

    def reset_parameters(self) -> None:
        """nn.Linear's initial values. Raises RuntimeError once packed."""
        if self.packed is not None:
            raise RuntimeError(f"{type(self).__name__}: a packed layer has no initial values")
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        self.reset_parameters()

    def pack(self) -> BinaryLinear:
        """Replace the latent weight by bits and float16 scales, for good; returns the layer. A
        packed layer's state_dict loads into one that was packed before.

        Raises RuntimeError where it is packed already, ValueError as `quantize_binary` does.
        """
        self._set(self._rounded())
        return self

    def _rounded(self) -> BinaryWeight:
        if self.packed is not None:
            raise RuntimeError(
                f"{type(self).__name__}: pack() needs a latent weight, got a packed one"
            )
        return quantize_binary(self.weight, pad=self.pad)

    def _set(self, w: BinaryWeight) -> None:
        self.packed = w
        del self.weight

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        packed, latent = f"{prefix}packed.qweight" in state_dict, f"{prefix}weight" in state_dict
        name = prefix.removesuffix(".") or type(self).__name__
        if packed and not latent and self.packed is None:
            error_msgs.append(
                f"{name}: the state_dict has a packed weight and the layer a latent one: pack "
                "first, by pack() of the layer or of what holds it, then load the state_dict"
            )
        if latent and not packed and self.packed is not None:
            error_msgs.append(
                f"{name}: the state_dict has a latent weight and the layer a packed one: load "
                "into a layer that is not packed, then pack by pack()"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def binarized(self) -> Tensor:
        """The weight that multiplies in training, scale * sign. Raises RuntimeError once packed."""
        if self.packed is not None:
            raise RuntimeError(
                f"{type(self).__name__}: binarized() needs a latent weight, got a packed one"
            )
        return binarized(self.weight, self.clip, self.detach_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if self.packed is not None:
            return binary_linear(x, self.packed, self.bias)
        check_x(type(self).__name__, x, self.in_features, self.weight.dtype)
        return F.linear(x, self.binarized(), self.bias)

    def path(self) -> str:
        """For explain(): true of a layer whose weight a BinaryGatedMLP reads, too."""
        if self.packed is not None:
            return "packed weight, read by a binary op"
        return "latent weight, binarized in PyTorch at each call"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, packed={self.packed is not None}"
        )


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Projection(NamedTuple):
    """What a BinaryGatedMLP reads of a projection: a BinaryLinear, the bias, an adapter."""

    linear: BinaryLinear
    bias: Tensor | None
    adapter: Adapter | None = None


class BinaryGatedMLP(Reader):
    """y = down_proj(act(gate_proj(x)) * up_proj(x)), where each projection is a BinaryLinear.

    Args:
        dim: width of x, a multiple of 128, or any with `pad`.
        hidden: width between, likewise.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md.
        bias, clip, detach_scale, pad: of each projection, as in BinaryLinear.
        recompute: save x alone for backward, where the block is one call, and run the first GEMM
            again there.

    The three are packed all or none. Raises ValueError or TypeError for a bad argument, and
    RuntimeError in forward where some are packed.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import BinaryGatedMLP
        >>> mlp, x = BinaryGatedMLP(128, 256), torch.randn(4, 128)
        >>> mlp(x).sum().backward()  # trains latent weights
        >>> mlp.pack()(x).shape
        torch.Size([4, 128])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "silu",
        bias: bool = False,
        *,
        clip: float | None = None,
        detach_scale: bool = False,
        pad: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check.activation(type(self).__name__, activation)
        self.activation, self.recompute = activation, recompute
        options: dict[str, Any] = {"clip": clip, "detach_scale": detach_scale, "pad": pad}
        self.gate_proj = BinaryLinear(dim, hidden, bias, **options)
        self.up_proj = BinaryLinear(dim, hidden, bias, **options)
        self.down_proj = BinaryLinear(hidden, dim, bias, **options)

    @classmethod
    def from_dense(
        cls,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        activation: str | nn.Module = "silu",
        *,
        pack: bool = True,
    ) -> BinaryGatedMLP:
        """A block of three linears: packed, their weights rounded to one bit; or with pack=False
        latent copies of them to train.

        activation: a name, or a module that has one. Raises TypeError for one that has none, and
        as `of` and `quantize_binary` do.
        """
        name = activation if isinstance(activation, str) else name_of(activation)
        if name is None:
            raise TypeError(
                f"{cls.__name__}: activation must be one with a kernel, got {activation!r}"
            )
        make = BinaryLinear.packing if pack else BinaryLinear.from_linear
        return cls.of(make(gate), make(up), make(down), name)

    @classmethod
    def of(
        cls, gate: BinaryLinear, up: BinaryLinear, down: BinaryLinear, activation: str = "silu"
    ) -> BinaryGatedMLP:
        """A block of three layers that are there already.

        Raises TypeError for other layers, ValueError for an activation without a kernel or widths
        that do not fit.
        """
        check.activation(cls.__name__, activation)
        for name, layer in (("gate", gate), ("up", up), ("down", down)):
            if not isinstance(layer, BinaryLinear):
                got = type(layer).__name__
                raise TypeError(f"{cls.__name__}: {name} must be a BinaryLinear, got {got}")
        H, D = gate.out_features, gate.in_features
        for name, layer, shape in (("up", up, (H, D)), ("down", down, (down.out_features, H))):
            if (got := (layer.out_features, layer.in_features)) != shape:
                raise ValueError(
                    f"{cls.__name__}: weight of {name} must have shape {shape}, got {got}"
                )
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.activation, block.recompute = activation, False
        block.gate_proj, block.up_proj, block.down_proj = gate, up, down
        return block.train(gate.training)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        for layer in self._layers():
            layer.init_weights_()

    def pack(self) -> BinaryGatedMLP:
        """Pack the three projections, as BinaryLinear.pack does; returns the block."""
        layers = self._layers()
        # All or none: a weight may be refused.
        for layer, w in zip(layers, [layer._rounded() for layer in layers], strict=True):
            layer._set(w)
        return self

    def _layers(self) -> tuple[BinaryLinear, BinaryLinear, BinaryLinear]:
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        layers, lora = self._layers(), None
        if self.adapted():
            if (read := self._read(x)) is None:
                return self._called(x)
            layers, biases, adapters = zip(*read, strict=True)
            lora = None if adapters == (None,) * 3 else Lora(*adapters)
        else:
            biases = tuple(layer.bias for layer in layers)
        packed: Any = [layer.packed for layer in layers]
        if (count := 3 - packed.count(None)) not in (0, 3):
            raise RuntimeError(
                f"{type(self).__name__}: projections must be packed all or none, got {count} of 3"
            )
        if not bare(*layers):
            return self._called(x)
        options: Any = {"activation": self.activation, "recompute": self.recompute, "lora": lora}
        if count:
            return binary_gated_mlp(x, *packed, *biases, **options)
        latent = (layer.binarized() for layer in layers)
        return gated_mlp(x, *latent, *biases, **options)

    def _read(self, x: Tensor) -> tuple[Projection, ...] | None:
        """Each projection, where `called` has no reason."""
        if self.called():
            return None
        layers: tuple[Any, ...] = self._layers()
        own = (isinstance(layer, BinaryLinear) for layer in layers)
        return tuple(
            Projection(layer, layer.bias) if plain else layer.read(x)
            for layer, plain in zip(layers, own, strict=True)
        )

    def called(self) -> str:
        """Why projections of an adapted block are called, or ""."""
        if invariant():
            return "batch_invariant() is on"
        for name in PROJECTIONS:
            layer: Any = getattr(self, name)
            if isinstance(layer, BinaryLinear):
                why = hooked(layer)
            else:
                why = (
                    layer.refusal() if hasattr(layer, "refusal") else "is no layer of one_bit_lora"
                )
            if why:
                return f"{name} {why}"
        return ""

    def adapted(self) -> list[str]:
        """Names of the projections in whose place something else stands: an adapter."""
        found = zip(PROJECTIONS, self._layers(), strict=True)
        return [name for name, layer in found if not isinstance(layer, BinaryLinear)]

    def packed_weight(self) -> BinaryWeight | None:
        """That of the gate, with an adapter around it or none; None until `pack()`."""
        gate: Any = self.gate_proj
        packed: BinaryWeight | None = getattr(getattr(gate, "base_layer", gate), "packed", None)
        return packed

    def _called(self, x: Tensor) -> Tensor:
        h = gated_act(self.gate_proj(x), self.up_proj(x), activation=self.activation)
        return self.down_proj(h)

    def path(self) -> str:
        """For explain()."""
        adapted = self.adapted()
        if adapted and (why := self.called()):
            return f"gated_act, {self.activation!r}, between projections: adapted {adapted}, {why}"
        packed = self.packed_weight() is not None
        one = f"one {'binary_gated_mlp' if packed else 'gated_mlp'}, {self.activation!r}"
        return f"{one}, adapters inside: {adapted}" if adapted else one

    def extra_repr(self) -> str:
        own = "recompute=True" if self.recompute else ""
        return self._noted(f"activation={self.activation!r}", own)
