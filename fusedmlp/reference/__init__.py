"""The mathematics of the library in plain PyTorch: what every kernel is judged by.
One file a family, whose `__all__` says what it offers here.

Any floating dtype, any device, any leading dimensions; gradients are autograd's own.
"""

from . import binary, dense, hyper, masked, moe
from .binary import *  # noqa: F403
from .dense import *  # noqa: F403
from .hyper import *  # noqa: F403
from .masked import *  # noqa: F403
from .moe import *  # noqa: F403

__all__ = sorted(  # noqa: PLE0605
    name for family in (binary, dense, hyper, masked, moe) for name in family.__all__
)
