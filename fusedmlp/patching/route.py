"""Which arguments of topk_route make a model's router, or why none do.

A router gives (logits, weights, experts): logits from x by one linear map, and each token's k
experts and their weights from the logits. It is run on drawn values of its own parameters, in
float64 and in bfloat16, and topk_route's reference with every choice of arguments beside it, whose
numbers are looked for among the router's own and those of its code. Values and gradients must be
the same.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..ops.topk_route import topk_route as route
from ..reference import Routing, topk_route
from ..reference.moe import SCORES
from .gate import InFloat64, in_both_modes

ARGUMENT = "(argument)"  # of a router that is given its bias
TOKENS = 256
_PLAIN = (bool, int, float, str)

# In which dtypes logits are multiplied.
_LINEARS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "as they are": F.linear,
    "x float32": lambda x, w, b: F.linear(x.float(), w, b),
    "x as the weight": lambda x, w, b: F.linear(x.to(w.dtype), w, b),
    "float32": lambda x, w, b: F.linear(x.float(), w.float(), None if b is None else b.float()),
}


class Logits(NamedTuple):
    """weight, bias: names of tensors in the router. in_: in what they are multiplied. wide: the
    product is made float32 afterwards."""

    weight: str
    bias: str | None
    in_: str
    wide: bool

    def __call__(self, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        b = None if self.bias is None else tensors[self.bias]
        z = _LINEARS[self.in_](x.reshape(-1, x.shape[-1]), tensors[self.weight], b)
        return z.float() if self.wide else z


class Route(NamedTuple):
    """added: the name of what is added to the scores for the choice. options: of topk_route, where
    they are no defaults. prob_like: whose dtype the weights have, "float32", "logits" or "x"."""

    logits: Logits
    added: str | None
    k: int
    options: tuple[tuple[str, Any], ...]
    prob_like: str

    def dtype(self, logits: Tensor, x: Tensor) -> torch.dtype:
        return {"float32": torch.float32, "logits": logits.dtype, "x": x.dtype}[self.prob_like]

    def bias(self, tensors: dict[str, Tensor]) -> Tensor | None:
        return None if self.added is None else tensors[self.added].flatten().detach()

    def routing(self, logits: Tensor, x: Tensor, tensors: dict[str, Tensor]) -> Routing:
        """As the router's own code rounds: its weights, before they have their dtype, are those of
        its logits or are float32."""
        given = logits if self.prob_like == "logits" else logits.float()
        routing = route(given, self.k, bias=self.bias(tensors), **dict(self.options))
        return routing._replace(prob=routing.prob.to(self.dtype(logits, x)))


class _Run(NamedTuple):
    """One call of the router: its tensors and x, and its logits, weights and experts; None where it
    has raised, as of dtypes that it does not take."""

    tensors: dict[str, Tensor]
    x: Tensor
    out: tuple[Tensor, Tensor, Tensor] | None

    def has(self, weights: Tensor, index: Tensor, rtol: float) -> bool:
        """Whether each token has these experts, in any order, with these weights. Where logits tie
        for the last place, either may have it."""
        assert self.out is not None
        logits, own, chosen = self.out
        k, best = chosen.shape[1], logits.sort(-1, descending=True).values
        clear = best[:, k - 1] != best[:, k] if k < best.shape[1] else best[:, 0] == best[:, 0]
        mine, theirs = chosen[clear].sort(-1), index[clear].sort(-1)
        if not torch.equal(mine.values, theirs.values):
            return False
        own, others = own[clear].gather(-1, mine.indices), weights[clear].gather(-1, theirs.indices)
        return torch.allclose(own.double(), others.double(), rtol=rtol)


_FOUND: dict[tuple[Any, ...], Route | str] = {}


def route_of(router: nn.Module) -> Route | str:
    """The route of `router`, or why there is none; looked for once for a class and its settings."""
    key = tuple(_settings(router))
    if key not in _FOUND:
        try:
            _FOUND[key] = _route_of(router)
        except Exception as error:  # it takes or gives something else than a router does
            what = str(error).partition("\n")[0]
            _FOUND[key] = f"it is called otherwise: {type(error).__name__}: {what}"
    return _FOUND[key]


def _settings(router: nn.Module) -> Iterator[Any]:
    """All that tells one router from another, its configuration's numbers with them."""
    for m in router.modules():
        yield type(m)
        for name, value in vars(m).items():
            if name == "training":
                continue
            own = vars(value) if hasattr(value, "to_dict") else {name: value}
            yield from ((k, v) for k, v in own.items() if type(v) in _PLAIN or inspect.isroutine(v))
    yield from ((name, tuple(t.shape)) for name, t in _tensors(router))


