"""E FeedForwards of one shape, their parameters stacked: one tensor (E, ...) for each name.

The parameters are the stacks, under names with underscores for an expert's dots: see stacked.py.
`experts[i]` is a FeedForward over views of expert i; forward neither stacks nor copies. To an
optimizer and to requires_grad_, which need leaves, an expert alone cannot be given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ... import check
from ...backends import choice
from ...backends.cpu.traced import Rows, activated, by_rows
from ...check.experts import autocast_prob, check_routing
from ...check.layer import check_x
from ...ops.moe_mlp import moe_mlp
from ...packing import Packed
from ...reference import Routing
from ...reference.moe import by_expert
from ...weights.masks import PackedMasks, pack_masks
from ..feedforward import FeedForward, drop_aliases
from ..glu import GLUBase
from ..masked_glu import MaskedGLU, other_masks
from .activation import name_of
from .block import passes_through
from .stacked import Stacked
from .widths import Reader

_MASKS_OF = ("net.0.mask", "net.0.packed.planes")
_MASKS, _OWN_MASKS = "net.0.packed", "net_0_packed"  # in an expert, and here


def _copied(expert: FeedForward, tensors: Iterable[tuple[Tensor, Tensor]]) -> FeedForward:
    """A copy with (old, new) tensors. Copies of fake ones would be of another FakeTensorMode."""
    return copy.deepcopy(expert, {id(old): new for old, new in tensors})


class StackedExperts(Stacked, Reader):
    """num FeedForwards, each made by `make()`; see the file.

    forward(x, routing) is moe_mlp in one fused call as long as nothing stands between an expert's
    two projections: no active dropout, no norm before, no masks, an activation with a kernel.
    Otherwise each expert runs on its own tokens in PyTorch, for which the host waits for the
    routing. On a CPU those in use alone run, also under torch.compile, but for a norm or an
    activation that has no kernel; there, and on a GPU, every expert then runs on every token.
    """

    LOGITS = "net_0_mask"  # for fusedmlp.freeze_masks

    def __init__(self, num: int, make: Callable[[], FeedForward]) -> None:
        super().__init__()
        made = [make() for _ in range(num)]
        if next(made[0].buffers(), None) is not None:
            raise TypeError(
                "StackedExperts: an expert's activation or norm must have no buffers, which cannot "
                "be stacked; got one with"
            )
        self.num_experts = num
        # In a tuple, so that it is no submodule: it holds settings and structure, no parameters.
        parameters = made[0].parameters()
        on_meta = ((p, nn.Parameter(torch.empty_like(p, device="meta"))) for p in parameters)
        self._template = (_copied(made[0], on_meta),)
        self._names: dict[str, str] = {}
        for name, _ in made[0].named_parameters():
            own = name.replace(".", "_")
            self._names[own] = name
            stacked = torch.stack([e.get_parameter(name).detach() for e in made])
            self.register_parameter(own, nn.Parameter(stacked))
        self.net_0_packed: PackedMasks | None = None

    def init_weights_(self) -> None:
        """Give every expert its initial values again, or at last on a module built on meta."""
        for i in range(self.num_experts):
            self[i].init_weights_()

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self) -> Iterator[FeedForward]:
        return (self[i] for i in range(self.num_experts))

    def __getitem__(self, i: int) -> FeedForward:
        """Expert i over views: what is written there is written here, and what is differentiated
        there gets its gradient here. The module is made anew on each access, with the `grad` of
        then."""
        i = range(self.num_experts)[i]
        template = self._template[0]
        # All of them give way to views.
        tensors = (*template.parameters(), *template.buffers())
        expert = _copied(template, ((t, t) for t in tensors)).train(self.training)
        for name, stacked in self._stacks():
            with torch.enable_grad():  # or requires_grad_ would take the view for a leaf
                view = stacked[i]
            view.grad = None if stacked.grad is None else stacked.grad[i]
            owner, _, leaf = name.rpartition(".")
            module = expert.get_submodule(owner)
            held = module._parameters if leaf in module._parameters else module._buffers
            held[leaf] = view  # type: ignore[assignment]
        return expert

    def _stack(self, own: str) -> Tensor:
        stack = super()._stack(own)
        # Packed masks of all experts are those of one weight of E H rows.
        return stack.unflatten(0, (len(self), -1)) if own.startswith(_OWN_MASKS) else stack

    def unstack(self, state: dict[str, Any], prefix: str) -> None:
        super().unstack(state, prefix)
        if self.net_0_packed is not None:
            width = state.pop(f"{prefix}{_OWN_MASKS}._extra_state")
            for i in range(len(self)):
                state[f"{prefix}{i}.{_MASKS}._extra_state"] = width.clone()

    def take_items(
        self,
        state: dict[str, Any],
        prefix: str,
        strict: bool,
        missing: list[str],
        errors: list[str],
    ) -> None:
        """What an expert has beside stacks: names that repeat others, and the width of masks."""
        # Stacked or an expert at a time.
        frozen, logits = (
            any(f"{prefix}{name}" in state for name in names)
            for names in (
                (f"{_OWN_MASKS}.planes", f"0.{_MASKS}.planes"), ("net_0_mask", "0.net.0.mask"),
            )
        )  # fmt: skip
        if hint := other_masks(prefix, self.net_0_packed is not None, frozen, logits):
            errors.append(hint)
        for i in range(len(self)):
            drop_aliases(self._template[0], state, f"{prefix}{i}.")
            if self.net_0_packed is not None and f"{prefix}{i}.{_MASKS}.planes" in state:
                self._template[0].get_submodule(_MASKS).check_saved(state, f"{prefix}{i}.{_MASKS}.")  # type: ignore[operator]
                width = f"{prefix}{i}.{_MASKS}._extra_state"
                if state.pop(width, None) is None and strict:
                    missing.append(width)
                own = f"{prefix}{_OWN_MASKS}._extra_state"
                state[own] = self.net_0_packed.get_extra_state()
        super().take_items(state, prefix, strict, missing, errors)

    @property
    def has_masks(self) -> bool:
        """Whether the experts have masks over elements, as logits or frozen."""
        glu = self._template[0].net[0]
        return isinstance(glu, MaskedGLU) and glu.mask_mode == "element"

    def freeze_masks(self) -> None:
        """`MaskedGLU.freeze_masks` of every expert, for good; a state_dict then has its bits.

        Raises RuntimeError where the experts have no masks over elements or these are frozen,
        ValueError for a logit that is not finite.
        """
        glu = self._template[0].net[0]
        if not isinstance(glu, MaskedGLU):
            raise RuntimeError(
                "StackedExperts: freeze_masks() needs experts with a masked glu_variant, got "
                f"{self._template[0].glu_variant!r}"
            )
        glu.check_unfrozen()
        logits = self.get_parameter("net_0_mask")
        packed = [pack_masks(own) for own in logits]
        planes = torch.cat([one.planes for one in packed])
        self.net_0_packed = PackedMasks(planes, logits.shape[-1])
        glu.replace_masks(packed[0].to("meta"))
        del self.net_0_mask, self._names["net_0_mask"]
        self._names[f"{_OWN_MASKS}.planes"] = f"{_MASKS}.planes"

    def _parts(self) -> dict[str, Tensor | None]:
        """The arguments of moe_mlp that hold parameters."""
        own = dict(self._stacks())
        first, last = ("net.0.proj", "net.2") if self._gated else ("net.0", "net.3")
        return {
            "w_gate": own[f"{first}.weight"], "w_up": None, "w_down": own[f"{last}.weight"],
            "b_gate": own.get(f"{first}.bias"), "b_down": own.get(f"{last}.bias"),
        }  # fmt: skip

    @property
    def _gated(self) -> bool:
        return self._template[0].glu_variant != "none"

    def _fused_activation(self) -> str | None:
        """The kernel's name of the experts' activation if all of an expert can be fused."""
        template = self._template[0]
        if isinstance(template.net[0], MaskedGLU):
            return None
        act = cast(GLUBase, template.net[0]).activation if self._gated else template.net[1]
        dropout = template.net[1] if self._gated else template.net[2]
        idle = not self.training or passes_through(dropout)
        return name_of(cast(nn.Module, act)) if idle and template.pre_norm is None else None

    def path(self) -> str:
        """For explain(): whether the experts run as one call now."""
        activation = self._fused_activation()
        if activation is None:
            return f"{self.num_experts} experts one by one in PyTorch, each: {self[0].path()}"
        return f"{self.num_experts} experts in one call, fused as {activation!r}"

    def _reads(self) -> Iterator[tuple[str, Tensor | int]]:
        one = next(self._template[0]._reads(), None)
        return iter(()) if one is None else super()._reads()

    def extra_repr(self) -> str:
        return self._noted("recompute=True" if self._template[0].recompute else "")

    def _slices(self) -> list[dict[str, Tensor]]:
        """Every expert's tensors by their names in FeedForward, as views with gradients."""
        parts = {name: stacked.unbind() for name, stacked in self._stacks()}
        return [{name: views[i] for name, views in parts.items()} for i in range(self.num_experts)]

    def _slice(self, i: int) -> dict[str, Tensor]:
        return {name: stacked[i] for name, stacked in self._stacks()}

    def _one(self, own: dict[str, Tensor], x: Tensor) -> Tensor:
        """x through the expert whose tensors are `own`, one of `_slices`."""
        self._template[0].train(self.training)
        return cast(Tensor, functional_call(self._template[0], own, (x,)))

    def forward(self, x: Tensor, routing: Routing | Tensor) -> Tensor:
        """prob * expert(x), and 0 for dropped tokens. x (..., dim). Of probabilities (T, E) in the
        place of a routing, the sum of prob_e expert_e(x)."""
        if isinstance(routing, Tensor):
            return self._mixture(x, routing)
        activation = self._fused_activation()
        if activation is not None:
            options: dict[str, Any] = {
                "activation": activation, "packed": "up_gate" if self._gated else None,
            }  # fmt: skip
            if self._template[0].recompute:
                options["recompute"] = True
            return moe_mlp(x, routing, **self._parts(), **options)  # type: ignore[arg-type]
        flat = x.reshape(-1, x.shape[-1])
        if choice.for_cpu(x) and self._goes_by_rows():
            return self._by_rows(flat, routing).view(x.shape)
        own: Callable[[int], dict[str, Tensor]] = self._slice
        if torch.is_grad_enabled():  # a gradient in one piece, not one of full size for each expert
            slices = self._slices()
            own = lambda e: slices[e]  # noqa: E731
        y = by_expert(flat, routing, lambda rows, e: self._one(own(e), rows))
        scaled = (routing.prob.unsqueeze(1) * y).to(y.dtype)
        return torch.where(routing.kept.unsqueeze(1), scaled, 0).view(x.shape)

    def _goes_by_rows(self) -> bool:
        """Whether what stands between the projections treats each row alone, and has no parameters
        but masks."""
        template = self._template[0]
        act = cast(Any, template.net[0]).activation if self._gated else template.net[1]
        return template.pre_norm is None and name_of(act) is not None

    def _by_rows(self, x: Tensor, routing: Routing) -> Tensor:
        """On a CPU: the experts in use alone, also in compiled code."""
        parts: Any = self._parts()
        net: Any = self._template[0].net.train(self.training)
        w, b = parts["w_gate"], parts["b_gate"]
        check_x("FeedForward", x, w.shape[-1], w.dtype)
        w_down, b_down = parts["w_down"], parts["b_down"]
        if dtype := check.autocast_dtype("StackedExperts", x):
            x, w, b, w_down, b_down = check.cast(  # type: ignore[assignment]
                dtype, x, w, b, w_down, b_down
            )
            routing = autocast_prob(routing, dtype)
        check_routing("StackedExperts", x, routing, self.num_experts)
        glu = net[0]

        name: Any = name_of(glu.activation if self._gated else net[1])

        def hidden(a: Tensor, rows: Rows) -> Tensor:
            if not isinstance(glu, MaskedGLU):
                order: Packed | None = "up_gate" if self._gated else None
                h = activated([rows.linear(a, w, b)], name, order)
            elif glu.mask_mode == "channel":
                mask = self.get_parameter("net_0_mask").index_select(0, rows.expert)
                h = glu.by_channels(rows.linear(a, w, b), mask)
            else:
                masks = next(m for name, m in self._stacks() if name in _MASKS_OF)
                h = rows.masked(a, w, masks, name)
            return cast(Tensor, net[-2](h))

        return by_rows(x, routing, hidden, w_down, b_down)

    def _mixture(self, x: Tensor, prob: Tensor) -> Tensor:
        y: Tensor | None = None
        for own, p in zip(self._slices(), prob.unbind(1), strict=True):
            one = self._one(own, x)
            # Autocast may have given it another dtype than x.
            one = p.unsqueeze(1).to(one.dtype) * one
            y = one if y is None else y + one
        return cast(Tensor, y)
