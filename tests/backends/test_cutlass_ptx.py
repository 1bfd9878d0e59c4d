"""csrc/cutlass/ as nvcc compiles it, on the PTX machine: numbers of both architectures, with the
host code of CUTLASS before them."""

import cutlass_ptx
import pytest
import torch

import fusedmlp
from fusedmlp.backends.cutlass import dense
from fusedmlp.bench.gate.ptx import Order
from fusedmlp.testing import assert_close_to

pytestmark = [pytest.mark.nvcc, pytest.mark.slow, pytest.mark.cutlass, pytest.mark.interpreter]
# M, H, D and the order of halves: edges of tiles, more tiles than blocks, and few steps of K.
GATED = [(200, 160, 136, "gate_up"), (130, 320, 72, "up_gate"), (700, 640, 200, "gate_up")]
PLAIN = [(128, 256, 64), (200, 264, 136), (600, 1000, 264)]
# On the machine the warps of a wgmma multiply apart, and CUTLASS lets one thread of the four say
# that a stage has been read: an order by seed may fill it while a warp is behind.
ORDERS = {
    90: (Order("late"), Order("once")),
    100: (Order("late"), Order("once"), Order("seed", 1), Order("seed", 2, "backwards", 1.0)),
}


def nan(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def check(name, got, exact, eager):
    assert_close_to(got, exact, eager, name=name)


@pytest.mark.parametrize("shape", GATED, ids=str)
@pytest.mark.parametrize("train", (True, False), ids=("train", "infer"))
@pytest.mark.parametrize("sm", (90, 100))
def test_gated_linear(sm, train, shape, monkeypatch):
    M, H, D, packed = shape
    dtype = torch.float16 if train else torch.bfloat16
    x, b = torch.randn(M, D).to(dtype), torch.randn(2 * H).to(dtype)
    w = (torch.randn(2 * H, D) / D**0.5).to(dtype)
    (w_gate, w_up), (b_gate, b_up) = w.chunk(2), b.chunk(2)
    if packed == "up_gate":
        w_gate, w_up, b_gate, b_up = w_up, w_gate, b_up, b_gate
    activation = "swiglu_oai(limit=1.25, alpha=1.5)" if train else "silu"
    for order in ORDERS[sm]:
        h, gu = nan(M, H, dtype=dtype), nan(2, M, H, dtype=dtype)
        monkeypatch.setattr(dense, "empty_gated", lambda *_, made=(h, gu): made)
        with cutlass_ptx.installed(sm, [x, w, b, h, gu], order) as ran:
            dense.gated_linear_fwd(x, w_gate, w_up, b_gate, b_up, activation, True, train)
        assert len(ran) == 1
        results = []
        for kind in (torch.float64, dtype):
            g = x.to(kind) @ w_gate.to(kind).t() + b_gate.to(kind)
            u = x.to(kind) @ w_up.to(kind).t() + b_up.to(kind)
            results.append((fusedmlp.reference.gated_act(g, u, activation), g, u))
        exact, eager = results
        check("h", h, exact[0], eager[0])
        for i in range(2):
            if train:
                check("gu"[i], gu[i], exact[1 + i], eager[1 + i])
            else:
                assert gu[i].isnan().all()


@pytest.mark.parametrize("shape", PLAIN, ids=str)
@pytest.mark.parametrize("train", (True, False), ids=("train", "infer"))
@pytest.mark.parametrize("sm", (90, 100))
def test_linear_act(sm, train, shape, monkeypatch):
    M, H, D = shape
    dtype = torch.float16 if train else torch.bfloat16
    x, w = torch.randn(M, D).to(dtype), (torch.randn(H, D) / D**0.5).to(dtype)
    b = torch.randn(H).to(dtype) if train else None
    h, z = nan(M, H, dtype=dtype), nan(M, H, dtype=dtype)
    monkeypatch.setattr(dense, "linear_act_results", lambda *_: (h, z))
    tensors = [t for t in (x, w, b, h, z) if t is not None]
    with cutlass_ptx.installed(sm, tensors, ORDERS[sm][0]) as ran:
        dense.linear_act_fwd(x, w, b, "gelu", True, train)
    assert len(ran) == 1
    exact, eager = (
        torch.nn.functional.linear(x.to(k), w.to(k), None if b is None else b.to(k))
        for k in (torch.float64, dtype)
    )
    gelu = torch.nn.functional.gelu
    check("h", h, gelu(exact), gelu(eager))
    if train:
        check("z", z, exact, eager)
    else:
        assert z.isnan().all()
