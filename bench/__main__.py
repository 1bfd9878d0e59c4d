"""python -m fusedmlp.bench"""

import sys

from .cli import main
from .process import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
