"""What patch() does to every model type of transformers: a table, made from tiny configurations.

    python -m fusedmlp.bench.experiments.patch_sweep > docs/patched-models.md

Of each type one model is built of its own configuration class, small, on the CPU where that goes
and on the meta device where it does not. Every patched block is run beside its own forward, in eval
and in training with the same seed; the largest difference is in the table.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import signal
import sys
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

import fusedmlp
from fusedmlp.patching.dense import Dense
from fusedmlp.patching.plan import child
from fusedmlp.patching.report import Report
from fusedmlp.patching.swap import Patched

SECONDS = 60  # for one type
LARGEST = 30_000_000  # parameters of a model with values
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size",
                     "word_embed_proj_dim", "projection_dim", "conv_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim",
                     "ffn_hidden_size", "hidden_dim", "moe_intermediate_size", "n_inner",
                     "shared_expert_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
                     "decoder_layers", "num_decoder_layers", "depth", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads",
                     "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_mel_bins": 8, "image_size": 32, "patch_size": 8,
    "max_source_positions": 16, "max_target_positions": 16,
}  # fmt: skip


class Row(NamedTuple):
    kind: str
    blocks: int
    fused: int
    partly: int
    left: tuple[str, ...]
    error: float | None
    failed: str | None = None


def small(cls: Any, **changes: Any) -> Any:
    """A small configuration, and of it those of its parts."""
    takes = set(inspect.signature(cls.__init__).parameters) | set(vars(cls))
    with contextlib.suppress(Exception):
        takes |= set(vars(cls()))
    takes |= set(getattr(cls, "attribute_map", {}))
    own = {k: v for k, v in (_SMALL | changes).items() if k in takes}
    for name, kind in (getattr(cls, "sub_configs", None) or {}).items():
        if inspect.isclass(kind) and hasattr(kind, "model_type") and kind.model_type:
            own[name] = small(kind).to_dict()
    return cls(**own)


class Late(BaseException):
    """No Exception: whatever suppresses those must not go on."""


def built(cls: Any, model_class: Any) -> nn.Module | None:
    """Small on the CPU; else, of its own sizes and perhaps two layers, on meta."""
    layers = {k: 2 for k, v in _SMALL.items() if v == 2 and "layer" in k}
    for config in (
        lambda: small(cls),
        lambda: small(cls, num_key_value_heads=2),
        lambda: cls(**{k: v for k, v in layers.items() if hasattr(cls(), k)}),
        cls,
    ):
        with contextlib.suppress(Exception):
            with torch.device("meta"):
                model: nn.Module = model_class._from_config(config())
            if sum(p.numel() for p in model.parameters()) > LARGEST:
                return model
            with contextlib.suppress(Exception):
                return model_class._from_config(config())
            return model
    return None


def differences(model: nn.Module) -> float | None:
    """The largest difference between a block and its own forward, of outputs of about 1."""
    found: list[float] = []
    for block in model.modules():
        plan = getattr(type(block), "_plan", None)
        if not isinstance(block, Patched) or not isinstance(plan, Dense):
            continue
        first = child(block, plan.first[0])
        width: Any = getattr(first, "in_features", None) or getattr(first, "nx", 0)
        x = torch.randn(2, 5, width)
        own = plan.original(block._own_class)
        args = [x] if plan.cut is None else [x] * len(plan.cut.names)
        ours = getattr(block, plan.method if plan.cut is None else "_fused_run")
        if next(block.parameters()).is_meta:
            continue
        for training in (False, True):
            was = {m: m.training for m in block.modules()}
            block.train(training)
            with torch.no_grad():
                outs = []
                for run in (lambda: own(block, *args), lambda: ours(*args)):  # noqa: B023
                    torch.manual_seed(0)
                    outs.append(run())
            found.append(float((outs[0] - outs[1]).abs().max() / outs[0].abs().max().clamp(1)))
            for m, mode in was.items():
                m.training = mode
    return max(found, default=None)


def row(kind: str, cls: Any, model_class: Any) -> Row:
    model = built(cls, model_class)
    if model is None:
        return Row(kind, 0, 0, 0, (), None, "no small model could be built")
    report: Report = fusedmlp.patch(model)
    left = tuple(f"{e.kind}: {e.detail}" for e in report.left if not e.partly)
    partly, fused = len(report.partly), len(report.patched) - len(report.partly)
    try:
        error, failed = differences(model), None
    except Exception as problem:  # a block that cannot be called on x alone
        error, failed = None, f"{type(problem).__name__}: {problem}".partition("\n")[0][:120]
    return Row(kind, len(report.entries), fused, partly, left, error, failed)


def rows(kinds: list[str]) -> list[Row]:
    from transformers import MODEL_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def late(*_: Any) -> None:
        raise Late(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    found = []
    for kind in kinds or list(CONFIG_MAPPING):
        signal.alarm(SECONDS)
        try:
            cls: Any = CONFIG_MAPPING[kind]
            model_class: Any = MODEL_MAPPING[cls]
            model_class = model_class[0] if isinstance(model_class, tuple) else model_class
            torch.manual_seed(0)
            with contextlib.redirect_stdout(io.StringIO()):
                found.append(row(kind, cls, model_class))
        except KeyError:
            continue  # no model of its own
        except (Exception, Late) as problem:
            found.append(Row(kind, 0, 0, 0, (), None, f"{type(problem).__name__}: {problem}"[:150]))
        finally:
            signal.alarm(0)
        print(found[-1], file=sys.stderr, flush=True)
    return found


def table(found: list[Row]) -> str:
    lines = [
        "| model type | lines | fused | partly | left | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for r in found:
        why = Counter(re.sub(r"\s+", " ", reason) for reason in r.left)
        left = "; ".join(f"{count} {reason}" for reason, count in why.items())
        error = "" if r.error is None else f"{r.error:.1e}"
        cells = (r.kind, r.blocks, r.fused, r.partly, r.failed or left, error)
        lines.append(f"| {' | '.join(str(c).replace('|', '/') for c in cells)} |")
    fused = sum(bool(r.fused + r.partly) for r in found)
    silent = sum(not r.blocks and r.failed is None for r in found)
    lines.append(f"\n{len(found)} types, {fused} with a fused block, {silent} without a line.")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    print(table(rows(sys.argv[1:])))
