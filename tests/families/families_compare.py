"""One call of a family's experts against their own class, forward and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from families_build import inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusedmlp.testing import Error, error_of


class InFloat64(TorchFunctionMode):
    """What a model computes in float32 on its own account, it computes in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        wide = lambda a: torch.float64 if a is torch.float32 else a  # noqa: E731
        kwargs = {k: wide(v) for k, v in (kwargs or {}).items()}
        return func(*map(wide, args), **kwargs)


Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def results(module: nn.Module, run: Run, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, and the gradients of x, of the tokens' weights and of each parameter."""
    module.zero_grad()
    x, index, weights = inputs(dtype)
    y = run(x, index, weights)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view(y.shape)
    y.backward(dy.to(y.dtype))
    grads = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}


def judged(module: nn.Module, run: Run) -> dict[str, Error]:
    """`run`, of `module`'s parameters, against the module's own forward by the tolerance rule."""
    wide = copy.deepcopy(module).double()
    with InFloat64():
        exact = results(wide, wide, torch.float64)
    eager = results(module, module, torch.float32)
    ours = results(module, run, torch.float32)
    return {name: error_of(ours[name], exact[name], eager[name]) for name in exact}


def relative(errors: dict[str, Error], exact: Any = None) -> float:
    """The largest of them, as a part of the norm of what was compared."""
    return max(e.relative_l2 for e in errors.values())
