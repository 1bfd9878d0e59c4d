"""freeze_masks(model): the masks of a whole model as bits.

A class that holds logits has their name as LOGITS, `has_masks` and a `freeze_masks()` of its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...reference.values import any_of


def freeze_masks(model: nn.Module) -> list[str]:
    """Freeze the masks of every layer in `model` that has logits over elements: `MaskedGLU` with
    mask_mode="element", inside a `FeedForward` or alone, and experts with such masks.

    The layers that hold such a layer have it as a method of theirs.

    Returns the names of the layers that were frozen now; those frozen before stay as they are. The
    logits are parameters no more: make an optimizer afterwards, if any. To load a frozen model's
    state_dict, freeze a new model first.

    Raises TypeError unless `model` is an nn.Module, RuntimeError where it has no such layer, and
    ValueError with the layer's name for a logit that is not finite, before anything is frozen.

    Examples:
        >>> import fusedmlp
        >>> from fusedmlp.layers import FeedForward
        >>> def make():
        ...     return FeedForward(32, glu_variant="mswiglu", mask_mode="element", num_masks=2)
        >>> trained, loaded = make(), make()
        >>> fusedmlp.freeze_masks(trained)
        ['net.0']
        >>> names = fusedmlp.freeze_masks(loaded)
        >>> loaded.load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze_masks: model must be an nn.Module, got {type(model).__name__}")
    masked = {name: m for name, m in model.named_modules() if _has_masks(m)}
    if not masked:
        raise RuntimeError(
            "freeze_masks: model must have a masked layer with mask_mode='element', got none in "
            f"{type(model).__name__}"
        )
    left = {name: logits for name, m in masked.items() if (logits := _logits(m)) is not None}
    for name, logits in left.items():
        if any_of(~logits.isfinite()):
            raise ValueError(
                f"freeze_masks: logits must be finite, got some in {name or 'model'} that are NaN "
                "or infinite; nothing was frozen"
            )
    for name in left:
        masked[name].freeze_masks()
    return list(left)


def _has_masks(module: Any) -> bool:
    return hasattr(type(module), "LOGITS") and module.has_masks


def _logits(module: Any) -> nn.Parameter | None:
    """None where they are frozen."""
    return dict(module.named_parameters()).get(module.LOGITS)


class Freezing(nn.Module):
    """A layer that may hold masks over elements in a module that it has or was given."""

    def freeze_masks(self) -> list[str]:
        """`fusedmlp.freeze_masks` of this layer, with its errors."""
        return freeze_masks(self)
