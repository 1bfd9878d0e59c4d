"""What tests and bench share: the tolerance rule, the cases, NaN-poisoned memory."""

from . import dense
from .case import Case, Shapes, compare, evaluate, judge
from .memory import poison
from .rule import Error, assert_close_to, error_of

__all__ = [
    "CASES",
    "Case",
    "Error",
    "Shapes",
    "assert_close_to",
    "compare",
    "error_of",
    "evaluate",
    "judge",
    "poison",
]

FAMILIES = (dense,)
CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family.cases()}
