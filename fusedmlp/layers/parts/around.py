"""What stands around a module's own forward: then it is called, where its weights alone would be
read otherwise.

Hooks make weights (prune, weight_norm, spectral_norm), bring them from elsewhere (accelerate's
offload) and add to results (adapters); a forward of its own, set on the instance, does any of
these.
"""

from __future__ import annotations

from torch import nn


def hooked(module: nn.Module) -> str | None:
    """What stands around a module's own forward, which a fused call would not run."""
    # Written out: this is asked on every call.
    m = module
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward of its own, set on the instance"
    return None


def bare(*modules: nn.Module | None) -> bool:
    """Whether nothing is lost where none of `modules` is called."""
    return all(m is None or hooked(m) is None for m in modules)
