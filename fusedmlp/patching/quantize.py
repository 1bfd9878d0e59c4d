"""quantize_model(model) -> report: the gated MLPs of a loaded model in one bit a weight, in place.

A gated MLP is a module whose forward is down_proj(act(gate_proj(x)) * up_proj(x)) and nothing else,
with nn.Linears of these names, as in Llama, Qwen, Mistral and their kin: found, and left where a
block put in its place would lose something, as by patch(). Rounding a model that was not trained
with one-bit weights leaves nothing of it (see fusedmlp/weights/binary.py): this is for models that
were, or to measure speed and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.binary import BinaryGatedMLP
from ..reference.binary import GROUP
from .dense import Dense
from .find import find
from .plan import Plan, hooked
from .projection import called
from .report import Entry, QuantizationReport, Quantized
from .steps import describe
from .swap import Patched
from .walk import Walk, checked

FORMATS = ("q1_0",)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def nbytes(module: nn.Module) -> int:
    """The bytes of parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values())


class _Blocks(Walk):
    """The gated MLPs of a model: `found`, name -> module and plan, and `left`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None, dtype_check=False)
        self.found: dict[str, tuple[nn.Module, Dense]] = {}
        self.left: list[Entry] = []
        for name, module in model.named_modules():
            patched = isinstance(module, Patched)
            if type(module).__module__.startswith(f"{__name__.partition('.')[0]}.") and not patched:
                continue
            plan: Any = module._plan if isinstance(module, Patched) else find(module)
            if isinstance(plan, Dense) and plan.gated:
                plan = self.reason(module, plan) or plan
            elif not all(hasattr(module, projection) for projection in PROJECTIONS):
                continue
            if isinstance(plan, Dense) and plan.gated:
                self.found[name] = module, plan
            else:
                reason = plan if isinstance(plan, str) else "it is no MLP of three projections"
                self.left.append(Entry(name, type(module).__name__, None, None, reason))

    def dtypes(self, plan: Plan, parameters: Sequence[Tensor]) -> str | None:
        """Any floating dtype is rounded, and each matrix by itself."""
        return None

    def reason(self, module: nn.Module, plan: Dense) -> str | None:
        """Why a BinaryGatedMLP must not take the place of `module`."""
        paths = (*plan.first, plan.down)
        if paths != PROJECTIONS or plan.method != "forward" or plan.cut:
            return f"its projections must be {', '.join(PROJECTIONS)}, got {', '.join(paths)}"
        if steps := (*plan.head, *plan.between, *plan.tail):
            return f"a one-bit block would lose {', '.join(map(describe, steps))}"
        if around := hooked(module):
            return f"it {around}, which a one-bit block would lose"
        linears = [getattr(module, projection) for projection in PROJECTIONS]
        for projection, linear in zip(PROJECTIONS, linears, strict=True):
            if why := called(linear):
                return f"{projection} {why}"
        for projection, linear in zip(PROJECTIONS, linears, strict=True):
            if type(linear) is not nn.Linear:
                return f"{projection} is a {type(linear).__name__}, not a plain nn.Linear"
            if linear.in_features % GROUP:
                width = linear.in_features
                return f"{projection} must have rows of a multiple of {GROUP}, got {width}"
        return self.obstacle(module, plan)


def quantize_model(model: nn.Module, format: str = "q1_0") -> QuantizationReport:
    """Replace every gated MLP of `model` by a packed `layers.BinaryGatedMLP`, in place.

    The new blocks keep the names of the projections, have no latent weights and give a gradient to
    their input. An MLP is left, with the reason in the report, where that would be something else:
    other names, something between or after the projections, a hook, a forward set on the instance,
    a projection that is adapted or tied, an activation without a kernel, a width that is no
    multiple of 128. A second call changes nothing. To load a model that was saved after it, call it
    on a fresh one before load_state_dict.

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
    blocks = _Blocks(checked(op, model))
    if "" in blocks.found:
        raise ValueError(
            f"{op}: model must hold its gated MLPs, got one itself; "
            "layers.BinaryGatedMLP.from_dense makes a block of it"
        )
    if not blocks.found and not any(map(_is_one_bit, model.modules())):
        left = "".join(f"\n{entry}" for entry in blocks.left)
        raise ValueError(
            f"{op}: model must have a module that is {PROJECTIONS[2]}(act({PROJECTIONS[0]}(x)) * "
            f"{PROJECTIONS[1]}(x)), got none in {type(model).__name__}{left}"
        )
    model_before = nbytes(model)
    made = {name: _block(*found) for name, found in blocks.found.items()}
    sizes = tuple(
        Quantized(name, nbytes(mlp), nbytes(made[name])) for name, (mlp, _) in blocks.found.items()
    )
    for name, block in made.items():
        model.set_submodule(name, block)
    return QuantizationReport(format, sizes, model_before, nbytes(model), tuple(blocks.left))


def _is_one_bit(module: nn.Module) -> bool:
    return isinstance(module, BinaryGatedMLP) and module.gate_proj.packed is not None


def _block(mlp: nn.Module, plan: Dense) -> BinaryGatedMLP:
    gate, up, down = (getattr(mlp, projection) for projection in PROJECTIONS)
    return BinaryGatedMLP.from_dense(gate, up, down, plan.activation).train(mlp.training)
