"""From a PyTorch activation module to the name of its kernel: the one place that knows both."""

from __future__ import annotations

from torch import nn

_NAMES: dict[type, str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Identity: "identity",
}
_GELU_NAMES = {"none": "gelu", "tanh": "gelu_tanh"}


def name_of(activation: nn.Module | type) -> str | None:
    """The name of a module or class in `fusedmlp.kernels.activations.ACTIVATIONS`, or None.

    A class stands for what it builds without arguments. Exact types only: a subclass may compute
    something else.
    """
    kind = activation if isinstance(activation, type) else type(activation)
    if kind is nn.GELU:
        return _GELU_NAMES.get(getattr(activation, "approximate", "none"))
    return _NAMES.get(kind)
