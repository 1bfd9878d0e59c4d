"""The walk over a model: which modules a plan may run, and why not the others."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import choice
from ..layers.binary import BinaryGatedMLP
from ..layers.parts.around import bare
from ..layers.parts.widths import off_fast_loads
from ..ops import binary_gated_mlp, gated_act
from .around import by_accelerate, passed_over
from .find import Chained, Direct, find
from .kept import stale
from .lora import base_of, beneath, wrappers_of, wraps_parameter
from .lora_experts import attach, described
from .moe import ADAPTERS
from .plan import Plan, child
from .projection import called
from .report import Entry
from .router import experts_among, plan_of_router, routes
from .swap import Patched, swap

Only = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
Adapter = Callable[[nn.Module], "Plan | str"]

ORDER = "patch(model), then parallelize_module, then fully_shard, then torch.compile"
# What a report lists among the modules that were left. A module is patched by what it computes.
_LIKE_AN_MLP = re.compile(r"mlp|ffn|feed_?forward|experts?\b|moe", re.IGNORECASE)

# What register_patch() was given; it goes before ADAPTERS.
REGISTERED: dict[type[nn.Module], Adapter] = {}


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
        elif bare(module) and any(hasattr(p, "placements") for p in module._parameters.values()):
            # With a forward of its own (transformers' tp_plan) it is called, and knows its parts.
            what = "distributed, with DTensors for parameters"
        if what:
            raise ValueError(
                f"{op}: model must be a plain model, got {name or 'the model itself'} "
                f"({type(module).__name__}), {what}; in this order: {ORDER}"
            )


def checked(op: str, model: Any) -> nn.Module:
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
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = " and ".join(map(repr, get_close_matches(pattern, names, 2, 0)))
            raise ValueError(
                f"patch: only must match names of modules, such as {near}, got {pattern!r}"
            )
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)


def _broken(name: str, module: Any, change: str) -> Entry:
    reason = f"patched before, and its calls raise now: {change}; unpatch(model) first"
    return Entry(name, module._own_class.__name__, None, None, reason)


def _sample(module: nn.Module) -> Tensor:
    """A tensor as the module's calls have."""
    floating = (p for p in module.parameters() if p.is_floating_point())
    return next(floating, torch.empty(0, device=getattr(module, "device", None)))


def _not_called(module: nn.Module) -> str:
    if isinstance(module, nn.TransformerEncoderLayer):
        return "; in eval without gradients torch's fast path of the whole layer is taken instead"
    return ""