def _tensors(router: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from router.named_parameters()
    yield from router.named_buffers()


def _run(router: nn.Module, x_dtype: torch.dtype, w_dtype: torch.dtype) -> _Run:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = {}
    for name, t in _tensors(router):
        spread = 1.5 / t.shape[-1] ** 0.5 if is_matrix(t) else 0.3
        tensors[name] = (spread * draw(*t.shape)).to(w_dtype)
    own = dict(tensors)
    E = next(t.shape[0] for t in own.values() if is_matrix(t))
    more: tuple[Tensor, ...] = ()
    x = _drawn(draw, next(t for t in own.values() if is_matrix(t))).to(x_dtype).requires_grad_()
    if len(inspect.signature(inspect.unwrap(type(router).forward)).parameters) > 2:
        tensors[ARGUMENT] = (0.3 * draw(E)).to(torch.promote_types(w_dtype, torch.float32))
        more = (tensors[ARGUMENT],)
    for given in (x, x[None]):  # some ask for a batch of sequences
        try:
            logits, weights, index = functional_call(router, own, (given, *more))
        except RuntimeError:
            return _Run(tensors, x, None)
        except ValueError:
            continue
        if index.dtype == torch.int64 and index.shape == weights.shape and index.dim() == 2:
            return _Run(tensors, x, (logits, weights, index))
    raise TypeError("it gives no logits, weights and indices of each token's experts")


def _drawn(draw: Callable[..., Tensor], weight: Tensor) -> Tensor:
    """x whose logits are near 0 or, of some tokens, all of them so low that what is added to a sum
    of their scores shows."""
    E, D = weight.shape
    if E > D:
        return draw(TOKENS, D)
    logits = 1.5 * draw(TOKENS, E)
    logits[::8] -= 46
    w = weight.double()
    return (w.T @ torch.linalg.solve(w @ w.T, logits.T)).T


def is_matrix(t: Tensor) -> bool:
    return t.dim() == 2 and min(t.shape) > 1


def _route_of(router: nn.Module) -> Route | str:
    with torch.enable_grad(), torch.device("cpu"):
        with InFloat64():
            modes = [_run(router, torch.float64, torch.float64) for _ in in_both_modes(router)]
        narrow = [_run(router, torch.bfloat16, w) for w in (torch.bfloat16, torch.float32)]
    exact, other = modes
    if exact.out is None or other.out is None or not any(run.out for run in narrow):
        return "it gives no logits, weights and indices"
    if not all(map(torch.equal, exact.out, other.out)):
        return "it is another in training"
    logits = _logits(exact, narrow)
    if logits is None:
        return "its logits are not one linear map of x"
    found = next(_choices(router, exact), None)
    if found is None:
        return "topk_route has no arguments that choose and weigh as it does"
    return _checked(Route(logits, *found, "float32"), exact, narrow)


def _logits(exact: _Run, narrow: list[_Run]) -> Logits | None:
    assert exact.out is not None
    matrices = [n for n, t in exact.tensors.items() if is_matrix(t)]
    vectors = [n for n, t in exact.tensors.items() if t.dim() == 1 and n != ARGUMENT]
    for weight, bias in itertools.product(matrices, (None, *vectors)):
        one = Logits(weight, bias, "as they are", False)
        mine, own = one(exact.tensors, exact.x), exact.out[0]
        if mine.shape == own.shape and torch.allclose(mine, own, rtol=1e-9):
            forms = (one._replace(in_=in_, wide=wide) for in_ in _LINEARS for wide in (False, True))
            return next((f for f in forms if all(_bits(f, run) for run in narrow)), None)
    return None


def _bits(form: Logits, run: _Run) -> bool:
    """Whether `form` gives the run's logits to the bit, and raises where that did."""
    try:
        mine = form(run.tensors, run.x)
    except RuntimeError:
        return run.out is None
    return run.out is not None and mine.dtype == run.out[0].dtype and torch.equal(mine, run.out[0])


def _choices(router: nn.Module, run: _Run) -> Iterator[tuple[str | None, int, tuple[Any, ...]]]:
    """(added, k, options) that give the run's experts and weights."""
    assert run.out is not None
    (logits, _, index), numbers = run.out, sorted(_numbers(router))
    k, experts = index.shape[1], index.sort(-1).values
    added = [None, *(n for n, t in run.tensors.items() if t.numel() == logits.shape[1])]
    for score, compared, name in itertools.product(SCORES, ("score", "logits"), added):
        bias = None if name is None else run.tensors[name].flatten()
        for grouped in _groups(logits.shape[1], k, numbers):
            picked: Any = {"score": score, "compared": compared, **grouped}
            plain = topk_route(logits, k, norm=False, bias=bias, **picked)
            if not torch.equal(plain.expert.sort(-1).values, experts):
                continue
            for weighed in _weighings(numbers):
                routing = topk_route(logits, k, bias=bias, **picked, **weighed)
                if run.has(routing.prob, routing.expert, rtol=1e-9):
                    yield name, k, _changed({**picked, **weighed})


def _changed(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What is not the default of topk_route."""
    default = inspect.signature(topk_route).parameters
    return tuple((k, v) for k, v in sorted(options.items()) if v != default[k].default)


def _groups(E: int, k: int, numbers: list[float]) -> Iterator[dict[str, Any]]:
    yield {}
    whole = [int(n) for n in numbers if n == int(n) and n > 1]
    for groups, how in itertools.product(whole, ("top2", "max")):
        size = E // groups
        fits = E % groups == 0 and (size > 1 or how == "max")
        for taken in (1, *whole):
            if fits and taken < groups and taken * size >= k:
                yield {"groups": groups, "topk_group": taken, "group_score": how}


def _weighings(numbers: list[float]) -> Iterator[dict[str, Any]]:
    small = [n for n in numbers if 0 < n < 0.1]
    for scale in dict.fromkeys((1.0, *numbers)):
        yield {"norm": False, "scale": scale}
        yield {"norm": True, "scale": scale}
        yield from ({"norm": True, name: n, "scale": scale} for n in small for name in _LEAST)


_LEAST = ("eps", "least")


def _numbers(router: nn.Module) -> set[float]:
    """The router's settings, the constants of its code, and one over each."""
    code = inspect.unwrap(type(router).forward).__code__.co_consts
    settings = (v for _, v in (s for s in _settings(router) if isinstance(s, tuple)))
    found = {float(v) for v in (*code, *settings) if type(v) in (int, float) and 0 < v < 1e9}
    return found | {1 / v for v in found if v > 1}


def _checked(route: Route, exact: _Run, narrow: list[_Run]) -> Route | str:
    """`route` with the dtype of its weights, if it agrees in bfloat16 and in its gradients too."""
    runs = [(run, run.out) for run in narrow if run.out is not None]
    for like in ("float32", "logits", "x"):
        own = route._replace(prob_like=like)
        if all(weights.dtype == own.dtype(z, run.x) for run, (z, weights, _) in runs):
            break
    else:
        return "its weights have the dtype of neither x nor logits, nor float32"
    for run, (logits, weights, _) in runs:
        routing = own.routing(logits, run.x, run.tensors)
        rtol = 2e-2 if weights.dtype.itemsize == 2 else 1e-5
        if not run.has(routing.prob, routing.expert, rtol=rtol):
            return "it rounds its scores before it chooses"
    assert exact.out is not None
    logits, weights, _ = exact.out
    prob = topk_route(logits, own.k, bias=own.bias(exact.tensors), **dict(own.options)).prob
    theirs, mine = (_gradient(t, exact.x) for t in (weights, prob))
    alike = torch.allclose(mine, theirs, rtol=1e-6, atol=1e-12)
    return own if alike else "the gradient of its weights is another"


def _gradient(weights: Tensor, x: Tensor) -> Tensor:
    """0 where they have none."""
    if not weights.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(weights.square().sum(), x, retain_graph=True)[0]
