"""Single faults of Python code. What cannot change a result is not drawn: docstrings, comments,
strings, annotations, what an error or a warning is made of, assertions,
hints of speed."""

from __future__ import annotations

import ast
import re
from itertools import pairwise

from mutants_base import Mutant

SYMBOLS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.LShift: "<<", ast.RShift: ">>", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^",
    ast.And: "and", ast.Or: "or",
}  # fmt: skip
BOUNDARIES = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
ARITHMETIC = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "<<": ">>", ">>": "<<",
    "&": "|", "|": "&", "^": "|",
}  # fmt: skip
NEIGHBOURS = dict(
    pair
    for a, b in (("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("all", "any"),
                 ("floor", "ceil"), ("zeros", "ones"), ("zeros_like", "ones_like"))
    for pair in ((a, b), (b, a))
)  # fmt: skip
# Their arguments may stand in any order.
SYMMETRIC = {
    "min", "max", "minimum", "maximum", "bare", "wants_grad", "needs_grad", "promote_types",
}  # fmt: skip
# A tensor has the same values after them.
PASSING = {"detach", "contiguous"}
# They change how fast a kernel is, and nothing else; or (`strict`, of zip) assert what holds.
UNSEEN = {"num_warps", "num_stages", "maxnreg", "eviction_policy", "cache_modifier", "strict",
          "disable_licm"}  # fmt: skip

# Twice as near is as near: between rounding and another function lies more.
NEAR = {"rtol", "atol"}


def python_mutants(path: str, text: str) -> list[Mutant]:
    return sorted(set(_Finder(path, text).found))


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, text: str) -> None:
        self.path, self.text, self.found = path, text, []
        self.starts = [0]
        for line in text.split("\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.strides: list[str] = []
        self.visit(ast.parse(text))

    def add(self, operator: str, start: int, end: int, new: str) -> None:
        old = self.text[start:end]
        if "\n" not in old and old != new:
            self.found.append(Mutant(self.path, start, end, new, operator))

    def at(self, line: int, column: int) -> int:
        """The place in the text; ast counts a column in bytes."""
        start, stop = self.starts[line - 1], self.starts[line]
        return start + len(self.text[start:stop].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def source(self, node: ast.AST) -> str:
        return self.text[slice(*self.span(node))]

    def replace(self, operator: str, node: ast.AST, new: str) -> None:
        self.add(operator, *self.span(node), new)

    def between(self, operator: str, left: ast.AST, right: ast.AST, symbol: str, new: str) -> None:
        """Another operator between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        word = rf"\b{symbol}\b" if symbol[0].isalpha() else re.escape(symbol)
        if match := re.search(word.replace(" ", r"\s+"), self.text[start:end]):
            self.add(operator, start + match.start(), start + match.end(), new)

    # ---- what is left out

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Import(self, node: ast.Import) -> None:
        pass

    visit_ImportFrom = visit_Import

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        given = node.args
        for value in (*given.defaults, *filter(None, given.kw_defaults)):
            self.visit(value)
        outer, names = self.strides, (a.arg for a in (*given.args, *given.kwonlyargs))
        self.strides = [name for name in names if name.startswith("stride")]
        for statement in node.body:
            self.visit(statement)
        self.strides = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    # ---- statements

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in self.source(node.test):
            return
        if len(node.body) == 1 and isinstance(node.body[0], ast.Raise):
            self.replace("refusal dropped", node.test, "False")
        else:
            self.negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.replace("filter dropped", test, "True")
        self.generic_visit(node)

    def negate(self, test: ast.expr) -> None:
        self.replace("condition negated", test, f"not ({self.source(test)})")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.replace("statement dropped", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if self.source(node.target) == "__all__":
            return
        symbol = SYMBOLS.get(type(node.op), "")
        if symbol in ARITHMETIC:
            self.between("arithmetic", node.target, node.value, symbol, ARITHMETIC[symbol])
        self.replace("statement dropped", node, "pass")
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if isinstance(node.value, ast.Tuple):
            self.swap("returns swapped", node.value.elts)
        self.generic_visit(node)

    # ---- expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip(
            (node.left, *node.comparators), node.ops, node.comparators, strict=False
        ):
            symbol = SYMBOLS[type(op)]
            self.between("comparison", left, right, symbol, BOUNDARIES[symbol])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        symbol = SYMBOLS.get(type(node.op), "")
        if symbol in ARITHMETIC and not any(map(is_text, (node.left, node.right))):
            self.between("arithmetic", node.left, node.right, symbol, ARITHMETIC[symbol])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        symbol = SYMBOLS[type(node.op)]
        other = "or" if symbol == "and" else "and"
        for left, right in pairwise(node.values):
            self.between("and, or", left, right, symbol, other)
            start, end = self.span(left)[1], self.span(right)[1]
            if self.text[start:end].count("(") == self.text[start:end].count(")"):
                self.add("operand dropped", start, end, "")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub)):
            name = "not dropped" if isinstance(node.op, ast.Not) else "sign dropped"
            self.replace(name, node, self.source(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace("boolean", node, str(not value))
        elif isinstance(value, int):
            self.replace("constant off by one", node, str(value + 1))
            if value > 1:
                self.replace("constant off by one", node, str(value - 1))
            if value >= 8 and value & value - 1 == 0:
                self.replace("constant halved", node, str(value // 2))
        elif isinstance(value, float):
            self.replace("constant doubled", node, repr(2 * value or 1.0))

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in self.strides and len(self.strides) > 1:
            i = self.strides.index(node.id)
            self.replace("another stride", node, self.strides[i - 1])

    def visit_Call(self, node: ast.Call) -> None:
        if self.source(node.func) == "warnings.warn":
            return
        of = node.func
        name = of.id if isinstance(of, ast.Name) else getattr(of, "attr", "")
        if name not in SYMMETRIC:
            self.swap("arguments swapped", node.args)
        for i, keyword in enumerate(node.keywords):
            if keyword.arg and keyword.arg not in UNSEEN:
                self.drop_keyword(node, i)
        if name in NEIGHBOURS:
            end = self.span(of)[1]
            self.add("its neighbour", end - len(name), end, NEIGHBOURS[name])
        if name in PASSING and isinstance(of, ast.Attribute) and not node.args:
            self.replace("call dropped", node, self.source(of.value))
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in UNSEEN | NEAR:
            self.visit(node.value)

    def drop_keyword(self, call: ast.Call, i: int) -> None:
        start, end = self.span(call.keywords[i])
        before = [*call.args, *call.keywords[:i]]
        if i + 1 < len(call.keywords):
            end = self.span(call.keywords[i + 1])[0]
        elif before:
            start = max(self.span(other)[1] for other in before)
        self.add("keyword dropped", start, end, "")

    def swap(self, operator: str, elements: list[ast.expr]) -> None:
        for a, b in pairwise(elements):
            if all(isinstance(e, (ast.Name, ast.Attribute)) for e in (a, b)):
                (start, middle), (rest, end) = self.span(a), self.span(b)
                self.add(operator, start, end, self.source(b) + self.text[middle:rest]
                         + self.source(a))  # fmt: skip


def is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return is_text(node.left) or is_text(node.right)
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def changes(text: str, mutant: Mutant) -> bool:
    """Does the mutant parse, and as something else?"""
    try:
        return ast.dump(ast.parse(mutant.applied(text))) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False
