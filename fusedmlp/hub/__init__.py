"""fusedmlp as a kernel of Hugging Face's Hub: stateless layers, and the folder that holds them.

    python -m fusedmlp.hub FOLDER --repo-id OWNER/fusedmlp

writes a project of kernel-builder (build.toml, flake.nix, CARD.md, tests, torch-ext/fusedmlp) and
beside it build/torch-cuda and build/torch-cpu, which the `kernels` package loads as they are. There
is nothing to compile: Triton does at first use. docs/hub.md says how it is used.

| file | |
|---|---|
| `layers.py` | the layers that `kernelize` puts in the place of a model's |
| `adopted.py` | what such a layer computes: what the model's own forward does |
| `__main__.py`, `texts.py` | the folder, and the files in it that are no code of ours |
"""

from . import layers

__all__ = ["layers"]
