"""A machine that runs PTX on a CPU: what a compiler emits is executed without a GPU.

README.md beside this says what is modelled, after which section of the PTX ISA, and what is not.
"""

from .driver import Emulated, emulate
from .finding import Finding
from .run import Order, Program, Run, load
from .text import Unknown

__all__ = ["Emulated", "Finding", "Order", "Program", "Run", "Unknown", "emulate", "load"]
