"""Activation modules beyond torch.nn's, two straight-through estimators among them.

| class | value | slope, where it is not the value's |
|---|---|---|
| ReluSquared | relu(x)^2 | |
| Gelu2 | gelu(x)^2, gelu the exact (erf) one | |
| BSiLU | (x + alpha) sigmoid(x) - alpha / 2 | |
| NeLU | -alpha / (1 + x^2), at every x | |
| StraightThroughEstimator | f(x) | b'(x) |
| Sugar | f(x) | f'(x) where x > 0, b'(x) where x <= 0 |
| ReluNelu | relu(x) | 1 where x > 0, 2 alpha x / (1 + x^2)^2 where x <= 0 |
| SugarReLU | relu(x) | s (1 - s) on both sides, s = sigmoid(x) |

f is `forward_fn`, b is `backward_fn`. Any shape, any floating dtype, both kept. A layer of
`fusedmlp.layers` fuses ReluSquared, Gelu2 and BSiLU (at its default alpha) with the projection
before them and runs the others in PyTorch; its repr says which. Constructors raise TypeError for an
alpha that is no number or a function that is none (a class is none), ValueError for an infinite or
NaN alpha.

Sources: ReLU^2 Wins, arXiv 2402.03804; B-SiLU, NeLU and SUGAR: The Resurrection of the ReLU, arXiv
2505.22074; names and arguments are mlp_utils'. SugarReLU's slope is that package's: the paper's own
surrogate is B-SiLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .check.numbers import finite
from .reference.activations import ACTIVATIONS, BSILU_ALPHA, bsilu, computes
from .transforms import transformed

__all__ = [
    "BSiLU",
    "Gelu2",
    "NeLU",
    "ReluNelu",
    "ReluSquared",
    "StraightThroughEstimator",
    "Sugar",
    "SugarReLU",
]

Elementwise = Callable[[Tensor], Tensor]
NELU_ALPHA = 0.05


def _check_fn(owner: nn.Module, name: str, fn: object) -> None:
    if isinstance(fn, type) or not callable(fn):
        raise TypeError(
            f"{type(owner).__name__}: {name} must be an elementwise module or function, got {fn!r}"
        )


@computes("relu_sq")
class ReluSquared(nn.Module):
    """relu(x)^2.

    Args:
        signed: kept as an attribute. It changes nothing: the sign of x is that of relu(x) wherever
            the square is not zero. It is not x |x|.

    Examples:
        >>> import torch
        >>> from fusedmlp import ReluSquared
        >>> ReluSquared()(torch.tensor([-2.0, 3.0])).tolist()
        [0.0, 9.0]
    """

    def __init__(self, signed: bool = False) -> None:
        super().__init__()
        self.signed = signed

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS["relu_sq"].reference(x)

    def extra_repr(self) -> str:
        return "signed=True" if self.signed else ""


@computes("gelu2")
class Gelu2(nn.Module):
    """gelu(x)^2 with the exact gelu: never negative, and not 0 for x < 0.

    Examples:
        >>> import torch
        >>> from fusedmlp import Gelu2
        >>> x = torch.randn(8)
        >>> torch.allclose(Gelu2()(x), torch.nn.functional.gelu(x).square())
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS["gelu2"].reference(x)


@computes("bsilu")  # at the alpha of the row
class BSiLU(nn.Module):
    """(x + alpha) sigmoid(x) - alpha / 2: 0 at 0, -alpha / 2 far below; silu at alpha = 0.

    Args:
        alpha: a number, not learned.

    Examples:
        >>> import torch
        >>> from fusedmlp import BSiLU
        >>> BSiLU()(torch.tensor([0.0])).item()
        0.0
    """

    def __init__(self, alpha: float = BSILU_ALPHA) -> None:
        super().__init__()
        finite(type(self).__name__, "alpha", alpha)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return bsilu(x, self.alpha)

    def extra_repr(self) -> str:
        return "" if self.alpha == BSILU_ALPHA else f"alpha={self.alpha}"


class NeLU(nn.Module):
    """-alpha / (1 + x^2), for positive x too: the surrogate slope of ReluNelu, not a rectifier.

    Args:
        alpha: a number, not learned.

    Examples:
        >>> import torch
        >>> from fusedmlp import NeLU
        >>> NeLU(alpha=0.5)(torch.tensor([0.0, 1.0])).tolist()
        [-0.5, -0.25]
    """

    def __init__(self, alpha: float = NELU_ALPHA) -> None:
        super().__init__()
        finite(type(self).__name__, "alpha", alpha)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return -self.alpha / (1 + x.square())

    def extra_repr(self) -> str:
        return "" if self.alpha == NELU_ALPHA else f"alpha={self.alpha}"


