"""The plans of top-1 mixtures of experts in transformers: moe_mlp behind the model's own router.

| block | router | experts |
|---|---|---|
| Llama4TextMoe | sigmoid of the largest logit, on the input | (E, D, 2H) and (E, H, D), views |
| SwitchTransformersSparseMLP | softmax, with a capacity | E modules of two Linears |

Routers are called as they are. Which of their tensors is which, and whether they see sequences or
tokens, is read off the block's own forward (routed.py). What else the block holds (a shared expert)
is called too, and is patched on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.parts.around import hooked
from ..ops.moe_mlp import moe_mlp
from ..ops.top1_route import route_to
from .activation import name_by_values
from .dense import idle, is_projection, local
from .form import Form
from .lora import base_of, wrappers_of, wraps_parameter
from .lora_experts import block_refusal, described, factors_of, lora_of
from .plan import Plan, child, passed_by
from .routed import ToExperts, ToScale, to_experts, to_scale
from .stack import lie_together, stacked
from .trace import NoMatch


@dataclass(frozen=True)
class Llama4(Plan):
    activation: str = "silu"
    routed: ToScale = ToScale(scores=0, logits=1)

    @property
    def op(self) -> str:
        return "moe_mlp"

    def detail(self) -> str:
        return f"activation {self.activation!r}, packed 'gate_up'"

    def bypassed(self) -> tuple[str, ...]:
        return ("experts", "experts.act_fn")

    def passes_by(self) -> tuple[str, ...]:
        return self.bypassed()

    def wrapped(self) -> tuple[str, ...]:
        return ("experts",)

    def _form(self) -> Form:
        return Form("gate_up_proj", self.activation, "gate_up", transposed=True, bias=False)

    def _refusal(self, wrapper: Any) -> str | None:
        return block_refusal(wrapper, self._form())

    def way(self, module: Any) -> tuple[str | None, str]:
        wrappers = wrappers_of(module.experts)[1]
        why = next(filter(None, map(self._refusal, wrappers)), None)
        return (None, f"{why}, so its own forward is called") if why else (self.op, "")

    def waits(self, module: nn.Module) -> bool:
        return True

    def notes(self, module: Any) -> str:
        return described(wrappers_of(module.experts)[1], self._refusal)

    def example(self, module: Any, rows: int, like: Tensor) -> tuple[Tensor, ...]:
        (width, *_) = [p.shape[1] for p in module.router.parameters() if p.dim() == 2]
        return (like.new_zeros(1, rows, width),)

    def run(self, module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        experts: Any
        experts, wrappers = wrappers_of(module.experts)
        split = getattr(module, "_split", None)  # a module that has adopted a hub layer has none
        if wrappers and (split is not None or self.way(module)[1]):
            if split is not None:
                raise passed_by(module, "PEFT's wrappers stand around experts spread over ranks")
            own: tuple[Tensor, Tensor] = module._own_class.forward(module, hidden_states)
            return own
        low = {wrapper.parameter_name: factors_of(wrapper) for wrapper in wrappers}
        lora = lora_of(low.get("gate_up_proj"), low.get("down_proj"), self._form())
        options: dict[str, Any] = {} if lora is None else {"lora": lora}
        x = hidden_states.reshape(-1, module.hidden_dim)
        routed = module.router(x)
        scores, logits = routed[self.routed.scores], routed[self.routed.logits]
        expert = logits.argmax(1)
        score = scores.gather(1, expert.unsqueeze(1))
        w, w_down = local(experts.gate_up_proj), local(experts.down_proj)
        ones = torch.ones_like(expert, dtype=torch.float32)
        call = moe_mlp if split is None else split
        y = call(
            x * score, route_to(expert, ones, module.num_experts), w.mT, None, w_down.mT,
            activation=self.activation, packed="gate_up", **options,
        )  # fmt: skip
        return module.shared_expert(x) + y, logits


@dataclass(frozen=True)
class Switch(Plan):
    activation: str = "relu"
    num_experts: int = 0
    routed: ToExperts = ToExperts(mask=0, prob=1, flat=False)

    @property
    def op(self) -> str:
        return "moe_mlp"

    def prepare(self, module: Any) -> None:
        vars(module)["_together"] = {
            name: lie_together([getattr(e, name).weight for e in module.experts.values()])
            for name in ("wi", "wo")
        }

    def restore(self, module: Any) -> None:
        for together in vars(module).pop("_together").values():
            together.end()

    def detail(self) -> str:
        return (
            f"activation {self.activation!r}; experts moved into one memory, and copied on every "
            "call once they are apart again (.to, FSDP) or compiled; the model's own forward while "
            "dropout is at work"
        )

    def experts(self) -> tuple[str, ...]:
        return tuple(f"experts.expert_{i}" for i in range(self.num_experts))

    def projections(self) -> tuple[str, ...]:
        return tuple(f"{e}.{name}" for e in self.experts() for name in ("wi", "wo"))

    def passes_by(self) -> tuple[str, ...]:
        return ("experts", *self.experts(), *(f"{e}.act" for e in self.experts()))

    def bypassed(self) -> tuple[str, ...]:
        return (*self.passes_by(), *self.projections())

    def way(self, module: nn.Module) -> tuple[str | None, str]:
        for path in self.projections():
            if _adapted(child(module, path)):
                return None, (
                    f"{path} has an adapter of PEFT's, so its own forward is called; "
                    "unpatch(model), then patch(model) fuse its experts one by one"
                )
        return self.op, ""

    def waits(self, module: nn.Module) -> bool:
        return True

    def obstacle(self, module: nn.Module) -> str | None:
        for path in self.projections():
            if not is_projection(inner := child(module, path)) and not _adapted(inner):
                return f"{path} is a {type(inner).__name__}, no plain projection"
        return None

    def example(self, module: Any, rows: int, like: Tensor) -> tuple[Tensor, ...]:
        (width, *_) = [p.shape[1] for p in module.router.parameters() if p.dim() == 2]
        return (like.new_zeros(1, rows, width),)

    def run(self, module: Any, hidden_states: Tensor) -> Tensor:
        experts = list(module.experts.values())
        for i, e in enumerate(experts):
            for inner in (e.wi, e.wo):
                if around := hooked(inner):
                    raise passed_by(module, f"a projection of expert {i} {around}")
                if _adapted(inner):
                    return module._own_class.forward(module, hidden_states)
                if not is_projection(inner):
                    what = type(inner).__name__
                    raise passed_by(module, f"a projection of expert {i} is now a {what}")
        if not all(idle(e.dropout) for e in experts):
            return module._own_class.forward(module, hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed = module.router(x if self.routed.flat else hidden_states)
        one_hot, prob = routed[self.routed.mask], routed[self.routed.prob]
        # Past its capacity a token has no 1: an expert that does not exist drops it.
        E = module.router.num_experts
        expert = torch.where(one_hot.sum(-1) > 0, one_hot.argmax(-1), E)
        routing = route_to(expert.flatten(), prob.flatten(), E)
        w, w_down = (
            stacked(together, [local(getattr(e, name).weight) for e in experts])
            for name, together in module._together.items()
        )
        call = moe_mlp if module._split is None else module._split
        y = call(x, routing, w, None, w_down, activation=self.activation)
        return y.view(hidden_states.shape)


def _adapted(projection: nn.Module) -> bool:
    """Whether it is in a layer of PEFT's, which the model's own forward calls."""
    return base_of(projection) is not projection or wraps_parameter(projection)


def _llama4(module: Any) -> Plan | str:
    if module.top_k != 1:
        return f"it takes {module.top_k} experts a token, not 1"
    act: Any = child(module, "experts.act_fn")
    activation = name_by_values(act)
    if activation is None:
        return f"{type(act).__name__} is no activation that has a kernel"
    try:
        return Llama4(activation=activation, routed=to_scale(module))
    except NoMatch as error:
        return str(error)


def _switch(module: Any) -> Plan | str:
    experts = list(module.experts.values())
    activation = name_by_values(experts[0].act)
    if activation is None:
        return f"{type(experts[0].act).__name__} is no activation that has a kernel"
    for e in experts:
        for name in ("wi", "wo"):
            if type(getattr(e, name)) is not nn.Linear or getattr(e, name).bias is not None:
                return f"an expert's {name} is no plain Linear without bias"
    try:
        routed = to_experts(module)
    except NoMatch as error:
        return str(error)
    return Switch(activation=activation, num_experts=len(experts), routed=routed)


_MODELS = "transformers.models"
ADAPTERS: dict[str, Callable[[Any], Plan | str]] = {
    f"{_MODELS}.llama4.modeling_llama4.Llama4TextMoe": _llama4,
    f"{_MODELS}.switch_transformers.modeling_switch_transformers.SwitchTransformersSparseMLP": (
        _switch
    ),
}
