"""Two provers that others wrote look at the Triton kernels of sm_80, without a GPU.

    python tests/prove [races] [--kernel NAME ...] [--every] [--limit SECONDS] [--mutant [K]]
    python tests/prove values [--kernel NAME ...]

README.md beside this file says what each proves and what it cannot.
"""

import sys

from prove_command import main

sys.exit(main())
