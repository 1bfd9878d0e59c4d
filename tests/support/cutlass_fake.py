"""An extension that is not there: `fusedmlp._cutlass` with launchers that compute in PyTorch on the
CPU, from the very addresses, sizes and strides that a kernel would get."""

import contextlib
import types

import cuda_fake
import pytest

from fusedmlp.backends import choice, driver
from fusedmlp.backends.cuda import gated_linear as cuda_gated_linear
from fusedmlp.backends.cutlass import loader
from fusedmlp.kernels.arch import arch_for
from fusedmlp.kernels.device import pretend

FWD = [name for name in cuda_fake.FWD if name != "variant"]
KERNELS = ("gated_linear_fwd", "linear_act_fwd")


def _launch(*numbers):
    p = dict(zip(FWD, numbers, strict=True), variant=-1)
    cuda_fake.gated_linear_fwd(*(p[name] for name in cuda_fake.FWD))


def extension(calls, archs=("sm_90a", "sm_100f"), cuda="13.0"):
    return types.SimpleNamespace(
        CUDA=cuda,
        ARCHS=" ".join(archs),
        CUTLASS="4.2.0.0",
        GROUP=32,
        DTYPES=cuda_fake.DTYPES,
        ACTIVATIONS={name: i for i, name in enumerate(cuda_fake.NAMES)},
        OPS={(kernel, arch): calls.record(kernel, _launch) for kernel in KERNELS for arch in archs},
    )


@contextlib.contextmanager
def installed(gpu=90, loaded=None, version=13000, multiprocessors=132, **options):
    """Inside, CPU tensors lie on a GPU of capability `gpu` whose driver is `version`, and the
    extension is the fake one, or what `loaded` says of it. Yields the calls that its launchers
    get."""
    calls = cuda_fake.Calls()
    loaded = (extension(calls, **options), "") if loaded is None else loaded
    with pytest.MonkeyPatch.context() as patch, pretend(arch_for(gpu), multiprocessors):
        patch.setattr(loader, "load", lambda: loaded)
        patch.setattr(driver, "version", lambda: version)
        patch.setattr(cuda_gated_linear, "stream", lambda device: 77)
        choice.SERVED.clear()
        yield calls
    choice.SERVED.clear()
