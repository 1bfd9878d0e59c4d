"""An extension that is not there: `fusedmlp._C` with launchers that compute in PyTorch on the
CPU, from the very addresses, sizes and strides that a kernel would get."""

import contextlib
import ctypes
import re
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fusedmlp.backends import choice, driver as cuda_driver
from fusedmlp.backends.cuda import gated_linear as cuda_gated_linear, loader
from fusedmlp.kernels.arch import arch_for
from fusedmlp.kernels.device import pretend
from fusedmlp.reference.activations import ACTIVATIONS, Resolved

SUM_ROWS = 16
NAMES = list(reversed(ACTIVATIONS))  # the extension's order is its own
DTYPES = {"float16": 0, "bfloat16": 1}
_FWD = (
    "x w_gate w_up b_gate b_up h g u M H D stride_x stride_gate stride_up stride_h stride_gu "
    "activation scalars dtype device multiprocessors variant stream"
)
_BWD = (
    "dy w_down g u dg du h sums M H D stride_dy stride_down stride_gu stride_dgu stride_h "
    "activation scalars dtype device multiprocessors variant stream"
)
FWD, BWD = _FWD.split(), _BWD.split()


HEADER = Path(__file__).parents[2] / "csrc" / "gated_linear.h"


def variants(table):
    """Names in a table of the header, such as kFwdSm90."""
    body = re.search(rf"{table}\[\] = \{{(.*?)\}};", HEADER.read_text(), re.DOTALL).group(1)
    return re.findall(r'"([^"]+)"', body)


def at(address, rows, columns, stride, dtype):
    """The matrix that lies at an address, or None."""
    if not address:
        return None
    size = torch.empty((), dtype=dtype).element_size()
    count = (rows - 1) * stride + columns
    memory = (ctypes.c_char * (count * size)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (stride, 1))


def _dtype(p):
    return {number: getattr(torch, name) for name, number in DTYPES.items()}[p.dtype]


def _gate(p):
    row = ACTIVATIONS[NAMES[p.activation]]
    return Resolved(row, p.scalars[: len(row.parameters)])


def _slope(f, t):
    """f'(t). In a thread of its own: compiled code turns autograd off in the one that calls."""

    def slope():
        leaf = t.float().requires_grad_()
        return torch.autograd.grad(f(leaf).sum(), leaf)[0]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(slope).result()


def gated_linear_fwd(*numbers):
    p = types.SimpleNamespace(**dict(zip(FWD, numbers, strict=True)))
    dtype = _dtype(p)
    x = at(p.x, p.M, p.D, p.stride_x, dtype).float()

    def project(w, b, stride):
        t = x @ at(w, p.H, p.D, stride, dtype).float().t()
        return t + at(b, 1, p.H, p.H, dtype).float() if b else t

    g = project(p.w_gate, p.b_gate, p.stride_gate)
    u = project(p.w_up, p.b_up, p.stride_up) if p.w_up else None
    h = _gate(p).phi(g)
    for address, stride, value in (
        (p.h, p.stride_h, h if u is None else h * _gate(p).psi(u)),
        (p.g, p.stride_gu, g),
        (p.u, p.stride_gu, u),
    ):
        if address:
            at(address, p.M, p.H, stride, dtype).copy_(value)


def gated_linear_bwd(*numbers):
    p = types.SimpleNamespace(**dict(zip(BWD, numbers, strict=True)))
    dtype = _dtype(p)
    dy = at(p.dy, p.M, p.D, p.stride_dy, dtype).float()
    dh = dy @ at(p.w_down, p.D, p.H, p.stride_down, dtype).float()
    g, u = (at(t, p.M, p.H, p.stride_gu, dtype) for t in (p.g, p.u))
    gate = _gate(p)
    h, slope = gate.phi(g.float()), _slope(gate.phi, g)
    grads = [dh * slope]
    if u is not None:
        up = gate.psi(u.float())
        grads = [dh * slope * up, dh * h * _slope(gate.psi, u)]
        h = h * up
    for address, value in zip((p.dg, p.du), grads, strict=False):
        at(address, p.M, p.H, p.stride_dgu, dtype).copy_(value)
    if p.h:
        at(p.h, p.M, p.H, p.stride_h, dtype).copy_(h)
    if p.sums:
        tiles = -(-p.M // SUM_ROWS)
        sums = at(p.sums, len(grads) * tiles, p.H, p.H, torch.float32)
        parts = [part.sum(0) for t in grads for part in t.split(SUM_ROWS)]
        sums.copy_(torch.stack(parts))


class Calls(list):
    """The kernels that were launched, each with its numbers."""

    def record(self, kernel, launcher):
        def launch(*numbers):
            self.append((kernel, numbers))
            launcher(*numbers)

        return launch


def extension(calls, archs=("sm_90a",), kernels=None):
    launchers = {
        "gated_linear_fwd": gated_linear_fwd,
        "gated_linear_bwd": gated_linear_bwd,
        "linear_act_fwd": gated_linear_fwd,
        "linear_act_bwd": gated_linear_bwd,
    }
    return types.SimpleNamespace(
        CUDA="13.0",
        ARCHS=" ".join(archs),
        SUM_ROWS=SUM_ROWS,
        DTYPES=DTYPES,
        ACTIVATIONS={name: i for i, name in enumerate(NAMES)},
        VARIANTS={
            (kernel, arch): variants("kSm100" if arch.startswith("sm_100") else f"k{side}Sm90")
            for arch in archs
            for kernel in launchers
            for side in [kernel[-3:].capitalize()]
        },
        OPS={
            (kernel, arch): calls.record(kernel, launcher)
            for arch in archs
            for kernel, launcher in launchers.items()
            if kernels is None or kernel in kernels
        },
    )


@contextlib.contextmanager
def installed(gpu=90, loaded=None, proven=(), driver=13000, **options):
    """Inside, CPU tensors lie on a GPU of capability `gpu` whose driver is `driver`, and the
    extension is the fake one, or what `loaded` says of it. Yields the calls that its launchers
    get."""
    calls = Calls()
    loaded = (extension(calls, **options), "") if loaded is None else loaded
    with pytest.MonkeyPatch.context() as patch, pretend(arch_for(gpu), 132):
        patch.setattr(loader, "load", lambda: loaded)
        patch.setattr(cuda_driver, "version", lambda: driver)
        patch.setattr(loader, "PROVEN", frozenset(proven))
        patch.setattr(cuda_gated_linear, "stream", lambda device: 77)
        loader.find.cache_clear()
        choice.SERVED.clear()
        yield calls
    loader.find.cache_clear()
    choice.SERVED.clear()
