"""ResidualWrapper: y = x + module(x)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .parts.block import reset_tree
from .parts.freezing import Freezing


class ResidualWrapper(Freezing):
    """x + module(x), for any module that keeps the shape.

    Args:
        module: the branch, kept as the attribute `module`. Where it returns a tuple, such as an
            output and an auxiliary loss, x is added to the first element.

    forward hands further arguments on to `module`. Raises TypeError for an x or a result that is no
    tensor, and ValueError for a result of another shape than x: nothing is broadcast.

    Examples:
        >>> import torch
        >>> from fusedmlp.layers import ResidualWrapper
        >>> x = torch.randn(2, 8, 64)
        >>> torch.equal(ResidualWrapper(torch.nn.Identity())(x), 2 * x)
        True
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
        if not isinstance(x, Tensor):
            raise TypeError(f"ResidualWrapper: x must be a tensor, got {type(x).__name__}")
        y = self.module(x, *args, **kwargs)
        if isinstance(y, tuple):
            return (x + self._branch(x, y[0] if y else None), *y[1:])
        return x + self._branch(x, y)

    def _branch(self, x: Tensor, y: object) -> Tensor:
        """What `module` returned, if it can be added to x as it is."""
        if not isinstance(y, Tensor):
            raise TypeError(
                "ResidualWrapper: module must return a tensor, or a tuple that begins with one, "
                f"got {type(y).__name__} from {type(self.module).__name__}"
            )
        if y.shape != x.shape:
            raise ValueError(
                f"ResidualWrapper: module must keep x's shape {tuple(x.shape)}, got "
                f"{tuple(y.shape)} from {type(self.module).__name__}"
            )
        return y
