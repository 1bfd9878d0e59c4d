"""Runs of statements in a function that make one value of one variable."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_LONGEST = 8
_ENDS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
# What is in these may be evaluated later, often or never.
_LAZY = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp,
         ast.BoolOp)  # fmt: skip
_ODD = (ast.Yield, ast.YieldFrom, ast.Await, ast.NamedExpr)
_ALLOWED = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.If, ast.For)


class Cut(NamedTuple):
    """Statements `start` to `stop` of the list that `path` leads to: (index, field) of each
    statement around it. Of the last one either all, which leaves its value in `y`, or the
    expression that ast.walk comes to as number `call`. The value is a function of `names`."""

    path: tuple[tuple[int, str], ...]
    start: int
    stop: int
    names: tuple[str, ...]
    y: str | None
    call: int | None


class Run(NamedTuple):
    """mentions: dotted paths below self. callable: whether a call may stand for it, since all that
    it reads is there whatever branch is taken."""

    cut: Cut
    mentions: tuple[str, ...]
    callable: bool


class Use(NamedTuple):
    """reads: names that are read before they are surely written."""

    reads: frozenset[str]
    writes: frozenset[str]
    sure: frozenset[str]


def _named(node: ast.AST, *context: type[ast.expr_context]) -> frozenset[str]:
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context))
    return frozenset(n.id for n in names)


def _loads(node: ast.AST) -> frozenset[str]:
    augmented = (n.target for n in ast.walk(node) if isinstance(n, ast.AugAssign))
    again = (_named(target, ast.Store) for target in augmented)
    return _named(node, ast.Load).union(*again)


def use(nodes: Sequence[ast.AST]) -> Use:
    reads: set[str] = set()
    writes: set[str] = set()
    sure: frozenset[str] = frozenset()
    for node in nodes:
        if isinstance(node, ast.If):
            body, other = use(node.body), use(node.orelse)
            reads |= (_loads(node.test) | body.reads | other.reads) - sure
            writes |= body.writes | other.writes
            sure |= body.sure & other.sure
        elif isinstance(node, ast.For):
            body, target = use(node.body), _named(node.target, ast.Store)
            reads |= (_loads(node.iter) | (body.reads - target)) - sure
            writes |= body.writes | target
        else:
            reads |= _loads(node) - sure
            sure |= _named(node, ast.Store)
            writes |= sure
    return Use(frozenset(reads), frozenset(writes), sure)


def statements(function: ast.FunctionDef, path: Sequence[tuple[int, str]]) -> list[ast.stmt]:
    found = function.body
    for index, field in path:
        found = getattr(found[index], field)
    return found


def runs(function: ast.FunctionDef) -> Iterator[Run]:
    """The shortest first."""
    arguments = function.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
             *filter(None, (arguments.vararg, arguments.kwarg)))  # fmt: skip
    if not arguments.args:
        return
    owner, given = arguments.args[0].arg, frozenset(a.arg for a in every)
    found = _Finder(function, owner, given, given | _named(function, ast.Store))
    for path in _lists(function.body):
        listed = statements(function, path)
        for stop in range(len(listed)):
            for start in range(stop, -1, -1)[:_LONGEST]:
                if start < stop and not _plain(listed[start]):
                    break
                yield from found(Cut(path, start, stop, (), None, None))


def _lists(body: list[ast.stmt], path: tuple[tuple[int, str], ...] = ()) -> Iterator[
    tuple[tuple[int, str], ...]
]:  # fmt: skip
    """The lists of statements that are run once."""
    yield path
    for index, statement in enumerate(body):
        if isinstance(statement, ast.If):
            for field in ("body", "orelse"):
                yield from _lists(getattr(statement, field), (*path, (index, field)))


def _plain(statement: ast.stmt) -> bool:
    """Whether it runs to its end, and is nothing but what it computes."""
    nodes = list(ast.walk(statement))
    odd = any(isinstance(n, _ODD) or (isinstance(n, ast.For) and n.orelse) for n in nodes)
    return not odd and all(isinstance(n, _ALLOWED) for n in nodes if isinstance(n, ast.stmt))


class _Finder(NamedTuple):
    """given: names of the arguments. own: all that are local."""

    function: ast.FunctionDef
    owner: str
    given: frozenset[str]
    own: frozenset[str]

    def __call__(self, at: Cut) -> Iterator[Run]:
        listed = statements(self.function, at.path)
        before, last = listed[at.start : at.stop], listed[at.stop]
        if isinstance(last, _ENDS):
            for number, call in _calls(last, self.owner):
                if not _live(self.function, before, last, call):
                    yield from self.run(at._replace(call=number), [*before, call])
        elif _plain(last):
            taken = [*before, last]
            alive = _live(self.function, taken, None, None)
            if len(alive) == 1:
                (y,) = alive
                uses = use(taken)
                if y in uses.sure or y in uses.reads:
                    yield from self.run(at._replace(y=y), taken)

    def run(self, at: Cut, taken: Sequence[ast.AST]) -> Iterator[Run]:
        names = (use(taken).reads & self.own) - {self.owner}
        # More than one where a branch that is not taken reads another argument (BLOOM's residual).
        if 1 <= len(names) <= 3:
            cut, mentions = at._replace(names=tuple(sorted(names))), _mentions(taken, self.owner)
            yield Run(cut, mentions, len(names) == 1 or names <= self.given)


def _calls(last: ast.stmt, owner: str) -> Iterator[tuple[int, ast.expr]]:
    """Calls of submodules in a statement that are surely made, the innermost first."""
    nodes = list(ast.walk(last))
    lazy = {id(n) for outer in nodes if isinstance(outer, _LAZY) for n in ast.walk(outer)}
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        called = isinstance(node, ast.Call) and _below(node.func, owner)
        if called and id(node) not in lazy and not any(isinstance(n, _ODD) for n in ast.walk(node)):
            yield number, node  # type: ignore[misc]


def _live(
    function: ast.FunctionDef,
    taken: list[ast.stmt],
    last: ast.stmt | None,
    call: ast.expr | None,
) -> set[str]:
    """What the taken statements write and others read: in the rest of `last`, or behind it."""
    written = use(taken).writes
    inside = {id(n) for part in (*taken, call) if part is not None for n in ast.walk(part)}
    end = (last or taken[-1]).end_lineno
    found: set[str] = set()
    for n in ast.walk(function):
        reads = isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in inside
        if reads and n.id in written and n.lineno > end:  # type: ignore[attr-defined]
            found.add(n.id)  # type: ignore[attr-defined]
    if last is not None:
        found -= _named(last, ast.Store) if not isinstance(last, ast.AugAssign) else set()
        rest = (n for n in ast.walk(last) if isinstance(n, ast.Name) and id(n) not in inside)
        found |= {n.id for n in rest if isinstance(n.ctx, ast.Load) and n.id in written}
        if isinstance(last, ast.AugAssign):
            found |= _named(last.target, ast.Store, ast.Load) & written
    return found


def _below(node: ast.expr, owner: str) -> str | None:
    """ "a.b" of self.a.b, of self.a[0] "a"."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        names = [node.attr, *names] if isinstance(node, ast.Attribute) else []
        node = node.value
    return ".".join(names) if names and isinstance(node, ast.Name) and node.id == owner else None


def _mentions(nodes: Sequence[ast.AST], owner: str) -> tuple[str, ...]:
    every = (n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Attribute))
    return tuple(dict.fromkeys(filter(None, (_below(n, owner) for n in every))))
