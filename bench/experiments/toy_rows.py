"""The rows of the toy table: each layer of mlp_utils' README table, as it was built there.

A row's label is made from the very arguments that its layer is built from. Where mlp_utils' label
said something else than what it built, `Published.note` says so. Rows that README does not have
stand in EXTRA.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ... import activations, layers
from ...layers.feedforward import VARIANTS

DIM, SEQ_LEN = 64, 64
# What every row has alike; a label leaves it out.
_WIDTHS = ("dim", "input_dim", "seq_len", "input_width", "output_width")


@dataclass(frozen=True)
class Build:
    """A layer by its name in `fusedmlp.layers` and its arguments, some of which may be Builds."""

    layer: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        values = {k: v.make() if isinstance(v, Build) else v for k, v in self.arguments.items()}
        made: nn.Module = getattr(layers, self.layer)(**values)
        return made

    def count(self) -> int:
        """How many parameters the layer has."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.make().parameters())

    def available(self) -> bool:
        """Whether this version has the layer, its arguments and its gate."""
        cls = getattr(layers, self.layer, None)
        if cls is None or not self.arguments.keys() <= inspect.signature(cls).parameters.keys():
            return False
        nested = (v for v in self.arguments.values() if isinstance(v, Build))
        variant = self.arguments.get("glu_variant", "none")
        return variant in VARIANTS and all(build.available() for build in nested)

    def label(self) -> str:
        shown = {k: v for k, v in self.arguments.items() if k not in _WIDTHS}
        return ", ".join(f"{k}={_text(v)}" for k, v in shown.items())


def _text(value: Any) -> str:
    if isinstance(value, Build):
        return f"{value.layer}({value.label()})"
    return str(getattr(value, "__name__", value))


