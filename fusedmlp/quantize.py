"""quantize_model(model) -> report: the gated MLPs of a loaded model in one bit a weight, in place.

A gated MLP is a module with nn.Linears `gate_proj`, `up_proj`, `down_proj` and an activation
`act_fn`, as in Llama, Qwen, Mistral and their kin. Rounding a model that was not trained with
one-bit weights leaves nothing of it (see fusedmlp/binary.py): this is for models that were, or to
measure speed and memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .kernels.bits import GROUP
from .layers._activation import name_of
from .layers.binary import BinaryGatedMLP

FORMATS = ("q1_0",)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Classes of transformers, which are not PyTorch's: name -> ours.
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu_sq",
}


@dataclass(frozen=True)
class Quantized:
    """One MLP: bytes of its parameters and buffers, before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantised, and bytes: of the MLPs and of the whole model, before and after."""

    format: str
    layers: tuple[Quantized, ...]
    model_before: int
    model_after: int

    @property
    def before(self) -> int:
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        return sum(layer.after for layer in self.layers)

    def __str__(self) -> str:
        ratio = self.before / self.after
        return (
            f"{len(self.layers)} MLPs in {self.format}: {_mib(self.before)} -> {_mib(self.after)} "
            f"({ratio:.1f} times smaller); the model {_mib(self.model_before)} -> "
            f"{_mib(self.model_after)}"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


def nbytes(module: nn.Module) -> int:
    """Of parameters and buffers, each once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values())


def activation_of(mlp: nn.Module) -> str | None:
    """The name of a gated MLP's activation, or None."""
    act = getattr(mlp, "act_fn", None)
    if not isinstance(act, nn.Module):
        return None
    return name_of(act) or _ACTIVATIONS.get(type(act).__name__)


def gated_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every gated MLP in `model`."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, p, None), nn.Linear) for p in PROJECTIONS)
    }


def _check(name: str, mlp: nn.Module) -> None:
    op = "quantize_model"
    if activation_of(mlp) is None:
        act = getattr(mlp, "act_fn", None)
        raise TypeError(f"{op}: {name}.act_fn must be an activation with a kernel, got {act!r}")
    for projection in PROJECTIONS:
        linear = getattr(mlp, projection)
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"{op}: {name}.{projection} must be a plain nn.Linear, got "
                f"{type(linear).__name__}; merge an adapter first"
            )
        if linear.in_features % GROUP:
            raise ValueError(
                f"{op}: {name}.{projection} must have rows of a multiple of {GROUP}, got "
                f"{linear.in_features}"
            )


def quantize_model(model: nn.Module, format: str = "q1_0") -> QuantizationReport:
    """Replace every gated MLP of `model` by a packed `layers.BinaryGatedMLP`, in place.

    Nothing is changed unless all can be. The new blocks keep the names of the projections, have no
    latent weights and give a gradient to their input.

    Raises ValueError for another format, a model without gated MLPs, a width that is no multiple of
    128, or weights that `quantize_binary` refuses; TypeError for a projection that is no plain
    nn.Linear or an activation without a kernel.
    """
    if format not in FORMATS:
        raise ValueError(
            f"quantize_model: format must be one of {', '.join(FORMATS)}, got {format!r}"
        )
    found = gated_mlps(model)
    if not found:
        raise ValueError(
            f"quantize_model: model must have a module with nn.Linears {', '.join(PROJECTIONS)}, "
            f"got none in {type(model).__name__}"
        )
    if "" in found:
        raise ValueError(
            "quantize_model: model must hold its gated MLPs, got one itself; "
            "layers.BinaryGatedMLP.from_dense makes a block of it"
        )
    for name, mlp in found.items():
        _check(name, mlp)
    model_before = nbytes(model)
    blocks = {name: _block(mlp) for name, mlp in found.items()}
    sizes = tuple(Quantized(name, nbytes(mlp), nbytes(blocks[name])) for name, mlp in found.items())
    for name, block in blocks.items():
        model.set_submodule(name, block)
    return QuantizationReport(format, sizes, model_before, nbytes(model))


def _block(mlp: nn.Module) -> BinaryGatedMLP:
    gate, up, down = (getattr(mlp, projection) for projection in PROJECTIONS)
    name = activation_of(mlp)
    assert name is not None
    return BinaryGatedMLP.from_dense(gate, up, down, name).train(mlp.training)