class Walk:
    """One patch() over a model."""

    def __init__(
        self,
        model: nn.Module,
        only: Only,
        dtype_check: bool,
        recompute: bool = False,
        invariant: bool = False,
    ) -> None:
        self.wanted, self.dtype_check = _selected(model, only), dtype_check
        self.recompute, self.invariant = recompute, invariant
        self.entries: list[Entry] = []
        self.swapped: list[nn.Module] = []
        self.wrappers: dict[int, list[nn.Module]] = {}  # PEFT's, around stacked experts
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
        chained: Entry | None = None
        if wraps_parameter(module):
            experts, found = wrappers_of(module)
            self.wrappers.setdefault(id(experts), found)
        elif isinstance(module, Patched) or self.wanted(name, module):
            plan = module._plan if isinstance(module, Patched) else self.attempt(name, module)
            if isinstance(plan, Direct):
                self.entries.append(Entry(name, type(module).__name__, None, None, plan))
            elif isinstance(plan, Chained):
                chained = Entry(name, type(module).__name__, None, None, plan)
            elif plan is not None:
                if change := stale(module):
                    self.entries.append(_broken(name, module, change))
                    return
                self.entry(name, module, plan)
                inside = {id(child(module, path)) for path in plan.bypassed()}
        before = len(self.entries)
        for key, submodule in module.named_children():
            if id(submodule) not in inside:
                self.visit(f"{name}.{key}".lstrip("."), submodule)
        if chained is not None and len(self.entries) == before:
            self.entries.append(chained)
        if (experts := experts_among(module.children())) is not None:
            self.visit_router(name, module, experts)

    def visit_router(self, name: str, block: nn.Module, experts: Any) -> None:
        """The router beside `experts`, if it is patched or can be."""
        E = experts.down_proj.shape[0]
        for key, module in block.named_children():
            path = f"{name}.{key}".lstrip(".")
            if isinstance(module, Patched) or not routes(module, E):
                continue
            if not self.wanted(path, module):
                continue
            plan = plan_of_router(module)
            reason = plan if isinstance(plan, str) else self.obstacle(module, plan)
            if isinstance(plan, Plan) and reason is None:
                taken = self.run_by(module, plan)
                vars(experts)["_router"] = module
                self.entry(path, module, taken)
            else:
                self.entries.append(Entry(path, type(module).__name__, None, None, str(reason)))

    def attempt(self, name: str, module: nn.Module) -> Plan | Chained | None:
        """The plan that the module runs by now; or why not, to be told unless a part of it has a
        line of its own; or None, the line written."""
        kind = type(module)
        adapter = REGISTERED.get(kind) or ADAPTERS.get(f"{kind.__module__}.{kind.__qualname__}")
        plan = find(module) if adapter is None else adapter(module)
        if plan is None:
            return None
        reason = plan if isinstance(plan, str) else self.obstacle(module, plan)
        if reason is None:
            assert isinstance(plan, Plan)
            return self.run_by(module, plan)
        alike = any(map(_LIKE_AN_MLP.search, (name.rpartition(".")[2], kind.__name__)))
        if adapter is not None or isinstance(plan, Plan) or alike:
            self.entries.append(Entry(name, kind.__name__, None, None, reason))
            return None
        return plan if isinstance(plan, Chained) else None

    def run_by(self, module: nn.Module, plan: Plan) -> Plan:
        """Have `module` run by `plan` with the options of this patch(), which is what it gives."""
        plan = plan.recomputing() if self.recompute else plan
        plan = replace(plan, invariant=True) if self.invariant else plan
        plan.prepare(module)
        swap(module, plan)
        self.swapped.append(module)
        return plan

    def entry(self, name: str, module: Any, plan: Plan) -> None:
        kind, (op, why) = module._own_class.__name__, plan.way(module)
        if op is None:
            self.entries.append(Entry(name, kind, None, None, why))
            return
        where, detail = choice.pick(op, _sample(module)), plan.detail() + _not_called(module)
        wrappers = self.wrappers.get(id(module), [])
        self.swapped += [w for w in wrappers if attach(w)]
        if added := why or plan.notes(module) or described(wrappers):
            detail = f"{detail}; {added}"
        spared, slow = 0 if why else plan.spared(module), off_fast_loads(plan.matrices(module))
        more: Any = {"spared": spared, "slow": tuple(slow), "elsewhere": choice.elsewhere(where)}
        self.entries.append(Entry(name, kind, op, where, detail, bool(why), **more))

    def one_bit(self, name: str, block: BinaryGatedMLP) -> None:
        """What quantize_model put there; a block that is in training is a layer like others."""
        if (w := block.packed_weight()) is not None:
            adapted, detail = ", ".join(block.adapted()), f"activation {block.activation!r}"
            called = block.called() if adapted else ""
            if called:
                detail += f"; {adapted} adapted, so projections are called, as {called}"
            elif adapted:
                detail += f"; LoRA inside: {adapted}"
            op = (gated_act if called else binary_gated_mlp).OP
            where = choice.pick(op, w.scales)
            more: Any = {"partly": bool(called), "elsewhere": choice.elsewhere(where)}
            self.entries.append(Entry(name, type(block).__name__, op, where, detail, **more))

    def obstacle(self, module: nn.Module, plan: Plan) -> str | None:
        """Why `plan` must not run `module` now."""
        if isinstance(module, torch.jit.ScriptModule):
            return "it is a ScriptModule"
        if plan.method in module.__dict__ and not by_accelerate(module):
            return f"its {plan.method} is set on the instance"
        if len(self.names[id(module)]) > 1:
            return f"tied: it also is {self.others(module)}"
        op, why = plan.way(module)
        if op is None and not plan.waits(module):
            return why
        read: list[tuple[str, Any]] = [(n, getattr(module, n)) for n in plan.own_parameters(module)]
        for path in plan.bypassed():
            inner = beneath(child(module, path))
            if path in plan.may_call():
                inner = base_of(child(module, path))
                if called(inner):
                    continue
            if around := passed_over(inner):
                return f"{path} {around}, which a fused call would pass by"
            if len(self.names[id(inner)]) > 1 and any(True for _ in inner.parameters()):
                return f"tied: {path} also is {self.others(inner)}"
            read += ((f"{path}.{key}", p) for key, p in inner.named_parameters())
        for name, p in read:
            if type(p) is not nn.Parameter or not p.is_floating_point():
                return f"{name} is a {type(p).__name__} of {p.dtype}: quantised"
            if len(self.names[id(p)]) > 1:
                return f"tied: {name} also is {self.others(p)}"
        return plan.obstacle(module) or self.dtypes(plan, [p for _, p in read])

    def others(self, shared: object) -> str:
        return " and ".join(self.names[id(shared)][:2])

    def dtypes(self, plan: Plan, parameters: Sequence[Tensor]) -> str | None:
        if not parameters:
            return None
        found = list(dict.fromkeys(p.dtype for p in parameters))
        if self.dtype_check and (len(found) > 1 or found[0] not in choice.TRITON_DTYPES):
            takes = ", ".join(str(d).removeprefix("torch.") for d in choice.TRITON_DTYPES)
            return f"its dtypes are {', '.join(map(str, found))}; kernels take one of {takes}"
        try:
            choice.pick(plan.op, parameters[0])
        except (RuntimeError, TypeError) as error:
            return str(error)
        return None