@dataclass(frozen=True)
class Published:
    """What mlp_utils' README prints for a row: one run, its last training loss."""

    params: str
    loss: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table. params: the number of parameters that a test holds it to."""

    model: str
    build: Build
    params: int | None = None
    published: Published | None = None
    note: str = ""


def _mlp(
    params: int, text: str, loss: float, act_fn: type[nn.Module] = nn.GELU, **more: Any
) -> Row:
    norm_mode = more.pop("norm_mode", "post")
    arguments = {"input_dim": DIM, "act_fn": act_fn, "dropout": 0.1, "norm_mode": norm_mode, **more}
    return Row("mlp", Build("MLP", arguments), params, Published(text, loss))


def _feedforward(variant: str, params: int, text: str, loss: float) -> Row:
    arguments = {"dim": DIM, "mult": 4, "glu_variant": variant}
    if variant == "none":
        arguments["activation"] = nn.GELU
    return Row("feedforward", Build("FeedForward", arguments), params, Published(text, loss))


_SOFT = "trained without a hardening loss; eval routes hard"


def _fff(variant: str, params: int, loss: float, note: str = "", **more: Any) -> Row:
    arguments = {"dim": DIM, "depth": 3, "mult": 4, "glu_variant": variant, **more}
    if more:
        published = None
    else:
        text = "267.21K" if variant.startswith("m") else "398.28K"
        published = Published(text, loss, "mlp_utils' label says expert_dim=8; 64 was built")
    build = Build("FastFeedForward", arguments)
    return Row("fastfeedforward", build, params, published, note or _SOFT)


def _tree(depth: int, params: int, text: str, loss: float) -> Row:
    arguments = {"input_width": DIM, "depth": depth, "output_width": DIM, "activation": F.gelu}
    return Row(
        "pathweightedfff", Build("PathWeightedFFF", arguments), params, Published(text, loss)
    )


_SWIGLU = Build("FeedForward", {"dim": DIM, "mult": 4, "glu_variant": "swiglu"})


def _ngpt(scalar: bool, params: int, text: str, loss: float) -> Row:
    arguments = {"dim": DIM, "feedforward_net": _SWIGLU, "scalar_alpha": scalar}
    return Row("ngpt", Build("NGPT", arguments), params, Published(text, loss))


def _switch(experts: int, mult: int, variant: str, params: int, text: str, loss: float) -> Row:
    ff_kwargs = {"mult": mult, "glu_variant": variant}
    arguments = {"dim": DIM, "num_experts": experts, "ff_kwargs": ff_kwargs}
    return Row("switch_ffn", Build("SwitchFFN", arguments), params, Published(text, loss))


PUBLISHED: tuple[Row, ...] = (
    _mlp(33_408, "33.41K", 0.221746),
    _mlp(33_408, "33.41K", 0.225678, nn.ReLU),
    _mlp(33_408, "33.41K", 0.215601, nn.SiLU),
    _mlp(33_408, "33.41K", 0.246249, activations.ReluSquared),
    _mlp(33_408, "33.41K", 0.252107, activations.Gelu2),
    _mlp(33_408, "33.41K", 0.211360, activations.BSiLU),
    _mlp(33_408, "33.41K", 0.223811, activations.ReluNelu),
    _mlp(33_408, "33.41K", 0.255551, residual=True),
    _mlp(33_088, "33.09K", 0.220111, norm_mode="none"),
    _mlp(33_216, "33.22K", 0.221599, norm_mode="pre"),
    _feedforward("none", 33_088, "33.09K", 0.207531),
    _feedforward("glu", 49_728, "49.73K", 0.179443),
    _feedforward("swiglu", 49_728, "49.73K", 0.306741),
    _feedforward("geglu", 49_728, "49.73K", 0.304403),
    _feedforward("reglu", 49_728, "49.73K", 0.293338),
    _feedforward("bilinear", 49_728, "49.73K", 0.318753),
    _feedforward("mglu", 33_344, "33.34K", 0.189905),
    _feedforward("mswiglu", 33_344, "33.34K", 0.204473),
    _feedforward("mgeglu", 33_344, "33.34K", 0.211235),
    _feedforward("mreglu", 33_344, "33.34K", 0.213310),
    _feedforward("mbilinear", 33_344, "33.34K", 0.236762),
    _fff("swiglu", 398_279, 0.176578),
    _fff("geglu", 398_279, 0.176054),
    _fff("mswiglu", 267_207, 0.173000),
    # Three more runs of the first: one configuration, run once here.
    _fff("swiglu", 398_279, 0.171305),
    _fff("swiglu", 398_279, 0.174691),
    _fff("swiglu", 398_279, 0.172715),
    _tree(3, 63_375, "63.38K", 0.246856),
    Row(
        "pathweightedfff",
        Build(
            "PathWeightedFFF",
            {"input_width": DIM, "depth": 3, "output_width": DIM, "activation": F.silu},
        ),
        63_375,
        Published("63.38K", 0.250302, "mlp_utils' run used gelu, whatever its label says"),
    ),
    _tree(5, 266_175, "266.18K", 0.237995),
    _ngpt(True, 49_729, "49.73K", 0.005054),
    _ngpt(False, 49_792, "49.79K", 0.005193),
    Row(
        "gmlp",
        Build("GMLP", {"dim": DIM, "dim_ff": 256, "seq_len": SEQ_LEN, "depth": 4}),
        218_112,
        Published("218.11K", 0.049925),
    ),
    _switch(8, 4, "swiglu", 398_336, "398.34K", 0.274261),
    _switch(16, 2, "geglu", 399_360, "399.36K", 0.362581),
)

EXTRA: tuple[Row, ...] = (
    Row("ngpt", Build("NGPT", {"dim": DIM, "feedforward_net": None}), 32_704),
    Row("ngpt", Build("NGPT", {"dim": DIM, "feedforward_net": None, "paper": True}), 33_044),
    _fff(
        "swiglu",
        398_279,
        0.0,
        "trained with the hardening loss; eval routes hard",
        hardening_coef=3.0,
        return_aux=True,
    ),
    _fff("swiglu", 398_279, 0.0, load_balancing_alpha=1.0, return_aux=True),
    _fff("swiglu", 399_896, 0.0, has_master_leaf=True),
)


def rows(published_only: bool = False) -> list[Row]:
    """The rows that this version can build, in the order of README's table."""
    wanted = PUBLISHED if published_only else PUBLISHED + EXTRA
    return [row for row in wanted if row.build.available()]


def models() -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.model for row in PUBLISHED))


def count_text(count: int) -> str:
    """A number of parameters as README prints it."""
    for limit, unit in ((1_000_000, "M"), (1_000, "K")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)
