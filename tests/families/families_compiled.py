"""Experts on the machine for PTX, for the process that compiles."""

from __future__ import annotations

from families_build import experts
from families_compare import judged

from fusedmlp import backend
from fusedmlp.backends.library import serve_cpu
from fusedmlp.bench.gate.ptx import emulate
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.patching import experts_forward
from fusedmlp.testing import Error

# One of each layout and gate: interleaved, transposed with biases, clamped before and after the
# activation, two caps, without a gate, transposed.
COMPILED = (
    ("gpt_oss", "GptOssExperts"), ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"),
    ("deepseek_v4", "DeepseekV4Experts"), ("step3p7", "Step3p7Experts"),
    ("inkling2", "Inkling2Experts"), ("nemotron_h", "NemotronHExperts"), ("aria", "AriaExperts"),
)  # fmt: skip


def compiled(family: str, name: str, arch: str) -> tuple[dict[str, Error], list[str]]:
    """Errors of what the compiler emits for `arch`, and the kernels that ran."""
    serve_cpu()
    module = experts(family, name)
    launched: set[str] = set()

    def run(*args):
        return experts_forward(module, *args)

    with emulate(ARCHES[arch]) as machine, backend("triton"):
        errors = judged(module, run)
        launched = {run.kernel for run in machine.runs}
    return errors, sorted(launched)
