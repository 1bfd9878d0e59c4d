"""A language model over bytes, small enough for a CPU: how well MLPs learn at equal widths, and
HyperGLU beside softmax attention at equal parameters.

The text is the source of Python's own standard library, which is on every machine. The model is a
pre-norm transformer; only its MLP changes, or what mixes its sequence (lm_attention.py). Every run
of a comparison has the same seed, hence the same batches in the same order, and the same initial
weights wherever shapes agree.

    python -m fusedmlp.bench.lm [--mlp swiglu mswiglu-1 ...] [--attention softmax hyperglu ...]
        [--minutes N] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hyperglu import HyperGLU
from ..layers import FeedForward
from .lm_attention import ATTENTIONS

Record = dict[str, Any]
VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run does. lr falls from `lr` to a tenth along a cosine, after `warmup` steps; the
    loss on held-out text is taken every `every` steps over the same `held_out` batches."""

    mlp: str
    layers: int = 2
    dim: int = 64
    heads: int = 2
    hidden: int = 256
    context: int = 64
    batch: int = 16
    steps: int = 2000
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    every: int = 100
    held_out: int = 16
    seed: int = 0
    attention: str = "softmax"


# name -> the MLP from (dim, hidden).
MLPS: dict[str, Callable[[int, int], nn.Module]] = {
    "gelu": lambda dim, hidden: FeedForward(dim, hidden / dim),
    "swiglu": lambda dim, hidden: FeedForward(dim, hidden / dim, glu_variant="swiglu"),
    **{
        f"mswiglu-{n}": lambda dim, hidden, n=n: FeedForward(  # type: ignore[misc]
            dim, hidden / dim, glu_variant="mswiglu", mask_mode="element", num_masks=n
        )
        for n in (1, 2, 4, 8)
    },
}


