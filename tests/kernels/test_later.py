"""Files of kernels that load at their first call."""

import inspect
import subprocess
import sys

import pytest

from fusedmlp.kernels.later import Later

LATE = ("hyper.hyper_attention", "hyper.gradients", "moe.backward", "masked.backward")
LOADED = "import sys, fusedmlp; fusedmlp.gated_linear; print(*sys.modules)"


def test_an_import_loads_none_of_them():
    """A first attribute is imported in 0.35 s of CPU time over PyTorch because of it."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    modules = done.stdout.split()
    assert "fusedmlp.kernels.dense.gated_linear" in modules
    assert not [name for name in LATE if f"fusedmlp.kernels.{name}" in modules]


def test_a_function_is_that_of_its_file():
    later = Later("binary.backward").binary_linear_dx
    from fusedmlp.kernels.binary.backward import binary_linear_dx

    assert later.__name__ == "binary_linear_dx"
    assert list(inspect.signature(later).parameters) == list(
        inspect.signature(binary_linear_dx).parameters
    )


def test_a_function_that_is_not_there():
    with pytest.raises(AttributeError, match="no_such"):
        Later("binary.backward").no_such()
