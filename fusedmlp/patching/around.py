"""Who stands around a module, and whether that matters where the module is not called.

Libraries that move a model's parts hook every module, an activation too: accelerate's device_map
and offload, DeepSpeed's ZeRO-3. On a module without parameters and buffers their hooks move its
arguments alone, so a fused call may pass it by, and so it may where `kernelize` of the package
kernels has put a kernel of the same function. Hooks of anyone else may do anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..layers.parts.around import HOOKS, hooked


def stands_around(module: nn.Module) -> str | None:
    """What stands around a module's own forward, and whose it is where that is known."""
    around = hooked(module)
    if around is None:
        return None
    if by_accelerate(module):
        kind = type(vars(module)["_hf_hook"]).__name__
        return f"has accelerate's {kind} around it (device_map, offload)"
    if _by_deepspeed(module):
        return "has DeepSpeed's hooks (ZeRO-3 gathers its weight in them)"
    return around


def passed_over(module: nn.Module) -> str | None:
    """What is lost where `module`, which is no projection, is not called."""
    around = hooked(module)
    if around is None or _moves_arguments_alone(module) or _by_kernelize(module):
        return None
    return around


def by_accelerate(module: nn.Module) -> bool:
    """Whether the forward on the instance is accelerate's, around the one of the class."""
    of = vars(module)
    before = getattr(of.get("_old_forward"), "__func__", None)
    return "_hf_hook" in of and before is getattr(type(module), "forward", None) and _alone(of)


def _alone(of: dict[str, Any]) -> bool:
    return not any(of[name] for name in HOOKS)


def _by_deepspeed(module: nn.Module) -> bool:
    hooks = list(_hooks(module))
    modules = (str(getattr(hook, "__module__", "")) for hook in hooks)
    deep = all(name.partition(".")[0] == "deepspeed" for name in modules)
    return bool(hooks) and deep and "forward" not in vars(module)


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name in HOOKS:
        yield from vars(module)[name].values()


def _by_kernelize(module: nn.Module) -> bool:
    """Whether the forward on the instance is kernelize's: the kernel that its class is registered
    for, or the class's own where there is none."""
    of = vars(module)
    own = getattr(of.get("forward"), "__self__", None) is module
    return own and hasattr(type(module), "kernel_layer_name") and _alone(of)


def _moves_arguments_alone(module: nn.Module) -> bool:
    empty = not any(True for m in module.modules() for _ in (*m._parameters, *m._buffers))
    return empty and (by_accelerate(module) or _by_deepspeed(module))
