"""Masked gated linear units: one projection is gate and value, told apart by binary masks.

| class | act |
|---|---|
| MGLU | sigmoid |
| BilinearMGLU | identity |
| ReMGLU | relu |
| SwiMGLU | silu |
| GeMGLU | gelu, exact (erf) |

| mask_mode | h | with |
|---|---|---|
| "channel" | m * (v * act(v)) + (1 - m) * v | v = x W' + b, m = 1 where mask >= 0 |
| "element" | sum_i act(x (m_i * W)') * (x ((1 - m_i) * W)') | m_i = 1 where mask[i] > 0 |

| tensor | shape | |
|---|---|---|
| x | (..., dim_in) | |
| proj.weight W | (dim_out, dim_in) | |
| proj.bias b | (dim_out,) | or None; None in element mode |
| mask | (dim_out,) | in element mode (num_masks, dim_out, dim_in) |
| h | (..., dim_out) | |

The two modes are different functions. "channel" is mlp_utils': a channel gates itself or passes
through; its mask's gradient is that of sigmoid(mask), straight through. "element" is the paper's
(Tajima et al., Masked Gated Linear Unit, arXiv 2506.23225), by `fusedmlp.masked_gated_linear` and
its kernels; a logit's gradient is that of its mask. dtype: x has the parameters' floating dtype,
which is kept (under autocast: the autocast dtype).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..check.layer import check_x
from ..ops.masked_gated_linear import masked_gated_linear
from ..ops.masked_gated_mlp import masked_gated_mlp
from ..weights.masks import MAX_MASKS, PackedMasks, pack_masks
from .parts.activation import describe, gate, gate_module, name_of
from .parts.around import hooked
from .parts.block import affine, passes_through, positive_int, reset_others
from .parts.widths import Reader

MASK_MODES = ("channel", "element")


def other_masks(prefix: str, is_frozen: bool, frozen: bool, logits: bool) -> str:
    """What to do where a layer's masks are frozen and a state_dict's are logits, or the other way
    round; "" where they are alike."""
    name = prefix.rstrip(".") or "the layer"
    if frozen and not logits and not is_frozen:
        return (
            f"{name}: the state_dict has frozen masks and the layer has logits: freeze first, by "
            "fusedmlp.freeze_masks(model), then load the state_dict"
        )
    if logits and not frozen and is_frozen:
        return (
            f"{name}: the state_dict has logits and the layer has frozen masks: load into a model "
            "that is not frozen, then freeze it by fusedmlp.freeze_masks(model)"
        )
    return ""


class MaskedGLU(Reader):
    """A masked gated linear unit: one weight W is gate and value, told apart by binary masks.

    "element" mode: h = sum_i act(x (m_i * W)') * (x ((1 - m_i) * W)'), m_i = 1 where mask[i] > 0.
    "channel" mode: h = m * (v * act(v)) + (1 - m) * v, v = x W' + b, m = 1 where mask >= 0.

    Args:
        dim_in: width of x.
        dim_out: width of the result.
        activation: an elementwise module, kept as the attribute `activation`, or a name of
            `fusedmlp.reference.activations.ACTIVATIONS`. In element mode one that `fusedmlp` has a
            kernel for.
        bias: give `proj` a bias. None: in channel mode only; element mode has none.
        mask_mode: "channel" or "element".
        num_masks: masks of element mode, from 1 to 16. n masks cost (n + 1) / 2 times the FLOPs of
            a GLU of the same width; decoding reads 16 + n bits a weight where that reads 32.

    `proj` starts with nn.Linear's own initialisation, `mask` with N(0, 1) in channel mode and with
    0.01 N(0, 1) in element mode. `freeze_masks()` turns element logits into bits for inference.
    Raises ValueError or TypeError for a bad argument, and TypeError in forward if `proj` was
    replaced by something else than an nn.Linear, or in element mode has hooks.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import MaskedGLU
        >>> layer = MaskedGLU(64, 128, torch.nn.SiLU(), mask_mode="element", num_masks=2)
        >>> x = torch.randn(4, 64)
        >>> y = layer(x)
        >>> layer.freeze_masks()  # 2 bits a weight instead of 2 logits
        >>> torch.equal(layer(x), y)
        True
    """

    mask: nn.Parameter
    packed: PackedMasks | None

    LOGITS = "mask"  # for fusedmlp.freeze_masks

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        activation: nn.Module | str,
        bias: bool | None = None,
        *,
        mask_mode: str = "channel",
        num_masks: int = 1,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        positive_int(owner, "dim_in", dim_in)
        positive_int(owner, "dim_out", dim_out)
        positive_int(owner, "num_masks", num_masks)
        made = gate_module(owner, activation)
        if mask_mode not in MASK_MODES:
            raise ValueError(
                f"{owner}: mask_mode must be one of {', '.join(MASK_MODES)}, got {mask_mode!r}"
            )
        element = mask_mode == "element"
        if num_masks > (MAX_MASKS if element else 1):
            most = f"from 1 to {MAX_MASKS}" if element else "1 in channel mode"
            raise ValueError(f"{owner}: num_masks must be {most}, got {num_masks}")
        if element and bias:
            raise ValueError(f"{owner}: bias must be False or None in element mode, got {bias}")
        if element and name_of(made) is None:
            raise TypeError(
                f"{owner}: activation must be one with a kernel in element mode, got {activation!r}"
            )
        self.mask_mode = mask_mode
        self.proj = nn.Linear(dim_in, dim_out, not element if bias is None else bias)
        shape = (num_masks, dim_out, dim_in) if element else (dim_out,)
        self.mask = nn.Parameter(self.proj.weight.new_empty(shape))
        self.packed = None
        self.activation = made
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the mask again, and nothing else. Raises RuntimeError once the masks are frozen."""
        if self.packed is not None:
            raise RuntimeError(
                f"{type(self).__name__}: reset_parameters() needs logits, got frozen masks"
            )
        nn.init.normal_(self.mask, std=0.01 if self.mask_mode == "element" else 1.0)

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta.

        An activation with parameters is reset by its own `reset_parameters`; raises TypeError if it
        has none, or if the masks are frozen.
        """
        self.proj.reset_parameters()
        reset_others(self)

    @property
    def has_masks(self) -> bool:
        """Whether it has masks over elements, as logits or frozen."""
        return self.mask_mode == "element"

    def freeze_masks(self) -> None:
        """Replace the logits `mask` by bits, `packed`, for good: num_masks bits a weight instead of
        a parameter each. Numbers stay as they are. A frozen layer's state_dict loads into a layer
        that was frozen before.

        Raises RuntimeError in channel mode and where they are frozen already, ValueError for a
        logit that is not finite.
        """
        self.check_unfrozen()
        self.replace_masks(pack_masks(self.mask))

    def check_unfrozen(self) -> None:
        """Raises RuntimeError where freeze_masks() would."""
        owner = type(self).__name__
        if self.mask_mode != "element":
            raise RuntimeError(f"{owner}: freeze_masks() needs mask_mode='element', got 'channel'")
        if self.packed is not None:
            raise RuntimeError(f"{owner}: freeze_masks() needs logits, got frozen masks")

    def replace_masks(self, packed: PackedMasks) -> None:
        """What freeze_masks() does once it has the bits."""
        self.packed = packed
        del self.mask

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
        frozen, logits = f"{prefix}packed.planes" in state_dict, f"{prefix}mask" in state_dict
        if hint := other_masks(prefix, self.packed is not None, frozen, logits):
            error_msgs.append(hint)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def masks(self) -> Tensor | PackedMasks:
        """What forward masks with: the logits, or once frozen the bits."""
        return self.mask if self.packed is None else self.packed

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim_in) -> (..., dim_out)."""
        w, _ = affine(self, self.proj)
        check_x(type(self).__name__, x, w.shape[1], w.dtype)
        if self.mask_mode == "element":
            self._check_bare()
            return masked_gated_linear(x, w, self.masks(), activation=self._activation())
        return self.by_channels(self.proj(x), self.mask)

    def by_channels(self, v: Tensor, mask: Tensor) -> Tensor:
        """Channel mode's h of v (..., dim_out) and of a mask that may have rows of its own."""
        soft = mask.sigmoid()
        # The difference is 0, and its gradient sigmoid's.
        m = ((mask >= 0).to(soft.dtype) + (soft - soft.detach())).to(v.dtype)
        return m * gate(self.activation, v, v) + (1 - m) * v

    def block(
        self, x: Tensor, dropout: nn.Module, down: nn.Module, recompute: bool = False
    ) -> Tensor:
        """down(dropout(self(x))), in one call where nothing stands between the projections."""
        w_down, b_down = affine(self, down)
        if self.mask_mode == "channel" or not passes_through(dropout):
            return F.linear(dropout(self(x)), w_down, b_down)
        self._check_bare()
        w, _ = affine(self, self.proj)
        options: Any = {"activation": self._activation(), "recompute": recompute}
        return masked_gated_mlp(x, w, self.masks(), w_down, b_down, **options)

    def _check_bare(self) -> None:
        """Two products with halves of W are no call of `proj`."""
        for name in ("proj", "activation"):
            if around := hooked(getattr(self, name)):
                raise TypeError(
                    f"{type(self).__name__}: {name} must be without hooks and with its class's own "
                    f"forward in element mode, where it is read without being called, got one that "
                    f"{around}"
                )

    def path(self) -> str:
        """For explain(): where the activation runs, and what masks."""
        if self.mask_mode == "channel":
            return f"{type(self.activation).__name__} in PyTorch"
        return f"{describe(self.activation)}, {self.described_masks()}"

    def described_masks(self) -> str:
        """How many masks over elements there are, and what they are now."""
        count = self.masks().shape[0]
        kind = "logits" if self.packed is None else "frozen bits"
        return f"{count} mask{'s' if count > 1 else ''} of {kind}"

    def _reads(self) -> Iterator[tuple[str, Tensor | int]]:
        if self.mask_mode == "element":
            yield from super()._reads()
            yield "dim_out", self.proj.weight.shape[0]

    def extra_repr(self) -> str:
        return self._noted()

    def _activation(self) -> str:
        name = name_of(self.activation)
        if name is None:
            raise TypeError(
                f"{type(self).__name__}: activation must be one with a kernel in element mode, got "
                f"{self.activation!r}"
            )
        return name


