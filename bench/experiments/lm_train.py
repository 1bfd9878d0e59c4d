"""Training for the `lm` bench: text, batches, one run, and its file.

A run can stop after any step and go on from its file: on a CPU it ends with the very weights of a
run that never stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import machine
from ..options import Refusal
from .lm_models import LanguageModel, ModelPlan, is_matrix, mask_logits_of, weights_of
from .lm_one_bit import one_bit

Record = dict[str, Any]


def text() -> Tensor:
    """Every byte of the standard library's own .py files, tests left out, in order of their path.

    Files are joined by a zero byte.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    joined = b"\0".join(p.read_bytes() for p in files)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def digest(data: Tensor) -> str:
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:12]


def split(data: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(training text, held-out text): of twenty equal stretches every twentieth is held out."""
    chunk = max(len(data) // 400, context + 2)
    chunks = data.split(chunk)
    held = torch.cat([c for i, c in enumerate(chunks) if i % 20 == 10])
    return torch.cat([c for i, c in enumerate(chunks) if i % 20 != 10]), held


def batch(data: Tensor, plan: ModelPlan, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - plan.context - 1, (plan.batch, 1), generator=generator)
    tokens = data[starts + torch.arange(plan.context + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]


def _lr(plan: ModelPlan, step: int) -> float:
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(plan.steps - plan.warmup, 1)
    return plan.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def _optimizer(model: nn.Module, plan: ModelPlan) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices alone, so not on mask logits, whose size means nothing."""
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if is_matrix(n, p)], "weight_decay": plan.weight_decay},
        {"params": [p for n, p in named if not is_matrix(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.99))


class Run:
    """One training: the model, its optimiser and how far they are. `curve` has a point every
    `plan.every` steps and one at the end, with losses in nats a byte. `commits`: those that it ran
    under, for whoever runs it to fill in."""

    def __init__(self, plan: ModelPlan, data: Tensor, device: str = "cpu") -> None:
        self.plan, self.device = plan, torch.device(device)
        self.data, self.text = data, digest(data)
        self.training, self.held = split(data, plan.context)
        self.model = LanguageModel(plan).to(self.device)
        self.optimizer = _optimizer(self.model, plan)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.step, self.seconds = 0, 0.0
        self.curve: list[Record] = []
        self.commits: list[str] = []
        self._recent: list[float] = []

    @property
    def finished(self) -> bool:
        return bool(self.curve) and self.curve[-1]["step"] == self.plan.steps

    def _loss(
        self, model: LanguageModel, data: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(nats a byte, auxiliary loss)."""
        tokens, targets = (t.to(self.device) for t in batch(data, self.plan, generator))
        narrow = self.plan.dtype != "float32"
        with torch.autocast(self.device.type, getattr(torch, self.plan.dtype), enabled=narrow):
            logits, aux = model(tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), aux

    @torch.no_grad()
    def held_out_loss(self, model: LanguageModel | None = None) -> float:
        """On the same batches at every step and for every model; None: the one that is trained."""
        model = self.model if model is None else model
        generator = torch.Generator().manual_seed(self.plan.seed + 1)
        model.eval()
        losses = [self._loss(model, self.held, generator)[0] for _ in range(self.plan.held_out)]
        model.train()
        return torch.stack(losses).mean().item()

    def _point(self) -> None:
        recent, self._recent = self._recent, []
        self.curve.append({
            "step": self.step, "seconds": round(self.seconds, 1),
            "training": sum(recent) / len(recent) if recent else None,
            "held_out": self.held_out_loss(),
        })  # fmt: skip

    def _advance(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = _lr(self.plan, self.step)
        loss, aux = self._loss(self.model, self.training, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + aux).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._recent.append(loss.item())
        self.step += 1

    def go_on(
        self,
        over: Callable[[], bool] = lambda: False,
        keep: Callable[[Run], None] = lambda run: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Train until the end, or until `over` says so between two steps. `keep` is called at each
        point of the curve and then, `tick` after each step."""
        while not self.finished:
            start = time.monotonic()
            due = self.step % self.plan.every == 0 or self.step == self.plan.steps
            if due and (not self.curve or self.curve[-1]["step"] != self.step):
                self._point()
                keep(self)
            elif over():
                keep(self)
                return
            else:
                self._advance()
                tick()
            self.seconds += time.monotonic() - start

    def record(self) -> Record:
        """What the results keep of a finished run."""
        mlp = self.model.blocks[0].mlp
        assert isinstance(mlp, nn.Module)
        return {
            "kind": "lm",
            "model": self.plan.model,
            **dataclasses.asdict(self.plan),
            "mlp_weights": self.plan.layers * weights_of(mlp),
            "mask_logits": self.plan.layers * mask_logits_of(mlp),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "bytes": len(self.data),
            "text": self.text,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": machine.device_name() if self.device.type == "cuda" else "cpu",
            "commit": ", then ".join(self.commits) or None,
            "curve": self.curve,
            "held_out_loss": self.curve[-1]["held_out"],
            **one_bit(self.plan.mlp, self.model, self.held_out_loss),
        }

    def save(self, path: Path) -> None:
        """Everything to go on from, in a safetensors file: parameters under their own names."""
        from safetensors.torch import save_file

        state = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"adamw.{key}.{name}"] = value
        state["random.batches"] = self.generator.get_state()
        state["random.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        state["recent"] = torch.tensor(self._recent, dtype=torch.float64)
        about = {
            "plan": dataclasses.asdict(self.plan), "text": self.text, "step": self.step,
            "seconds": self.seconds, "curve": self.curve, "commits": self.commits,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file(
            {name: t.cpu().contiguous() for name, t in state.items()}, unfinished,
            metadata={"fusedmlp.lm": json.dumps(about)},
        )  # fmt: skip
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path, data: Tensor, device: str = "cpu") -> Run:
        """The run that `save` wrote. Refusal if it read another text."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["fusedmlp.lm"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        run = cls(ModelPlan(**about["plan"]), data, device)
        if run.text != about["text"]:
            raise Refusal(
                f"{path}: expected a run on this Python's standard library, text {run.text}; "
                f"got one on text {about['text']}"
            )
        run._restore(state)
        for name in ("step", "seconds", "curve", "commits"):
            setattr(run, name, about[name])
        return run

    def _restore(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(state[name])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if (value := state.get(f"adamw.{key}.{name}")) is not None:
                        # AdamW counts steps on the CPU.
                        where = "cpu" if key == "step" else self.device
                        self.optimizer.state[p][key] = value.to(where)
        self.generator.set_state(state["random.batches"])
        torch.set_rng_state(state["random.torch"])
        if self.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.device)
        self._recent = state["recent"].tolist()
