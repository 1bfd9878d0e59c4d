"""python -m fusedmlp.bench.gate.csrc"""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
