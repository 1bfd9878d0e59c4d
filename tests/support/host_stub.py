"""fusedmlp's Triton path on CPU tensors, down to a CUDA driver that does nothing: what launches
cost the host.

Triton's own driver, launcher and compiled kernels run, over `host/libcuda.c`. Kernels compute
nothing, and an allocation is the CPU's."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

SOURCE = Path(__file__).with_name("host") / "libcuda.c"


def build(folder):
    """The driver, compiled into `folder`."""
    library = Path(folder) / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-w", SOURCE, "-o", library], check=True)
    shutil.copy(library, library.with_name("libcuda.so"))
    return library


def environment(folder):
    """What a process needs in which `stubbed` is entered; `folder` is as `build` left it."""
    return {**os.environ, "TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


@contextlib.contextmanager
def stubbed():
    """Inside, ops on CPU tensors launch for an H100 that is not there."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    import fusedmlp._api  # every op has its row
    from fusedmlp.backends import choice, library
    from fusedmlp.backends.op import KERNELS
    from fusedmlp.kernels import plans
    from fusedmlp.kernels.arch import ARCHES
    from fusedmlp.kernels.device import pretend

    class Driver:
        utils, launcher_cls = CudaUtils(), CudaLauncher
        get_current_device = staticmethod(lambda: -1)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    for row in KERNELS.values():
        by_plans = library.BY_PLANS[row.name]
        impl = by_plans if row.cuda is None else choice.launcher(row, by_plans)
        library._LIBRARY.impl(row.name, library.on_its_device(impl), "CPU")
    driver.set_active(Driver())
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: -1),
        mock.patch.object(plans, "pretended", lambda: False),
        pretend(ARCHES["sm_90"], 132),
        fusedmlp.backend("triton"),
    ):
        yield
