"""quantize_model(model) -> report: the gated MLPs of a loaded model in one bit a weight, in place.

Rounding a model that was not trained with one-bit weights leaves nothing of it (see
fusedmlp/weights/binary.py): this is for models that were, or to measure speed and memory. Which
MLPs, one_bit.py says; how a model of transformers is saved and comes back, pretrained.py.
"""

from __future__ import annotations

import sys

from torch import nn

from .one_bit import FORMATS, PROJECTIONS, Blocks, one_bit_blocks
from .report import QuantizationReport, Quantized
from .walk import checked


def nbytes(module: nn.Module) -> int:
    """The bytes of parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values())


def quantize_model(model: nn.Module, format: str = "q1_0") -> QuantizationReport:
    """Replace every gated MLP of `model` by a packed `layers.BinaryGatedMLP`, in place.

    The new blocks keep the names of the projections, have no latent weights and give a gradient to
    their input. An MLP is left, with the reason in the report, where that would be something else:
    other names, something between or after the projections, a hook, a forward set on the instance,
    a projection that is adapted or tied, an activation without a kernel, a width that is no
    multiple of 128. A second call changes nothing.

    A model of transformers is marked as quantised in its configuration, so that `save_pretrained`
    and `from_pretrained` keep it: docs/binary.md. To load another model that was saved after it,
    call it on a fresh one before load_state_dict.

    Raises ValueError, and changes nothing, for another format, a model that is wrapped by FSDP,
    distributed or compiled, or has no MLP to quantise nor one that is, saying what was left and
    why, or weights that `quantize_binary` refuses; TypeError for anything else than a module.

    Examples:
        >>> from torch import nn
        >>> from fusedmlp import quantize_model
        >>> class GatedMLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_proj = nn.Linear(128, 256, bias=False)
        ...         self.up_proj = nn.Linear(128, 256, bias=False)
        ...         self.down_proj = nn.Linear(256, 128, bias=False)
        ...         self.act_fn = nn.SiLU()
        ...     def forward(self, x):
        ...         return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        >>> report = quantize_model(nn.Sequential(GatedMLP(), GatedMLP()).bfloat16())
        >>> len(report.layers), report.before // report.after
        (2, 14)
    """
    op = "quantize_model"
    if format not in FORMATS:
        raise ValueError(f"{op}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    blocks = Blocks(checked(op, model))
    if other := _quantiser(model):
        raise ValueError(
            f"{op}: model must come from no quantiser of transformers, got one from {other}; its "
            "checkpoint has one, so load the model without it"
        )
    if "" in blocks.found:
        raise ValueError(
            f"{op}: model must hold its gated MLPs, got one itself; "
            "layers.BinaryGatedMLP.from_dense makes a block of it"
        )
    if not blocks.found and not any(True for _ in one_bit_blocks(model)):
        raise ValueError(f"{op}: {_nothing(model, blocks, format)}")
    model_before = nbytes(model)
    made = {name: blocks.block(name) for name in blocks.found}
    sizes = tuple(
        Quantized(name, nbytes(mlp), nbytes(made[name])) for name, (mlp, _) in blocks.found.items()
    )
    for name, block in made.items():
        model.set_submodule(name, block)
    if "transformers.modeling_utils" in sys.modules:
        from .pretrained import mark

        mark(model)
    return QuantizationReport(format, sizes, model_before, nbytes(model), tuple(blocks.left))


def _quantiser(model: nn.Module) -> str | None:
    """The class of the quantiser, another than ours, that a model of transformers came from."""
    quantisers = (getattr(module, "hf_quantizer", None) for module in model.modules())
    ours = f"{__name__.partition('.')[0]}."
    kinds = (type(q) for q in quantisers if q is not None)
    return next((kind.__name__ for kind in kinds if not kind.__module__.startswith(ours)), None)


def _nothing(model: nn.Module, blocks: Blocks, format: str) -> str:
    """Why there is nothing to quantise."""
    kind, (gate, up, down) = type(model).__name__, PROJECTIONS
    if not blocks.left:
        return (
            f"model must have a module that is {down}(act({gate}(x)) * {up}(x)), got none in {kind}"
        )
    left = "".join(f"\n{entry}" for entry in blocks.left)
    return (
        f"model must have an MLP that can be put into {format}, and of {kind} every one that has "
        f"{gate}, {up} and {down} was left:{left}"
    )
