"""fusedmlp as a kernel of Hugging Face's Hub: stateless layers, and the folder that holds them.

    python -m fusedmlp.hub FOLDER

writes `build.toml` and torch-ext/fusedmlp, a source tree for kernel-builder, and build/torch-cuda,
which the `kernels` package loads as it is. There is nothing to compile: Triton does at first use.
"""

from . import layers

__all__ = ["layers"]
