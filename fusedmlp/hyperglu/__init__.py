"""HyperGLU and HyperMLP: sequence mixing that reads as an MLP whose hidden width is the prefix."""

from .cache import HyperGLUCache
from .config import HyperGLUConfig
from .layer import HyperGLU, HyperMLP

__all__ = ["HyperGLU", "HyperGLUCache", "HyperGLUConfig", "HyperMLP"]
