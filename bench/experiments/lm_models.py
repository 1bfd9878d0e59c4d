"""The models of the `lm` bench: a pre-norm transformer over bytes whose MLP or mixer is exchanged.

Every MLP has 8 dim^2 weights, as near as its widths allow. Two models of one seed have the same
initial values wherever names and shapes agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import layers
from ...ops.top1_route import load_balancing_loss
from .lm_attention import MIXERS

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """What one run does. lr falls from `lr` to a tenth along a cosine, after `warmup` steps; the
    loss on held-out text is taken every `every` steps over the same `held_out` batches."""

    mlp: str
    mixer: str = "attention"
    layers: int = 2
    dim: int = 96
    heads: int = 3
    context: int = 128
    batch: int = 8
    steps: int = 2000
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    every: int = 100
    held_out: int = 16
    dtype: str = "float32"
    seed: int = 0

    @property
    def model(self) -> str:
        """The name that tables and files have for it."""
        return self.mlp if self.mixer == "attention" else f"{self.mixer}+{self.mlp}"


class Balanced(nn.Module):
    """A Top1MoE with its load-balancing loss, of Switch Transformer's weight: (y, aux)."""

    def __init__(self, moe: layers.Top1MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, routing = self.moe(x, return_routing=True)
        return y, 1e-2 * load_balancing_loss(routing)


Build = Callable[[int, int], nn.Module]


def _feedforward(variant: str, **more: object) -> Build:
    return lambda dim, hidden: layers.FeedForward(
        dim, _mult(dim, hidden), glu_variant=variant, **more  # type: ignore[arg-type]
    )  # fmt: skip


def _mult(dim: int, hidden: int) -> float:
    return (hidden + 0.5) / dim  # layers take its floor


# (name, the MLP from dim and hidden width). The first four are the table's; they have widths of
# their own. What returns a pair adds the second to the loss in training.
MLPS: list[tuple[str, Build]] = [
    ("relu_sq", lambda dim, hidden: layers.ReluSquaredMLP(dim)),
    ("swiglu", lambda dim, hidden: layers.SwiGLUMLP(dim)),
    ("gelu", lambda dim, hidden: layers.GELUMLP(dim)),
    ("silu", lambda dim, hidden: layers.SiLUMLP(dim)),
    ("geglu", _feedforward("geglu")),
    ("reglu", _feedforward("reglu")),
    ("mswiglu-channel", _feedforward("mswiglu")),
    ("mswiglu-1", _feedforward("mswiglu", mask_mode="element", num_masks=1)),
    ("mswiglu-2", _feedforward("mswiglu", mask_mode="element", num_masks=2)),
    ("mswiglu-4", _feedforward("mswiglu", mask_mode="element", num_masks=4)),
    ("switch-4", lambda dim, hidden: layers.SwitchFFN(
        dim, 4, None, ff_kwargs={"mult": _mult(dim, hidden), "glu_variant": "swiglu"})),
    ("top1-4", lambda dim, hidden: Balanced(layers.Top1MoE(dim, hidden, 4))),
    ("fff-4", lambda dim, hidden: layers.FastFeedForward(
        dim, 2, mult=_mult(dim, hidden), glu_variant="swiglu", hardening_coef=1.0,
        return_aux=True)),
    ("binary", lambda dim, hidden: layers.BinaryGatedMLP(dim, hidden, pad=True)),
    ("path-7", lambda dim, hidden: layers.PathWeightedFFF(dim, 2, dim)),
]  # fmt: skip


def names(table: list[tuple[str, Callable[..., nn.Module]]]) -> list[str]:
    return [name for name, _ in table]


def build_mlp(name: str, dim: int) -> nn.Module:
    """The MLP of this name whose number of weights is nearest to 8 dim^2."""
    build = dict(MLPS)[name]
    with torch.device("meta"):
        few, many = (weights_of(build(dim, hidden)) for hidden in (dim, 2 * dim))
    a_unit = (many - few) / dim
    hidden = dim + round((8 * dim**2 - few) / a_unit) if a_unit else dim
    return build(dim, max(hidden, 1))


def weights_of(mlp: nn.Module) -> int:
    """Parameters but for the logits of masks, which inference does not read as such."""
    return sum(p.numel() for p in mlp.parameters()) - mask_logits_of(mlp)


def mask_logits_of(mlp: nn.Module) -> int:
    masked = (m for m in mlp.modules() if isinstance(m, layers.MaskedGLU))
    return sum(m.mask.numel() for m in masked if m.mask_mode == "element")


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); and the MLP's auxiliary loss, or 0."""

    def __init__(self, plan: ModelPlan) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(plan.dim) for _ in range(2))
        self.mixer = dict(MIXERS)[plan.mixer](plan.dim, plan.heads, plan.context)
        self.mlp = build_mlp(plan.mlp, plan.dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.mixer(self.norms[0](x))
        y = self.mlp(self.norms[1](x))
        y, aux = y if isinstance(y, tuple) else (y, x.new_zeros(()))
        return x + y, aux


class LanguageModel(nn.Module):
    """(logits of the next byte, auxiliary loss); the embedding is also the last projection."""

    def __init__(self, plan: ModelPlan) -> None:
        super().__init__()
        torch.manual_seed(plan.seed)
        self.embedding = nn.Embedding(VOCABULARY, plan.dim)
        self.blocks = nn.ModuleList(Block(plan) for _ in range(plan.layers))
        self.norm = nn.RMSNorm(plan.dim)
        self._initialise(plan)

    def _initialise(self, plan: ModelPlan) -> None:
        """Seed 004's rule for every matrix: uniform with standard deviation 1 / sqrt(columns), but
        zero where it writes into the residual stream. Each by a seed of its own name: two models
        agree wherever names and shapes do. Mixers other than attention keep their own values."""
        for name, p in self.named_parameters():
            if not is_matrix(name, p) or (".mixer." in name and plan.mixer != "attention"):
                continue
            digest = hashlib.sha256(f"{plan.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            if name == "embedding.weight":
                nn.init.normal_(p, std=0.02, generator=generator)
            elif name.endswith(_WRITES):
                nn.init.zeros_(p)
            else:
                bound = (3 / p.shape[-1]) ** 0.5
                nn.init.uniform_(p, -bound, bound, generator=generator)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        aux = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x, own = cast(tuple[Tensor, Tensor], block(x))
            aux = aux + own
        return F.linear(self.norm(x), self.embedding.weight), aux


# What writes into the residual stream, by the end of its name.
_WRITES = ("mixer.out.weight", "c_proj.weight", "net.2.weight", "net.3.weight", "net_2_weight",
           "w_down", "w2s")  # fmt: skip


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether it is one or a stack of them: what is drawn, and decays. Logits of masks are not."""
    return p.dim() >= 2 and not name.endswith(("mask", "bias", "b2s"))
