"""A method with a run of its statements cut out, and the run as a method of its own (find.py).

Both are compiled from the method's source, in its globals, with what it closes over and under its
own line numbers. Source that is not what runs is not touched.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from .names import Cut, Run, runs, statements

# What the run is called where it stood.
RUN = "_fused_run"
_ANNOTATIONS = __future__.annotations.compiler_flag


@cache
def runs_of(forward: Any) -> tuple[Run, ...]:
    try:
        return tuple(runs(_definition(forward)))
    except (OSError, TypeError, SyntaxError, ValueError, NameError):
        return ()  # no source, or one that is not what runs


def _definition(forward: Any) -> ast.FunctionDef:
    """Raises ValueError unless its source compiles to what `forward` is."""
    if not isinstance(forward, FunctionType):
        raise ValueError(f"{forward} is no function")
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError(f"{forward} is no def")
    ast.increment_lineno(definition, forward.__code__.co_firstlineno - 1)
    private = (n for n in ast.walk(definition) if isinstance(n, ast.Attribute))
    if any(n.attr.startswith("__") and not n.attr.endswith("__") for n in private):
        raise ValueError(f"{forward} has names that its class mangles")
    code = forward.__code__
    if _codes(code.co_filename).get((code.co_name, code.co_firstlineno)) != code.co_code:
        raise ValueError(f"{forward} is not what its source says")
    return definition


@cache
def _codes(filename: str) -> dict[tuple[str, int], bytes]:
    """The code of every function in a file. It has to be compiled whole: what a module imports
    decides how its functions look names up."""
    todo = [compile("".join(linecache.getlines(filename)), filename, "exec", dont_inherit=True)]
    found: dict[tuple[str, int], bytes] = {}
    while todo:
        code = todo.pop()
        found[code.co_name, code.co_firstlineno] = code.co_code
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    return found


def _compiled(definition: ast.FunctionDef, like: FunctionType) -> Any:
    """In the globals of `like`, with what it closes over."""
    free = like.__code__.co_freevars
    # Parsed, since a definition has other fields in each version of Python.
    tree = ast.parse(f"def _outer({', '.join(free)}): pass")
    tree.body[0].body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]  # type: ignore[attr-defined]
    ast.fix_missing_locations(tree)
    flags = like.__code__.co_flags & _ANNOTATIONS
    code = compile(tree, like.__code__.co_filename, "exec", flags, dont_inherit=True)
    made: dict[str, Any] = {}
    exec(code, like.__globals__, made)
    return made["_outer"](*(cell.cell_contents for cell in like.__closure__ or ()))


def _arguments(*names: str) -> ast.arguments:
    return ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])


@cache
def run_of(own: type, cut: Cut) -> Callable[..., Any]:
    """The run as a method of its own."""
    like = inspect.unwrap(own.forward)  # type: ignore[attr-defined]
    definition = _definition(like)
    taken = statements(definition, cut.path)[cut.start : cut.stop + 1]
    if cut.call is None:
        result: ast.expr = ast.Name(cut.y or "", ast.Load())
    else:
        result = list(ast.walk(taken.pop()))[cut.call]  # type: ignore[assignment]
    owner = definition.args.args[0].arg
    definition.name, definition.decorator_list, definition.returns = RUN, [], None
    definition.args = _arguments(owner, *cut.names)
    definition.body = [*taken, ast.Return(result)]
    return _compiled(definition, like)


@cache
def around_run(own: type, cut: Cut) -> Callable[..., Any]:
    """The forward of `own` with one call in the place of the run."""
    like = inspect.unwrap(own.forward)  # type: ignore[attr-defined]
    definition = _definition(like)
    listed = statements(definition, cut.path)
    last = listed[cut.stop]
    owner = definition.args.args[0].arg
    run = ast.Attribute(ast.Name(owner, ast.Load()), RUN, ast.Load())
    call = ast.Call(run, [ast.Name(name, ast.Load()) for name in cut.names], [])
    if cut.call is None:
        last = ast.Assign([ast.Name(cut.y or "", ast.Store())], call)
    else:
        old = list(ast.walk(last))[cut.call]
        last = _Exchange(old, call).visit(last)
    ast.copy_location(last, listed[cut.stop])
    listed[cut.start : cut.stop + 1] = [last]
    return _compiled(definition, like)


class _Exchange(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)
