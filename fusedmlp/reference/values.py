"""What the host may read of a tensor: nothing on meta, nor in a FakeTensorMode."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(t: Tensor) -> bool:
    return not (t.is_meta or isinstance(t, FakeTensor))


def any_of(bad: Tensor) -> bool:
    """Whether something is set, as far as there are values. Waits for a GPU."""
    return has_values(bad) and bool(bad.any())
