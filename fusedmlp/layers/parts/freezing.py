"""freeze_masks() of layers that hold masked layers."""

from __future__ import annotations

from torch import nn


class Freezing(nn.Module):
    """A layer that may hold masks over elements, in itself or in a module that it was given."""

    def freeze_masks(self) -> list[str]:
        """`fusedmlp.freeze_masks` of this layer, with its errors."""
        from ..freeze import freeze_masks  # which imports the layers

        return freeze_masks(self)
