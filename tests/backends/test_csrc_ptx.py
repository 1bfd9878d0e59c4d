"""csrc/ as nvcc compiles it, on the PTX machine, beside g++'s build on the host runner.

Both run the same host code and, from one source, two bodies of each instruction: the runner's in
C++, and PTX. A difference between them beyond rounding is a fault of one.
"""

import ptx_csrc
import pytest
import simt_extension
import torch

import fusedmlp
from fusedmlp.bench.gate.ptx import Finding, Order
from fusedmlp.testing import CASES, compare, error_of, poison

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

PORTABLE = {
    "masked_gated_linear-1-bits": (3, 264, 40),
    "masked_gated_linear-4-bits": (13, 2056, 20),  # in two parts, which a second kernel adds
    "binary_linear-bias": (3, 256, 40),
    "binary_gated_linear": (9, 1152, 60),
    "top1_route": (300, 8, 40),
}
GEMMS = {
    "gated_mlp-bias": (150, 136, 136),
    "gated_mlp-up_gate-bias": (130, 72, 264),
    "mlp-bias": (150, 136, 136),
}
GATES = {  # a name of PORTABLE or GEMMS -> what it computes in a call more
    "masked_gated_linear-1-bits": "swiglu_oai(limit=1.25, alpha=1.5)",
    "binary_gated_linear": "situ(beta=1.25, beta_up=0.75)",
    "gated_mlp-bias": "swiglu_oai(limit=1.25, alpha=1.5)",
    "gated_mlp-up_gate-bias": "situ(beta=1.25, beta_up=0.75)",
}
CALLS = [("sm_80", name, shape) for name, shape in PORTABLE.items()] + [
    (arch, name, shape) for arch in ("sm_90a", "sm_100a") for name, shape in GEMMS.items()
]
CALLS = [(*call, None) for call in CALLS] + [
    (*call, GATES[call[1]]) for call in CALLS if call[1] in GATES
]
ORDERS = (Order("late"), Order("once"), Order("seed", 1), Order("seed", 2, "backwards", 1.0))


@pytest.mark.parametrize(
    ("arch", "name", "shape", "gate"),
    CALLS,
    ids=["-".join(filter(None, (a, n, g))) for a, n, _, g in CALLS],
)
def test_what_nvcc_emits(arch, name, shape, gate, monkeypatch):
    case, options = CASES[name], {"activation": gate} if gate else {}
    inputs = case.inputs(*shape, torch.bfloat16, **options)
    found = []
    for order in ORDERS:
        with ptx_csrc.installed(monkeypatch, arch, order) as launches, fusedmlp.backend("cuda"):
            results = compare(case, inputs, backward=arch != "sm_80", **options)
        assert launches.ran
        for tensor, numbers in results.items():
            assert error_of(*numbers).passed, (order, tensor)
        found.append({tensor: numbers[0] for tensor, numbers in results.items()})
    for other in found[1:3]:
        assert all(torch.equal(t, other[tensor]) for tensor, t in found[0].items())

    with simt_extension.installed(monkeypatch, arch), fusedmlp.backend("cuda"), poison():
        host = compare(case, inputs, backward=arch != "sm_80", **options)
    for tensor, numbers in results.items():
        distance = (host[tensor][0].double() - found[0][tensor].double()).abs().max()
        assert distance <= error_of(*numbers).max_bound, tensor


def test_a_fault_of_the_source_is_found(monkeypatch):
    """A barrier that is not in the PTX, and a line of the CUDA source that says where."""
    case = CASES["binary_gated_linear"]
    inputs = case.inputs(*PORTABLE[case.name], torch.bfloat16)
    text = ptx_csrc._text

    def without_barriers(source, arch):
        return text(source, arch).replace("bar.sync \t0;", "")

    monkeypatch.setattr(ptx_csrc, "_text", without_barriers)
    with (
        pytest.raises(Finding, match=r"(?s)(race|nothing has written).*binary_gemv\.cu:\d+"),
        ptx_csrc.installed(monkeypatch, "sm_80", ORDERS[0]),
        fusedmlp.backend("cuda"),
    ):
        compare(case, inputs, backward=False)
