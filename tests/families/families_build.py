"""Tiny experts of a family, made from its own configuration, and what they are called with."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from families_scan import families, modeling
from torch import Tensor, nn
from transformers import PretrainedConfig

T, D, H, E, K = 13, 16, 24, 4, 2
# What the configurations of all families call these sizes.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), H),
    **dict.fromkeys(EXPERTS, E),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), K),
}
# Their gates' parameters: no default of a family or of a row, so that one that was not read shows.
GATES: dict[str, Any] = {
    "swiglu_limit": 3.0, "swiglu_alpha": 1.5, "mlp_gate_softcap": 3.0, "mlp_up_softcap": 5.0,
}  # fmt: skip
SETTINGS = SIZES | GATES
# A router of so many experts has room for every family's groups.
ROUTED = SIZES | dict.fromkeys(EXPERTS, 16)
# Arguments beside the configuration; the limit is that of Step 3's last layers.
ARGUMENTS: dict[str, Any] = {"intermediate_size": H, "swiglu_limit": 7.0, "layer_idx": 0}


def kinds(family: str) -> list[type[PretrainedConfig]]:
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    own = (c for c in vars(module).values() if inspect.isclass(c))
    return [c for c in own if issubclass(c, PretrainedConfig) and c.__module__ == module.__name__]


def configured(kind: type[PretrainedConfig], settings: dict[str, Any]) -> PretrainedConfig:
    config = kind()
    for name, value in settings.items():
        # A list holds the sizes of several parts; ARGUMENTS give the one that is built.
        if hasattr(config, name) and not isinstance(getattr(config, name), list):
            setattr(config, name, value)
    config._experts_implementation = "eager"
    return config


def _made(family: str, name: str, settings: dict[str, Any]) -> nn.Module:
    """By the first configuration of the family that is one of such modules."""
    kind: Any = getattr(modeling(family), name)
    taken = inspect.signature(kind.__init__).parameters
    arguments = {k: v for k, v in (ARGUMENTS | settings).items() if k in taken and k in ARGUMENTS}
    reasons = []
    for configuration in kinds(family):
        try:
            return kind(configured(configuration, settings), **arguments)
        except Exception as error:  # of another part of the model: it lacks what this one needs
            reasons.append(f"{configuration.__name__}: {error}")
    raise AssertionError(f"no configuration makes {name}: {reasons}")


@functools.cache
def experts(family: str, name: str, own_gate: bool = False) -> nn.Module:
    """Tiny experts of the class `name`, whose gate and up have a standard deviation of 4; with
    `own_gate` the gate is that of the family's defaults."""
    module = _made(family, name, SIZES if own_gate else SETTINGS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in module.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.dim() == 3:
                draw *= H**-0.5 if key.startswith("down") else 4 * D**-0.5
            p.copy_(draw)
    return module


def router(family: str, name: str) -> nn.Module:
    return _made(family, name, ROUTED)


def every() -> list[tuple[str, str]]:
    """(family, class)."""
    return [(family, name) for family, names in families().items() for name in names]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, D), and K experts of E with their weights for each token; one expert has no token."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=generator)
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=generator)
    return x.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()
