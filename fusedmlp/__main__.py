"""`python -m fusedmlp` is the command `fusedmlp`."""

import sys

from .cli import main

sys.exit(main())
