"""pack_masks(logits) -> PackedMasks: the masks of a masked gated linear as bits.

Byte (h, j, i) of `planes`, uint8 (H, ceil(D / 8), n_m), holds mask i of the weights
(h, 8 j .. 8 j + 7), lowest bit first, 1 where the logit is > 0; bits past D are 0. So a weight in
16 bits costs 16 + n_m bits, and the n_m bytes of eight neighbouring weights, themselves one 16-byte
load, are one aligned load where n_m is a power of 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..backends import choice, library
from ..backends.flops import no_products
from ..backends.op import Op, kernel, register
from ..kernels.launches import masked as launches
from ..kernels.masked import masks as _triton
from ..reference.values import any_of

MAX_MASKS = 16


class PackedMasks(nn.Module):
    """n_m binary masks over an (H, D) weight, for inference and for training with fixed masks.

    A module so that it moves with `.to()`, and is saved and loaded by `state_dict`: its one buffer
    is `planes`, and its extra state the width, as a tensor. Loading checks both; a
    state_dict without a width is one with a missing key.

    Args:
        planes: uint8 (H, ceil(D / 8), n_m), n_m from 1 to 16. Byte (h, j, i) holds mask i of the
            weights (h, 8 j .. 8 j + 7), lowest bit first; bits past D are 0.
        width: D, at least 0.

    Raises ValueError or TypeError for planes that cannot be those of such masks, here and when
    others are loaded.

    Examples:
        >>> import torch
        >>> from fusedmlp import pack_masks
        >>> pack_masks(torch.randn(2, 128, 64)).shape
        (2, 128, 64)
    """

    planes: Tensor

    def __init__(self, planes: Tensor, width: int) -> None:
        super().__init__()
        _check_planes(planes, width)
        self.width = width
        self.register_buffer("planes", planes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n_m, H, D), as of the logits."""
        return self.planes.shape[2], self.planes.shape[0], self.width

    def unpack(self) -> Tensor:
        """The masks as bool (n_m, H, D)."""
        return reference.unpack_masks(self.planes, self.width)

    def extra_repr(self) -> str:
        return "n_m={}, H={}, D={}".format(*self.shape)

    def get_extra_state(self) -> Tensor:
        # A tensor, because some file formats hold nothing else; never on meta, which has no value.
        return torch.tensor(self.width, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: `check_saved` has compared it."""

    def check_saved(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """What a state_dict holds under `prefix` are masks of this width; raises as the class."""
        width = state_dict.get(prefix + "_extra_state")
        if width is not None and int(width) != self.width:
            raise ValueError(
                f"PackedMasks: {prefix}planes must be masks of width {self.width}, got width "
                f"{int(width)}"
            )
        loaded = state_dict.get(prefix + "planes")
        # A wrong shape is reported by load_state_dict itself.
        if isinstance(loaded, Tensor) and loaded.shape == self.planes.shape:
            _check_planes(loaded, self.width)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.check_saved(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_planes(planes: Tensor, width: int) -> None:
    if not isinstance(planes, Tensor) or planes.dtype != torch.uint8:
        got = planes.dtype if isinstance(planes, Tensor) else type(planes).__name__
        raise TypeError(f"PackedMasks: planes must be a uint8 Tensor, got {got}")
    if not isinstance(width, int) or isinstance(width, bool):
        raise TypeError(f"PackedMasks: width must be an int, got {width!r}")
    if width < 0:
        raise ValueError(f"PackedMasks: width must be at least 0, got {width}")
    octets = -(-width // 8)
    if planes.dim() != 3 or planes.shape[1] != octets or not 1 <= planes.shape[2] <= MAX_MASKS:
        raise ValueError(
            f"PackedMasks: planes must be (H, {octets}, n_m) for width {width}, with n_m from 1 to "
            f"{MAX_MASKS}, got {tuple(planes.shape)}"
        )
    if not planes.is_contiguous():
        raise ValueError(f"PackedMasks: planes must be contiguous, got strides {planes.stride()}")
    if width % 8 and any_of(planes[:, -1] >> width % 8):
        raise ValueError(
            f"PackedMasks: planes must have no bit set past width {width}, got some: these are "
            "masks of another width"
        )


# logits (n_m, H, D) -> planes.
pack = library.define(
    "pack_masks(Tensor logits) -> Tensor",
    _triton.pack_masks,
    _triton.empty_planes,
    flops=no_products,
    launches=(launches.PACK,),
)


def check_logits(op: str, name: str, logits: Tensor) -> None:
    """Logits are a floating (n_m, H, D) with n_m from 1 to 16; their values are not looked at."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{op}: {name} must be a Tensor of logits or PackedMasks, got {type(logits).__name__}"
        )
    if not logits.dtype.is_floating_point:
        raise TypeError(
            f"{op}: {name} must have a floating dtype, got {logits.dtype}; a mask of bools m has "
            "the logits m.float() - 0.5"
        )
    if logits.dim() != 3 or not 1 <= logits.shape[0] <= MAX_MASKS:
        raise ValueError(
            f"{op}: {name} must be (n_m, H, D) with n_m from 1 to {MAX_MASKS}, got "
            f"{tuple(logits.shape)}{f'; one mask is {name}[None]' if logits.dim() == 2 else ''}"
        )


def pack_masks(logits: Tensor) -> PackedMasks:
    """The signs of logits (n_m, H, D), n_m from 1 to 16, in bits: 1 where a logit is > 0.

    Raises ValueError for another shape or a logit that is not finite, TypeError for a dtype that is
    not floating. Waits for the GPU, to look at the values: not for every training step, where
    `masked_gated_linear` takes the logits themselves.

    Examples:
        >>> import torch
        >>> from fusedmlp import pack_masks
        >>> logits = torch.randn(2, 128, 64)
        >>> masks = pack_masks(logits)
        >>> torch.equal(masks.unpack(), logits > 0)
        True
        >>> masks.planes.numel()  # bytes: 2 bits for each of 128 * 64 weights
        2048
    """
    check_logits("pack_masks", "logits", logits)
    logits = logits.detach()
    if any_of(bad := ~logits.isfinite()):
        count = int(bad.sum())
        raise ValueError(f"pack_masks: logits must be finite, got {count} that are NaN or infinite")
    triton = choice.pick("pack_masks", logits, "logits") != "reference"
    return PackedMasks((pack if triton else reference.pack_masks)(logits), logits.shape[2])


register(
    Op(
        "pack_masks",
        pack_masks,
        reference.pack_masks,
        forward=(kernel(pack),),
        flops=no_products,
        within="masked_gated_linear",
    )
)