class _Named(MaskedGLU):
    """A masked GLU whose activation its class says."""

    activation_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        bias: bool | None = None,
        *,
        mask_mode: str = "channel",
        num_masks: int = 1,
    ) -> None:
        activation = self.activation_class()
        super().__init__(
            dim_in, dim_out, activation, bias, mask_mode=mask_mode, num_masks=num_masks
        )


class MGLU(_Named):
    """A masked gated linear unit with act(z) = sigmoid(z).

    In element mode h = sum_i act(x (m_i * W)') * (x ((1 - m_i) * W)'). In channel mode
    h = m * (v * act(v)) + (1 - m) * v with v = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype, W = `proj.weight` (dim_out, dim_in).
    Arguments, dtypes, errors and source are those of `MaskedGLU`, but for `activation`, which this
    class brings.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import MGLU
        >>> layer = MGLU(64, 128, mask_mode="element", num_masks=2)
        >>> layer(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    activation_class = nn.Sigmoid


class BilinearMGLU(_Named):
    """A masked gated linear unit with act(z) = z.

    In element mode h = sum_i act(x (m_i * W)') * (x ((1 - m_i) * W)'). In channel mode
    h = m * (v * act(v)) + (1 - m) * v with v = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype, W = `proj.weight` (dim_out, dim_in).
    Arguments, dtypes, errors and source are those of `MaskedGLU`, but for `activation`, which this
    class brings.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import BilinearMGLU
        >>> layer = BilinearMGLU(64, 128, mask_mode="element", num_masks=2)
        >>> layer(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    activation_class = nn.Identity


class ReMGLU(_Named):
    """A masked gated linear unit with act(z) = relu(z).

    In element mode h = sum_i act(x (m_i * W)') * (x ((1 - m_i) * W)'). In channel mode
    h = m * (v * act(v)) + (1 - m) * v with v = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype, W = `proj.weight` (dim_out, dim_in).
    Arguments, dtypes, errors and source are those of `MaskedGLU`, but for `activation`, which this
    class brings.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import ReMGLU
        >>> layer = ReMGLU(64, 128, mask_mode="element", num_masks=2)
        >>> layer(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    activation_class = nn.ReLU


class SwiMGLU(_Named):
    """A masked gated linear unit with act(z) = silu(z).

    In element mode h = sum_i act(x (m_i * W)') * (x ((1 - m_i) * W)'). In channel mode
    h = m * (v * act(v)) + (1 - m) * v with v = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype, W = `proj.weight` (dim_out, dim_in).
    Arguments, dtypes, errors and source are those of `MaskedGLU`, but for `activation`, which this
    class brings.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import SwiMGLU
        >>> layer = SwiMGLU(64, 128, mask_mode="element", num_masks=2)
        >>> layer(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    activation_class = nn.SiLU


class GeMGLU(_Named):
    """A masked gated linear unit with act(z) = gelu(z), the exact (erf) one.

    In element mode h = sum_i act(x (m_i * W)') * (x ((1 - m_i) * W)'). In channel mode
    h = m * (v * act(v)) + (1 - m) * v with v = x W' + b.

    x is (..., dim_in), h (..., dim_out) in x's dtype, W = `proj.weight` (dim_out, dim_in).
    Arguments, dtypes, errors and source are those of `MaskedGLU`, but for `activation`, which this
    class brings.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import GeMGLU
        >>> layer = GeMGLU(64, 128, mask_mode="element", num_masks=2)
        >>> layer(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 128])
    """

    activation_class = nn.GELU
