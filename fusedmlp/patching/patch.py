"""patch(), unpatch(), patched(), register_patch(): which modules, and why not the others."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .. import _backend
from ..layers.binary import BinaryGatedMLP
from ..ops.binary_gated_mlp import OP
from .experts import register_experts
from .kept import stale
from .match import find
from .moe import ADAPTERS
from .plan import Plan, child, hooked
from .report import Entry, Report
from .swap import Patched, restore, swap

Only = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
Adapter = Callable[[nn.Module], "Plan | str"]

ORDER = "patch(model), then parallelize_module, then fully_shard, then torch.compile"
# What a report lists among the modules that were left. A module is patched by what it computes.
_LIKE_AN_MLP = re.compile(r"mlp|ffn|feed_?forward|experts?\b|moe", re.IGNORECASE)

_adapters: dict[type[nn.Module], Adapter] = {}


def register_patch(cls: type[nn.Module], adapter: Adapter) -> None:
    """Let patch() handle modules whose class is exactly `cls` by `adapter`.

    Args:
        cls: a class of modules. A second adapter for it replaces the first.
        adapter: called with a module; returns a `fusedmlp.patching.Plan`, or a str: why the module
            is left. A plan is frozen and picklable; its `run(module, *args)` becomes the forward.

    Only what the data flow of a forward does not show needs this: see fusedmlp/patching/match.py.
    Raises TypeError for other arguments.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_patch: cls must be a class of nn.Modules, got {cls!r}")
    if not callable(adapter):
        raise TypeError(f"register_patch: adapter must be callable, got {adapter!r}")
    _adapters[cls] = adapter


