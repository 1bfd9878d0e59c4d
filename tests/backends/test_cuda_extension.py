"""The built extension, on a machine that need not have a GPU."""

from pathlib import Path

import pytest
import torch

import fusedmlp
from fusedmlp.backends.cuda import loader
from fusedmlp.bench import variants
from fusedmlp.reference.activations import ACTIVATIONS

pytestmark = pytest.mark.extension


@pytest.fixture
def extension():
    loaded, why = loader.load()
    assert loaded is not None, why
    return loaded


def test_tables(extension):
    # An activation may lack a functor, and is then refused; a functor may not lack its activation.
    assert extension.ACTIVATIONS.keys() <= ACTIVATIONS.keys()
    numbers = set(extension.ACTIVATIONS.values())  # two names may share one
    assert numbers == set(range(len(numbers)))
    assert set(extension.DTYPES) == set(loader.DTYPES.values())
    known = {kernel for kernels in loader.ops_with_kernels(False).values() for kernel in kernels}
    plain = {kernel for kernels in loader.ops_with_kernels(True).values() for kernel in kernels}
    assert {kernel for kernel, _ in extension.OPS} <= known | plain
    archs = extension.ARCHS.split()
    for arch in archs:
        own = {kernel for kernel, a in extension.OPS if a == arch} & known
        has_gemms = arch.startswith(("sm_90", "sm_100"))  # csrc/gated_linear_smNN.cu
        assert own == (known if has_gemms else set())
        capability = int(arch.strip("sm_af"))
        assert all(loader.find(kernel, capability)[0] for kernel in plain), arch
    assert extension.VARIANTS.keys() == extension.OPS.keys()
    for kernel in variants.KERNELS if "sm_90a" in archs else ():
        assert tuple(extension.VARIANTS[kernel, "sm_90a"]) == variants.variants_of(kernel)


def test_the_file_is_small(extension):
    """Compressed; csrc/README.md says what it holds."""
    assert Path(extension.__file__).stat().st_size <= 12e6


def test_explain(extension):
    assert f"cuda backend: built with CUDA {extension.CUDA} for {extension.ARCHS}" in (
        fusedmlp.explain()
    )


@pytest.mark.interpreter
def test_a_launch_without_a_gpu_raises_and_does_no_more(extension):
    """A driver that is not there is an error with a text, every time."""
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    silu = (0, (0.0, 0.0, 0.0))
    gemm = [*[x.data_ptr()] * 8, *[64] * 8, *silu, 0, 0, 132, -1, 0]
    gemv = [*[x.data_ptr()] * 5, *[64] * 5, 1, 1, *silu, 0, 0, 0]
    route = [*[x.data_ptr()] * 12, 64, 1, 1, 1, 64, 64, 0, 0, 0]
    others = dict.fromkeys(("top1_route_fwd", "route_to_fwd"), route)
    others["masked_gated_linear_fwd"] = gemv
    one_bit = [*[x.data_ptr()] * 9, 1, 64, 128, 128, 1, *silu, 0, 0, 0]
    others |= dict.fromkeys(("binary_linear_fwd", "binary_gated_linear_fwd"), one_bit)
    for (kernel, _), launch in extension.OPS.items():
        with pytest.raises(TypeError, match=f"{kernel}.*incompatible function arguments"):
            launch(1, 2, 3)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"\w"):
                launch(*others.get(kernel, gemm))
