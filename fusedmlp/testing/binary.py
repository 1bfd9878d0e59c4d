"""Cases of one-bit weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._api import BinaryWeight, binary_gated_linear, binary_gated_mlp, binary_linear
from .case import Case, Draw, Shapes

# q_ and s_ with these are one BinaryWeight; of whose columns the width is.
WEIGHTS = {"weight": "x", "gate": "x", "up": "x", "down": "q_gate"}


def _groups(D: int) -> int:
    return -(-D // 128)


def _shapes(names: tuple[str, ...], bias: bool) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        sizes = {"weight": (H, D), "gate": (H, D), "up": (H, D), "down": (D, H)}
        named: Shapes = {"x": (M, D)}
        for name in names:
            rows, columns = sizes[name]
            named[f"q_{name}"] = (rows, 4 * _groups(columns))
            named[f"s_{name}"] = (rows, _groups(columns))
        if bias:
            named |= {f"b_{name}": sizes[name][:1] for name in names}
        return named

    return shapes


def _words(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    low, high = -(1 << 31), 1 << 31
    device = generator.device
    return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.int32)


def _scales(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """As of weights with variance 1 / columns; never 0."""
    t = 0.5 + torch.rand(shape, generator=generator, device=generator.device)
    return (t / (128 * max(shape[1], 1)) ** 0.5).to(torch.float16)


def _adapt(arguments: dict[str, Any], functions: Any) -> dict[str, Any]:
    rest = {("b" if k == "b_weight" else k): t for k, t in arguments.items()}
    if functions is reference:
        names = {"q_weight": "qweight", "s_weight": "scales"}
        return {names.get(k, k): t for k, t in rest.items()}
    for name, source in WEIGHTS.items():
        if f"q_{name}" not in rest:
            continue
        width = rest["x"].shape[-1] if source == "x" else rest["w_gate"].shape[0]
        weight = BinaryWeight(rest.pop(f"q_{name}"), rest.pop(f"s_{name}"), width)
        rest["w" if name == "weight" else f"w_{name}"] = weight
    return rest


def _case(
    fn: Any, names: tuple[str, ...], suffix: str = "", bias: bool = False, **options: Any
) -> Case:
    draws: dict[str, Draw] = {f"q_{name}": _words for name in names}
    draws |= {f"s_{name}": _scales for name in names}
    return Case(
        f"{fn.__name__}{suffix}",
        fn,
        getattr(reference, fn.__name__),
        _shapes(names, bias),
        options,
        draws=draws,
        adapt=_adapt,
        out_shape=lambda M, D, H: (M, D if "down" in names else H),
    )


def cases() -> Iterator[Case]:
    yield _case(binary_linear, ("weight",))
    yield _case(binary_linear, ("weight",), "-bias", bias=True)
    yield _case(binary_gated_linear, ("gate", "up"))
    yield _case(binary_gated_linear, ("gate", "up"), "-bias", bias=True)
    yield _case(binary_gated_mlp, ("gate", "up", "down"))
    yield _case(binary_gated_mlp, ("gate", "up", "down"), "-recompute-bias", True, recompute=True)
