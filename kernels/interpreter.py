"""What Triton's interpreter needs so that these kernels run in it, with every Triton and NumPy that
pyproject promises."""

from __future__ import annotations

from typing import Any

import triton


def _index(tensor: Any) -> int:
    return int(tensor.handle.data.item())


def mend() -> None:
    """Let a loop bound that is known only at run time be an int under Triton 3.6 and NumPy 2.4.

    The interpreter holds a scalar as an array of one element, from which NumPy makes no int since
    2.4. Triton 3.7 asks for the element, and so does this.
    """
    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang_tensor

    def prepare_and_mend(tensor: Any, scope: Any) -> None:
        prepare(tensor, scope)
        scope.set_attr(tensor, "__index__", _index)

    interpreter._patch_lang_tensor = prepare_and_mend