def text() -> Tensor:
    """Every byte of the standard library's own .py files, tests left out, in order of their path.

    Files are joined by a zero byte.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    joined = b"\0".join(p.read_bytes() for p in files)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def split(data: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(training text, held-out text): of twenty equal stretches every twentieth is held out."""
    chunk = max(len(data) // 400, context + 2)
    chunks = data.split(chunk)
    held = torch.cat([c for i, c in enumerate(chunks) if i % 20 == 10])
    return torch.cat([c for i, c in enumerate(chunks) if i % 20 != 10]), held


def batch(data: Tensor, plan: Plan, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - plan.context - 1, (plan.batch, 1), generator=generator)
    tokens = data[starts + torch.arange(plan.context + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(plan.dim) for _ in range(2))
        self.attention = ATTENTIONS[plan.attention](plan.dim, plan.heads, plan.context)
        self.mlp = MLPS[plan.mlp](plan.dim, plan.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Logits of the next byte; the embedding is also the last projection."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, plan.dim)
        self.blocks = nn.ModuleList(Block(plan) for _ in range(plan.layers))
        self.norm = nn.RMSNorm(plan.dim)
        self._initialise(plan)

    def _initialise(self, plan: Plan) -> None:
        """Linear weights and the embedding from a normal, by their own seeds: two models with
        different MLPs agree in everything else. HyperGLU keeps the initial values of its own."""
        hyper = [m for m in self.modules() if isinstance(m, HyperGLU)]
        own = {id(p) for m in hyper for p in m.parameters()}
        for name, p in self.named_parameters():
            if p.dim() != 2 or id(p) in own:
                continue
            # Its name before attention was a choice: earlier runs repeat.
            name = name.replace("attention.", "")
            seed = int.from_bytes(
                hashlib.sha256(f"{plan.seed} {name}".encode()).digest()[:4], "big"
            )
            std = 0.02 / math.sqrt(2 * plan.layers) if name.endswith(_RESIDUAL) else 0.02
            generator = torch.Generator().manual_seed(seed)
            nn.init.normal_(p, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


# Projections into the residual stream: smaller, by their number.
_RESIDUAL = ("out.weight", "net.2.weight")


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Nats a byte."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor, plan: Plan) -> float:
    generator = torch.Generator().manual_seed(plan.seed + 1)
    losses = [loss_of(model, *batch(data, plan, generator)) for _ in range(plan.held_out)]
    return torch.stack(losses).mean().item()


def _lr(plan: Plan, step: int) -> float:
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(plan.steps - plan.warmup, 1)
    return plan.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def _optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices alone, so not on mask logits, whose size means nothing."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": rest},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.0)


def train(plan: Plan, data: Tensor, seconds: float = math.inf) -> Iterator[Record]:
    """Points of the curve, one every `plan.every` steps and one at the end; ends early when the
    time is over, which the last point's `step` then shows."""
    torch.manual_seed(plan.seed)
    training, held = split(data, plan.context)
    model = Model(plan)
    optimizer = _optimizer(model, plan)
    generator = torch.Generator().manual_seed(plan.seed)
    start = time.monotonic()
    recent: list[float] = []
    for step in range(plan.steps + 1):
        over = step == plan.steps or time.monotonic() - start > seconds
        if over or step % plan.every == 0:
            yield {
                "step": step,
                "seconds": round(time.monotonic() - start, 1),
                "training": sum(recent) / len(recent) if recent else None,
                "held_out": held_out_loss(model, held, plan),
            }
            recent = []
        if over:
            return
        for group in optimizer.param_groups:
            group["lr"] = _lr(plan, step)
        loss = loss_of(model, *batch(training, plan, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())


def parameters_of(plan: Plan) -> dict[str, int]:
    """Weights and mask logits of one model."""
    with torch.device("meta"):
        mlp = MLPS[plan.mlp](plan.dim, plan.hidden)
        attention = ATTENTIONS[plan.attention](plan.dim, plan.heads, plan.context)
    logits = sum(p.numel() for name, p in mlp.named_parameters() if p.dim() == 3)
    weights = sum(p.numel() for p in mlp.parameters()) - logits
    mixing = sum(p.numel() for p in attention.parameters())
    return {
        "mlp_weights": plan.layers * weights,
        "mask_logits": plan.layers * logits,
        "attention_weights": plan.layers * mixing,
    }


def result(plan: Plan, data: Tensor, curve: Sequence[Record]) -> Record:
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:12]
    return {
        "kind": "lm",
        **dataclasses.asdict(plan),
        **parameters_of(plan),
        "bytes": len(data),
        "text": digest,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "curve": list(curve),
        "held_out_loss": curve[-1]["held_out"],
    }


def table(results: Sequence[Record]) -> str:
    """Held-out loss at the last step, in Markdown: mean over seeds, and each."""
    lines = [
        "| MLP | weights | mask logits | held-out loss, nats a byte | by seed |",
        "|---|---|---|---|---|",
    ]
    for name, runs in _by_model(results).items():
        losses = [run["held_out_loss"] for run in runs]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        lines.append(
            f"| {name} | {runs[0]['mlp_weights']:,} | {runs[0]['mask_logits']:,} | "
            f"{sum(losses) / len(losses):.3f} | {each} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Record], path: Path) -> None:
    """Held-out loss over steps: the mean over seeds, and the span between the best and the
    worst."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, runs in _by_model(results).items():
        # Not the start, which would hide the rest.
        curves = [[(p["step"], p["held_out"]) for p in run["curve"][2:]] for run in runs]
        steps = [step for step, _ in curves[0]]
        losses = list(zip(*([loss for _, loss in curve] for curve in curves), strict=True))
        (line,) = axes.plot(steps, [sum(at) / len(at) for at in losses], label=name)
        axes.fill_between(
            steps,
            list(map(min, losses)),
            list(map(max, losses)),
            color=line.get_color(),
            alpha=0.15,
        )
    axes.set(xlabel="step", ylabel="held-out loss, nats a byte", yscale="log")
    axes.legend()
    figure.savefig(path)


def _by_model(results: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs of one model, named by its MLP, and by what stands in the place of attention."""
    groups: dict[str, list[Record]] = {}
    for result in results:
        other = result.get("attention", "softmax").replace("softmax", "")
        groups.setdefault(" + ".join(filter(None, (result["mlp"], other))), []).append(result)
    return groups


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlp", nargs="+", choices=MLPS, default=["swiglu", "mswiglu-1"])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["softmax"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of each run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add results to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot what --json then holds")
    args = parser.parse_args(argv)
    data = text()
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    for seed, attention, mlp in itertools.product(args.seed, args.attention, args.mlp):
        plan = Plan(mlp, steps=args.steps, seed=seed, attention=attention)
        curve = []
        for point in train(plan, data, 60 * args.minutes):
            curve.append(point)
            print(f"{mlp} {attention} seed {seed} {json.dumps(point)}", flush=True)
        results.append(result(plan, data, curve))
        if args.json:
            args.json.write_text(json.dumps(results) + "\n")
    print(table(results))
    if args.plot:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