def _refuse_wrapped(op: str, model: nn.Module) -> None:
    """Nothing may hold on to a module's class or hooks yet: FSDP, torch.compile, DTensors."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    fsdps = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    optimised = (dynamo.OptimizedModule,) if dynamo else ()
    for name, module in model.named_modules():
        what = None
        if isinstance(module, fsdps):
            what = "wrapped by FSDP"
        elif isinstance(module, optimised) or module._compiled_call_impl is not None:
            what = "compiled"
        elif any(hasattr(p, "placements") for p in module._parameters.values()):
            what = "distributed, with DTensors for parameters"
        if what:
            raise ValueError(
                f"{op}: model must be a plain model, got {name or 'the model itself'} "
                f"({type(module).__name__}), {what}; in this order: {ORDER}"
            )


def _checked(op: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    _refuse_wrapped(op, model)
    return model


def _selected(model: nn.Module, only: Only) -> Callable[[str, nn.Module], bool]:
    if only is None:
        return lambda name, module: True
    if callable(only):
        return only
    one = isinstance(only, str) or not isinstance(only, Iterable)
    patterns: list[Any] = [only] if one else list(only)
    if not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"patch: only must be a pattern, patterns or a function, got {only!r}")
    if not patterns:
        raise ValueError("patch: only must hold a pattern, got none")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in model.named_modules()):
            raise ValueError(f"patch: only must match names of modules, got {pattern!r}")
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)


def _broken(name: str, module: Any, change: str) -> Entry:
    reason = f"patched before, and its calls raise now: {change}; unpatch(model) first"
    return Entry(name, module._own_class.__name__, None, None, reason)


def _not_called(module: nn.Module) -> str:
    if isinstance(module, nn.TransformerEncoderLayer):
        return "; in eval without gradients torch's fast path of the whole layer is taken instead"
    return ""


class _Walk:
    """One patch() over a model."""

    def __init__(self, model: nn.Module, only: Only, dtype_check: bool) -> None:
        self.wanted, self.dtype_check = _selected(model, only), dtype_check
        self.entries: list[Entry] = []
        self.swapped: list[nn.Module] = []
        # parameter or module -> all names that lead to it
        self.names: dict[int, list[str]] = defaultdict(list)
        for prefix, module in model.named_modules(remove_duplicate=False):
            self.names[id(module)].append(prefix)
            for name, p in module._parameters.items():
                if p is not None:
                    self.names[id(p)].append(f"{prefix}.{name}".lstrip("."))

    def visit(self, name: str, module: nn.Module) -> None:
        ours = type(module).__module__.startswith(f"{__name__.partition('.')[0]}.")
        if ours and not isinstance(module, Patched):
            if isinstance(module, BinaryGatedMLP) and self.wanted(name, module):
                self.one_bit(name, module)
            return
        inside: set[int] = set()
        if isinstance(module, Patched) or self.wanted(name, module):
            plan = module._plan if isinstance(module, Patched) else self.attempt(name, module)
            if plan is not None:
                if change := stale(module):
                    self.entries.append(_broken(name, module, change))
                    return
                self.entry(name, module, plan)
                inside = {id(child(module, path)) for path in plan.bypassed()}
        for key, submodule in module.named_children():
            if id(submodule) not in inside:
                self.visit(f"{name}.{key}".lstrip("."), submodule)

    def attempt(self, name: str, module: nn.Module) -> Plan | None:
        kind = type(module)
        adapter = _adapters.get(kind) or ADAPTERS.get(f"{kind.__module__}.{kind.__qualname__}")
        plan = find(module) if adapter is None else adapter(module)
        if plan is None:
            return None
        reason = plan if isinstance(plan, str) else self.obstacle(module, plan)
        if reason is None:
            assert isinstance(plan, Plan)
            plan.prepare(module)
            swap(module, plan)
            self.swapped.append(module)
            return plan
        alike = any(map(_LIKE_AN_MLP.search, (name.rpartition(".")[2], kind.__name__)))
        if adapter is not None or isinstance(plan, Plan) or alike:
            self.entries.append(Entry(name, kind.__name__, None, None, reason))
        return None

    def entry(self, name: str, module: Any, plan: Plan) -> None:
        kind, like = module._own_class.__name__, next(module.parameters())
        where = _backend.pick(plan.op, like)
        self.entries.append(Entry(name, kind, plan.op, where, plan.detail() + _not_called(module)))

    def one_bit(self, name: str, block: BinaryGatedMLP) -> None:
        """What quantize_model put there; a block that is in training is a layer like others."""
        if (w := block.gate_proj.packed) is not None:
            where, detail = _backend.pick(OP, w.scales), f"activation {block.activation!r}"
            self.entries.append(Entry(name, type(block).__name__, OP, where, detail))

    def obstacle(self, module: nn.Module, plan: Plan) -> str | None:
        """Why `plan` must not run `module` now."""
        if plan.method in module.__dict__:
            return f"its {plan.method} is set on the instance"
        if isinstance(module, torch.jit.ScriptModule):
            return "it is a ScriptModule"
        if len(self.names[id(module)]) > 1:
            return f"tied: it also is {self.others(module)}"
        parameters: list[nn.Parameter] = []
        for path in plan.bypassed():
            inner = child(module, path)
            if around := hooked(inner):
                return f"{path} {around}, which a fused call would pass by"
            if len(self.names[id(inner)]) > 1 and any(True for _ in inner.parameters()):
                return f"tied: {path} also is {self.others(inner)}"
            for key, p in inner.named_parameters():
                if type(p) is not nn.Parameter or not p.is_floating_point():
                    return f"{path}.{key} is a {type(p).__name__} of {p.dtype}: quantised"
                if len(self.names[id(p)]) > 1:
                    return f"tied: {path}.{key} also is {self.others(p)}"
                parameters.append(p)
        return plan.obstacle(module) or self.dtypes(plan, parameters)

    def others(self, shared: object) -> str:
        return " and ".join(self.names[id(shared)][:2])

    def dtypes(self, plan: Plan, parameters: Sequence[Tensor]) -> str | None:
        found = list(dict.fromkeys(p.dtype for p in parameters))
        if self.dtype_check and (len(found) > 1 or found[0] not in _backend.TRITON_DTYPES):
            takes = ", ".join(str(d).removeprefix("torch.") for d in _backend.TRITON_DTYPES)
            return f"its dtypes are {', '.join(map(str, found))}; kernels take one of {takes}"
        try:
            _backend.pick(plan.op, parameters[0])
        except (RuntimeError, TypeError) as error:
            return str(error)
        return None


def patch(
    model: nn.Module,
    *,
    only: Only = None,
    dtype_check: bool = True,
    quantize: str | None = None,
) -> Report:
    """Run the MLPs of `model` through fusedmlp, in place: gated_mlp, mlp, moe_mlp.

    An MLP is found by what its forward computes, whatever the names: Llama, Mistral, Qwen, Gemma,
    Phi-3, OLMo, GPT-NeoX, GPT-2, BERT, ViT and many others of transformers, and your own. Top-1
    mixtures of experts (Switch, Llama 4) are known by their classes.

    Args:
        model: any nn.Module, on any device, meta too. Patch before parallelize_module, fully_shard
            and torch.compile; optimisers, checkpoints and hooks on the MLPs do not care.
        only: names of modules to look at, as patterns of fnmatch ("model.layers.0.*"), or a
            function of name and module. Default: all.
        dtype_check: leave an MLP whose parameters differ in dtype or have one that no kernel takes;
            False patches it all the same, and its call says what is wrong.
        quantize: "q1_0" puts every gated MLP of a Llama-type model into one bit a weight first, by
            `quantize_model`; for good, which unpatch() does not undo. Not together with `only`. The
            report lists the blocks among the patched, then and later.

    Parameters, state_dict keys, hooks, device, dtype and the modules themselves stay. An MLP is
    left where a fused call would be something else: a projection that is quantised, adapted, hooked
    or tied, a dtype or an activation without a kernel. A second patch() changes nothing.

    Returns a `Report`, a line for each module. Raises ValueError for a model that is wrapped by FSDP,
    distributed or compiled, for a pattern that matches nothing and for no pattern; TypeError for
    another type of an argument; with `quantize` what quantize_model raises.
    """  # noqa: E501
    _checked("patch", model)
    if quantize is None:
        return _run(model, only, dtype_check)[0]
    if only is not None:
        raise ValueError(f"patch: only must be None with quantize={quantize!r}, got {only!r}")
    from ..quantize import quantize_model  # which finds its MLPs by this file

    quantized = quantize_model(model, format=quantize)
    return dataclasses.replace(_run(model, only, dtype_check)[0], quantized=quantized)


def _run(model: nn.Module, only: Only, dtype_check: bool) -> tuple[Report, list[nn.Module]]:
    if not isinstance(dtype_check, bool):
        raise TypeError(f"patch: dtype_check must be True or False, got {dtype_check!r}")
    register_experts()
    walk = _Walk(model, only, dtype_check)
    try:
        walk.visit("", model)
    except BaseException:
        restore("patch", walk.swapped)
        raise
    return Report(tuple(walk.entries)), walk.swapped


def unpatch(model: nn.Module) -> None:
    """Undo patch(): every module of `model` runs its own forward again. Nothing else changes.

    Raises ValueError, as patch() does, where the model was wrapped meanwhile.
    """
    restore("unpatch", _checked("unpatch", model).modules())


@contextmanager
def patched(model: nn.Module, *, only: Only = None, dtype_check: bool = True) -> Iterator[Report]:
    """patch() for the length of a with block, whatever ends it; gives the report.

    What was patched before stays patched. Arguments and errors as in patch(). Raises ValueError at
    the end for a module that was wrapped inside (fully_shard), when all others are restored; a
    warning where the block already ends in an exception.
    """
    report, swapped = _run(_checked("patched", model), only, dtype_check)
    try:
        yield report
    except BaseException:
        try:
            restore("patched", swapped)
        except ValueError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=3)
        raise
    restore("patched", swapped)
