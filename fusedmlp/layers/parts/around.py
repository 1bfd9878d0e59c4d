"""What stands around a module's own forward: then it is called, where its weights alone would be
read otherwise.

Hooks make weights (prune, weight_norm, spectral_norm), bring them from elsewhere (accelerate's
offload) and add to results (adapters); a forward of its own, set on the instance, does any of
these.
"""

from __future__ import annotations

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> str | None:
    """What stands around a module's own forward, which a fused call would not run."""
    of = module.__dict__
    if any(of[name] for name in HOOKS):
        return "has hooks"
    if "forward" in of:
        return "has a forward of its own, set on the instance"
    return None


def bare(*modules: nn.Module | None) -> bool:
    """Whether nothing is lost where none of `modules` is called."""
    # Every call of every layer asks this, so `hooked` is written out.
    for module in modules:
        if module is None:
            continue
        of = module.__dict__
        if (
            of["_forward_hooks"]
            or of["_forward_pre_hooks"]
            or of["_backward_hooks"]
            or of["_backward_pre_hooks"]
            or "forward" in of
        ):
            return False
    return True
