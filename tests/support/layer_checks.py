"""What the tests of all layers ask of each: formula, round trips, meta device, compile, cost."""

from __future__ import annotations

import copy
import gc
import pickle
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fusedmlp.testing import assert_close_to, yardsticks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Most that a layer may cost above plain PyTorch where a small nn.Linear takes 8 us a call. A slower
# machine gets more, in proportion, measured in the same rounds: a busy moment counts for both.
BUDGET = 15e-6
LINEAR_CALL = 8e-6

Formula = Callable[[dict[str, Tensor], Tensor], Tensor]


def stranger(x: Tensor) -> Tensor:
    """x / (1 + x^2), which no row of fusedmlp.reference.activations computes."""
    return x / (1 + x.square())


class Stranger(nn.Module):
    """The tests' activation without a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return stranger(x)


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def randomise_(layer: nn.Module) -> nn.Module:
    """Every parameter from N(0, 1), matrices and stacks of them over the root of their columns:
    none stays zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in layer.parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() in (2, 3) else 1.0
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return layer


def assert_matches(layer: nn.Module, formula: Formula, x: Tensor) -> None:
    """Output and every gradient of `layer` are those of formula(parameters, x).

    Judged by the library's tolerance rule: exact is the formula in float64, eager in x's dtype.
    """
    dy = draw(*x.shape[:-1], layer(x).shape[-1], dtype=x.dtype).to(x.device)
    inputs = {"x": x, **{name: p.detach() for name, p in layer.named_parameters()}}
    ask = lambda t: formula({k: v for k, v in t.items() if k != "x"}, t["x"])  # noqa: E731
    known = yardsticks(ask, inputs, dy)
    leaf = x.detach().requires_grad_()
    out = layer(leaf)
    grads = torch.autograd.grad(out, [leaf, *layer.parameters()], dy)
    ours = {"out": out} | {f"d{k}": g for k, g in zip(inputs, grads, strict=True)}
    assert out.dtype == x.dtype
    for name, result in ours.items():
        assert_close_to(result, *known[name], name=name)


def one(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """One tensor of a layer's results: with its auxiliary loss, if it has one."""
    return out[0] + out[1].to(out[0].dtype) if isinstance(out, tuple) else out


def assert_round_trips(layer: nn.Module, fresh: nn.Module, x: Tensor) -> None:
    """deepcopy, pickle and state_dict (into `fresh`, of the same arguments) keep the function."""
    y = one(layer.eval()(x))
    assert torch.equal(one(copy.deepcopy(layer)(x)), y)
    assert torch.equal(one(pickle.loads(pickle.dumps(layer))(x)), y)
    assert not torch.equal(one(fresh.eval()(x)), y)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(one(fresh(x)), y)


def assert_initialises_from_meta(make: Callable[[], nn.Module]) -> None:
    """Built on meta, emptied and initialised, a layer has no parameter that was not written."""
    with torch.device("meta"):
        layer = make()
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(float("nan"))
    torch.manual_seed(3)
    layer.init_weights_()
    built = make()
    for (name, p), expected in zip(layer.named_parameters(), built.parameters(), strict=True):
        assert p.isfinite().all(), name
        # The draws differ, their distribution does not.
        rel = max(0.2, 3 * p.numel() ** -0.5)
        assert _rms(p) == pytest.approx(_rms(expected), rel=rel), name


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def assert_compiles(layer: nn.Module, x: Tensor) -> None:
    """One graph in training and one in eval, with the values and gradients of eager mode."""
    for training in (True, False):
        layer.train(training)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        results = []
        for run in (layer, compiled):
            torch.manual_seed(5)
            leaf = x.detach().requires_grad_()
            y = one(run(leaf))
            inputs = [leaf, *layer.parameters()]
            results.append((y, *torch.autograd.grad(y.sum(), inputs, materialize_grads=True)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def assert_cheap(
    layer: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor | None = None
) -> None:
    """On a small call, `layer` costs at most BUDGET above `plain`, which computes the same."""
    x = draw(8, 64) if x is None else x
    linear = nn.Linear(64, 64)
    torch.testing.assert_close(layer(x), plain(x))
    best = float("inf")
    gc.disable()
    try:
        for _ in range(100):
            ours, theirs, yardstick = _medians((layer, plain, linear), x)
            slowness = max(1.0, yardstick / LINEAR_CALL)
            best = min(best, (ours - theirs) / slowness)
            if best <= BUDGET:
                return
    finally:
        gc.enable()
    raise AssertionError(f"{best * 1e6:.1f} us above plain PyTorch, allowed {BUDGET * 1e6:.0f}")


def _medians(functions: tuple[Callable[[Tensor], Tensor], ...], x: Tensor) -> list[float]:
    """Median seconds of one call of each; they take turns call by call, so that load hits all."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(200):
        for fn, measured in zip(functions, times, strict=True):
            start = time.perf_counter()
            fn(x)
            measured.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]
