"""ResidualWrapper: y = x + module(x)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ._block import reset_tree


class ResidualWrapper(nn.Module):
    """x + module(x), for any module that keeps the shape.

    Args:
        module: the branch, kept as the attribute `module`. Where it returns a tuple, such as an
            output and an auxiliary loss, x is added to the first element.

    forward hands further arguments on to `module`. A shape that does not fit is torch's error.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"ResidualWrapper: module must be an nn.Module, got {module!r}")
        self.module = module

    @property
    def has_aux_loss(self) -> bool:
        """Whether forward returns (y, auxiliary loss)."""
        return bool(getattr(self.module, "has_aux_loss", False))

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta.

        By each module's own init_weights_() or reset_parameters(); raises TypeError if a module
        with parameters has neither.
        """
        reset_tree(self, self.module)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x (...) -> (...)."""
        y = self.module(x, *args, **kwargs)
        if isinstance(y, tuple):
            return (x + y[0], *y[1:])
        return x + y
