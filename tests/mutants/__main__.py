"""Puts single faults into the code and says which of them the tests miss.

    python tests/mutants --seed 1 --room ops --count 5

README.md beside this file says how to read the result.
"""

import sys

from mutants_command import main

sys.exit(main())
