"""python -m fusedmlp.bench: `fusedmlp bench` of the copy that Python finds first, which in the
folder of a checkout is the checkout."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
