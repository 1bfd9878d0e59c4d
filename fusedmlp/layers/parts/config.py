"""An nn.Module from whatever a config language calls one, without importing any of them.

| config | becomes |
|---|---|
| None | nn.Identity() |
| an nn.Module | itself |
| a class or builder that can be called | what it returns; if a mapping, that resolved |
| a mapping with a target | target(**rest), each value of the rest resolved |
| a builder with `_target` that cannot be called | `_target()` |

The target stands under `__target__` or `_target_`: a dotted path or a callable. Values are resolved
in depth: nested mappings with a target are built, arithmetic in a string ("128 * 4") is computed. A
mapping is anything with keys() and indexing, so that an OmegaConf config interpolates its own
values on access.

Resolving imports and calls what the config names: treat a config as code.
"""

from __future__ import annotations

import ast
import operator
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

ModuleConfig: TypeAlias = nn.Module | Mapping[str, Any] | Callable[[], Any] | None

_TARGET_KEYS = ("__target__", "_target_")
_PLACEHOLDER = "???"  # OmegaConf's mark of a value that must still be given
_MAX_EXPRESSION = 200
# No power: a short expression could then take forever.
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def build_module(where: str, config: ModuleConfig) -> nn.Module:
    """The nn.Module that `config` describes. `where` opens every error: "<Class>: <argument>".

    Raises ValueError for a mapping that cannot be resolved and TypeError for a config that builds
    no nn.Module; what a target raises about its arguments passes unchanged.
    """
    if config is None:
        return nn.Identity()
    if isinstance(config, nn.Module):
        return config
    built: Any = config
    if _is_mapping(built):
        built = _resolve(where, built)
    elif callable(built):
        built = built()
    elif hasattr(built, "_target"):
        built = _target(where, built._target)()
    if _is_mapping(built):
        built = _resolve(where, built)
    if not isinstance(built, nn.Module):
        raise TypeError(
            f"{where} must be None, an nn.Module, a class, a mapping with __target__ or a builder "
            f"of one of these, got {config!r}"
        )
    return built


def _is_mapping(value: Any) -> bool:
    return not isinstance(value, type | nn.Module) and (
        isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__"))
    )


def _resolve(where: str, value: Any) -> Any:
    """`value` with targets built and arithmetic computed, in depth."""
    if isinstance(value, str):
        return _resolve_string(where, value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | range):
        items = [_resolve(where, item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if not _is_mapping(value):
        return value
    rest = {key: value[key] for key in value.keys()}  # noqa: SIM118 (it may not iterate)
    targets = [rest.pop(key) for key in _TARGET_KEYS if key in rest]
    resolved = {key: _resolve(where, item) for key, item in rest.items()}
    if not targets:
        return resolved
    return _target(where, targets[0])(**resolved)


def _target(where: str, target: Any) -> Callable[..., Any]:
    if isinstance(target, str):
        try:
            target = pkgutil.resolve_name(target)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{where} must name an importable target, got {target!r}: {error}"
            ) from error
    if not callable(target):
        raise ValueError(f"{where} must name a callable target, got {target!r}")
    return target


def _resolve_string(where: str, text: str) -> Any:
    if text == _PLACEHOLDER or "${" in text:
        raise ValueError(f"{where} must hold no placeholder or interpolation, got {text!r}")
    if len(text) > _MAX_EXPRESSION:
        return text
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return text
    # A number alone was written as a string on purpose.
    if not isinstance(tree, ast.BinOp):
        return text
    try:
        return _evaluate(tree)
    except TypeError:
        return text
    except ArithmeticError as error:
        raise ValueError(
            f"{where} must hold arithmetic with a result, got {text!r}: {error}"
        ) from error


def _evaluate(node: ast.expr) -> int | float:
    """The value of an expression of numbers, + - * / // % and brackets. TypeError for any other."""
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_evaluate(node.operand))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    raise TypeError("not arithmetic")
