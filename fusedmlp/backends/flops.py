"""FLOPs of products, for the rows of ops and kernels: two for each multiplication and addition.
And the bytes that no implementation can help moving.

An op's formula takes the shapes of its arguments by name, a kernel's its arguments, with shapes in
place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

Shape = Sequence[int]
Shapes = Mapping[str, Shape]
HYPER = ("q", "k", "v", "c1", "u1", "vt1", "d1", "c2", "u2", "vt2", "d2")


def bytes_moved(arguments: Iterable[tuple[int, bool]], results: int, phase: str) -> int:
    """The least that a phase moves between memory and chip. arguments: bytes of each, and whether
    it gets a gradient. Forward reads them and writes the results; backward reads them and the
    results' gradients, and writes theirs; "both" is the sum."""
    sizes = list(arguments)
    forward = sum(size for size, _ in sizes) + results
    backward = forward + sum(size for size, gradient in sizes if gradient)
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def no_products(*arguments: object) -> int:
    """Elementwise work, and sorting, count as none."""
    return 0


def rows_times(*weights: str) -> Callable[[Shapes], int]:
    """x times each of these weights. Weights of experts are stacked, and a row meets one."""

    def flops(shapes: Shapes) -> int:
        rows = prod(shapes["x"][:-1])
        return 2 * rows * sum(prod(shapes[w][-2:]) for w in weights if w in shapes)

    return flops


def lora_names(*projections: str) -> tuple[str, ...]:
    """a and b of these projections' adapters, as shapes are named."""
    return tuple(f"w_{p}_{part}" for p in projections for part in "ab")


def _rank(c: Shape | None) -> int:
    return 0 if c is None else c[-1]


def hyper_pair(
    heads: tuple[int, int], q: Shape, v: Shape, c1: Shape | None, c2: Shape | None
) -> int:
    """One query and one source in all heads of hyper_attention."""
    Q, H = heads
    return 2 * (Q * (q[-1] + 2 * _rank(c1)) + H * (v[-1] + 2 * _rank(c2)))


def hyper_scores(shapes: Shapes, visible: bool) -> int:
    """One call: every query with every source, or with those that it sees."""
    q, v, T = shapes["q"], shapes["v"], shapes["q"][-2]
    pairs = prod(q[:-3]) * (T * (T + 1) // 2 if visible else T * T)
    return pairs * hyper_pair((q[-3], v[-3]), q, v, shapes.get("c1"), shapes.get("c2"))


def hyper_gradients(shapes: Shapes, wanted: Sequence[bool]) -> int:
    """The gradients of such a call that are wanted, as autograd would make them from T x T scores;
    scores that a kernel makes again do not count."""
    want = dict(zip(HYPER, wanted, strict=True))
    q, v = shapes["q"], shapes["v"]
    scores = want["q"] or want["k"]
    gated = scores or any(want[name] for name in ("c1", "u1", "vt1", "d1"))
    mixed = gated or any(want[name] for name in ("c2", "u2", "vt2", "d2"))
    first = _rank(shapes.get("c1")) * (
        scores + want["u1"] + (scores or want["c1"] or want["u1"]) + want["vt1"]
    )
    second = _rank(shapes.get("c2")) * (
        gated + want["u2"] + (gated or want["c2"] or want["u2"]) + want["vt2"]
    )
    of_q = q[-3] * (q[-1] * (want["q"] + want["k"]) + first)
    of_v = v[-3] * (v[-1] * (mixed + want["v"]) + second)
    return 2 * prod(q[:-3]) * q[-2] ** 2 * (of_q + of_v)
