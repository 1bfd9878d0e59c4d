"""What tests and bench share: the tolerance rule, the cases, NaN-poisoned memory."""

from . import binary, dense, hyper, masked, moe
from .case import Case, Shapes, compare, doubled, evaluate, floating, judge, yardsticks
from .memory import poison
from .rule import Error, assert_close_to, error_of

__all__ = [
    "CASES",
    "Case",
    "Error",
    "Shapes",
    "assert_close_to",
    "compare",
    "doubled",
    "error_of",
    "evaluate",
    "floating",
    "judge",
    "poison",
    "yardsticks",
]

FAMILIES = (dense, masked, moe, hyper, binary)
CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family.cases()}
