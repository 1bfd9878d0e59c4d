"""What the reports of patch() and quantize_model() say, to the letter, of every kind of entry."""

import itertools

import pytest

from fusedmlp.patching.report import (
    LOOKED_FOR,
    Entry,
    QuantizationReport,
    Quantized,
    Report,
)  # fmt: skip

LEFT = Entry("a.b", "MLP", None, None, "its act is hooked")
WHOLE = Entry("", "MLP", "mlp", "triton", "activation 'gelu'")
PART = Entry("c", "Gated", "gated_act", "triton", "w1 is called", partly=True, spared=1536)
GIB = 2**30
ONE_BIT = QuantizationReport(
    "q1_0", (Quantized("x", 3 * 2**20, 2**19), Quantized("y", 2**20, 2**19)), 3 * GIB, GIB, (LEFT,)
)
NO_MORE = QuantizationReport("q1_0", (), 0, 0)
LEFT_SAYS = "a.b (MLP): left, its act is hooked"
WHOLE_SAYS = "the model (MLP): mlp on triton, activation 'gelu'"
PART_SAYS = "c (Gated): gated_act on triton, w1 is called (1,536 bytes)"
ONE_BIT_SAYS = (
    "2 MLPs in q1_0: 4.00 MiB -> 1.00 MiB (4.0 times smaller); the model 3,072.00 MiB -> "
    f"1,024.00 MiB\nnot in q1_0: {LEFT_SAYS}"
)
SPARES = "; 1,536 bytes a token less are saved for backward"


SPARED = {0: "", 7: " (7 bytes)", 12345: " (12,345 bytes)"}
RUNS = {None: "on reference", "triton": "on CUDA: triton; here: reference"}


def test_an_entry():
    every = itertools.product(SPARED, ((), ("w1 is 12 wide",), ("a", "b")), RUNS)
    for spared, slow, elsewhere in every:
        entry = Entry("m", "MLP", "mlp", "reference", "why", False, spared, slow, elsewhere)
        own = f"m (MLP): mlp {RUNS[elsewhere]}, why{SPARED[spared]}"
        assert str(entry) == "; ".join((own, *slow))


# Entries, what was quantised, and the line between what is said of both.
REPORTS = [
    ((), None, f"nothing was patched; looked for {LOOKED_FOR}"),
    ((LEFT,), None, f"nothing was patched; looked for {LOOKED_FOR}"),
    ((LEFT,), ONE_BIT, "0 patched, 1 left"),
    ((WHOLE,), None, "1 patched, 0 left"),
    ((WHOLE,), NO_MORE, "1 patched, 0 left"),
    ((WHOLE, LEFT, LEFT), None, "1 patched, 2 left"),
    ((PART,), None, f"1 patched (1 in part), 0 left{SPARES}"),
    ((LEFT, PART, WHOLE, WHOLE), ONE_BIT, f"3 patched (1 in part), 1 left{SPARES}"),
]
SAID = {LEFT: LEFT_SAYS, WHOLE: WHOLE_SAYS, PART: PART_SAYS}
SAID_OF_BITS = {None: [], ONE_BIT: [ONE_BIT_SAYS], NO_MORE: ["no further MLP in q1_0"]}


@pytest.mark.parametrize("entries, quantized, head", REPORTS)
def test_a_report(entries, quantized, head):
    report = Report(entries, quantized)
    said = [*SAID_OF_BITS[quantized], head, *(SAID[entry] for entry in entries)]
    assert str(report) == "\n".join(said)
    assert report.patched == tuple(e for e in entries if e is not LEFT)
    assert report.left == tuple(e for e in entries if e is not WHOLE)
    assert report.partly == tuple(e for e in entries if e is PART)


def test_bytes_of_what_was_quantised():
    assert (ONE_BIT.before, ONE_BIT.after) == (4 * 2**20, 2**20)
    assert (NO_MORE.before, NO_MORE.after) == (0, 0)
