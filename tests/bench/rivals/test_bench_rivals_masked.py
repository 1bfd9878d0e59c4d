"""The rivals of masked_gated_linear compute it, and its decoding case counts bits as bits."""

import pytest
import torch

from fusedmlp import reference
from fusedmlp.bench.rivals import RIVALS
from fusedmlp.bench.timing import calls
from fusedmlp.bench.work import Work, case_of


def work(n_m, M=1, dtype="float32"):
    return Work(case_of(f"masked_gated_linear-{n_m}-bits"), "silu", dtype, M, 40, 24)


@pytest.mark.parametrize("n_m", (1, 4, 8))
@pytest.mark.parametrize("name", ("naive-masked", "flash-mglu"))
def test_computes_the_op(name, n_m, device):
    assert RIVALS[name].skip(work(n_m), "forward") is None
    assert calls.disagreement(RIVALS[name], work(n_m), device) is None


def test_what_they_skip():
    training = Work(case_of("masked_gated_linear-1"), "silu", "float32", 1, 40, 24)
    for name in ("naive-masked", "flash-mglu"):
        assert RIVALS[name].skip(training, "forward") == "is timed on fixed masks"
        assert RIVALS[name].skip(work(1), "both") == "has no gradient"
    assert RIVALS["flash-mglu"].skip(work(1, M=2), "forward") == "takes one row"
    assert "does not serve gated_act" in RIVALS["naive-masked"].skip(
        Work(case_of("gated_act"), "silu", "float32", 1, 40, 24), "forward"
    )


@pytest.mark.parametrize("n_m", (1, 2, 4, 8))
def test_bytes_of_decoding(n_m):
    decode = Work(case_of(f"masked_gated_linear-{n_m}-bits"), "silu", "bfloat16", 1, 4096, 14336)
    weights = 4096 * 14336 * (16 + n_m) // 8
    assert decode.bytes("forward") == weights + 2 * (4096 + 14336)


def test_wrong_masks_are_seen(device):
    rival = RIVALS["naive-masked"]
    ones = torch.ones(1, 24, 40, dtype=torch.bool, device=device)

    class Wrong(type(rival)):
        def arguments(self, work, inputs):
            return {**super().arguments(work, inputs), "masks": ones}

    assert "computes something else" in calls.disagreement(Wrong(), work(1), device)


@pytest.mark.parametrize("name", ("masked_gated_linear-1", "masked_gated_linear-1-bits"))
def test_two_matrices_are_timed_beside_it(name, device):
    """At its sizes, whatever the masks; it is a measure and computes something else."""
    sized = Work(case_of(name), "silu", "float32", 3, 40, 24)
    rival = RIVALS["two-matrix-glu"]
    assert rival.skip(sized, "forward") is None
    arguments = rival.arguments(sized, calls.draw(sized, device, 0))
    y = rival.function(sized)(arguments)
    expected = reference.gated_linear(arguments["x"], arguments["w_gate"], arguments["w_up"])
    torch.testing.assert_close(y, expected)