class _ValueOf(Function):
    """The value of one tensor with the gradient of others: value exactly, no rounded difference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *graphs: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.graphs = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(dy,) * ctx.graphs


class _ValueOfDual(_ValueOf):
    """Its tangents too. By itself, since torch.compile takes no Function that has `jvp`."""

    @staticmethod
    def jvp(ctx: Any, _: Tensor | None, *tangents: Tensor) -> Tensor:
        return sum(tangents[1:], tangents[0]).clone()


class _GradientWhere(Function):
    """x, whose gradient passes where `mask` holds and is 0 elsewhere, also if it is not finite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mask: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, dy, 0), None


class _GradientWhereDual(_GradientWhere):
    """Its tangents too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, tangent, 0)


def _needs_slope(x: Tensor) -> bool:
    return transformed() or (x.requires_grad and torch.is_grad_enabled())


class StraightThroughEstimator(nn.Module):
    """forward_fn(x), with the slope of backward_fn.

    Args:
        forward_fn: the function whose value is returned, unrounded; a module or a callable. Its own
            parameters, if it has any, get no gradient.
        backward_fn: the function that is differentiated in its place; its value is not used. Run
            only if x requires a gradient and gradients are on.

    Examples:
        >>> import torch
        >>> from fusedmlp import StraightThroughEstimator
        >>> x = torch.tensor([0.2, 1.6], requires_grad=True)
        >>> y = StraightThroughEstimator(torch.round, torch.nn.Identity())(x)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 2.0], [1.0, 1.0])
    """

    def __init__(self, forward_fn: Elementwise, backward_fn: Elementwise) -> None:
        super().__init__()
        _check_fn(self, "forward_fn", forward_fn)
        _check_fn(self, "backward_fn", backward_fn)
        self.forward_fn = forward_fn
        self.backward_fn = backward_fn

    def forward(self, x: Tensor) -> Tensor:
        if not _needs_slope(x):
            return self.forward_fn(x)
        value = self.forward_fn(x.detach()).detach()
        value_of = _ValueOfDual if transformed() else _ValueOf
        return value_of.apply(value, self.backward_fn(x))


class Sugar(nn.Module):
    """forward_fn(x), with the slope of forward_fn where x > 0 and of backward_fn where x <= 0.

    Args:
        forward_fn: an elementwise module or callable.
        backward_fn: one whose slope replaces forward_fn's where x <= 0; its value is not used. Run
            only if x requires a gradient and gradients are on.

    Examples:
        >>> import torch
        >>> from fusedmlp import Sugar
        >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
        >>> y = Sugar(torch.relu, torch.nn.Identity())(x)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 1.0], [1.0, 1.0])
    """

    def __init__(self, forward_fn: Elementwise, backward_fn: Elementwise) -> None:
        super().__init__()
        _check_fn(self, "forward_fn", forward_fn)
        _check_fn(self, "backward_fn", backward_fn)
        self.forward_fn = forward_fn
        self.backward_fn = backward_fn

    def forward(self, x: Tensor) -> Tensor:
        if not _needs_slope(x):
            return self.forward_fn(x)
        positive = x > 0
        if transformed():
            # Tangents run forward, so that they are cut after the function as well as before it.
            cut = _GradientWhereDual.apply
            hard = cut(self.forward_fn(cut(x, positive)), positive)
            soft = cut(self.backward_fn(cut(x, ~positive)), ~positive)
            return _ValueOfDual.apply(hard.detach(), hard, soft)
        hard = self.forward_fn(_GradientWhere.apply(x, positive))
        soft = self.backward_fn(_GradientWhere.apply(x, ~positive))
        return _ValueOf.apply(hard.detach(), hard, soft)


class ReluNelu(Sugar):
    """relu(x), with NeLU's slope where x <= 0, so that a unit that is off still learns.

    Args:
        alpha: NeLU's.

    Examples:
        >>> import torch
        >>> from fusedmlp import ReluNelu
        >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
        >>> ReluNelu(alpha=0.5)(x).sum().backward()
        >>> x.grad.tolist()
        [-0.25, 1.0]
    """

    def __init__(self, alpha: float = NELU_ALPHA) -> None:
        super().__init__(nn.ReLU(), NeLU(alpha))


class SugarReLU(StraightThroughEstimator):
    """relu(x), with sigmoid's slope on both sides.

    Examples:
        >>> import torch
        >>> from fusedmlp import SugarReLU
        >>> x = torch.tensor([0.0], requires_grad=True)
        >>> SugarReLU()(x).sum().backward()
        >>> x.grad.item()
        0.25
    """

    def __init__(self) -> None:
        super().__init__(nn.ReLU(), nn.Sigmoid())
