"""Small steps for a campaign's machinery: a line of Python each, without the library."""

import sys
import time
from pathlib import Path

from fusedmlp.bench.campaign import resume, runner
from fusedmlp.bench.campaign.runner import Box
from fusedmlp.bench.campaign.steps import Step

MACHINE = {"gpu": "Synthetic", "commit": "c0ffee", "source": "5ca1e"}
PEAK = {
    "kind": "peak", "name": "copy", "dtype": "float32", "bytes": 1, "tflops": None, "gbps": 1.0,
}  # fmt: skip
# What a child does with its records, without the second that importing the library takes.
PRELUDE = """
import json, os, sys, time
def emit(record):
    with open(os.environ["FUSEDMLP_RECORDS"], "a") as file:
        file.write(json.dumps(record) + "\\n")
"""


def step(name: str, code: str, budget_s: float = 20, **more) -> Step:
    return Step(name, (sys.executable, "-c", PRELUDE + code), budget_s, **more)


def emitting(*sizes: int) -> str:
    return "".join(f"emit({{**{PEAK!r}, 'bytes': {n}}})\n" for n in sizes)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter between open and read
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    """Within ten seconds: the kill is sent at once, a loaded machine takes its time."""
    for _ in range(1000):
        if not alive(pid):
            return True
        time.sleep(0.01)
    return False


def run(steps, out, minutes=1.0, machine=MACHINE, say=lambda line: None):
    known = resume.readable([out, resume.RESULTS], say)
    ledger = resume.open_ledger(machine, steps, out, known)
    others = [other for other in known if other.path != ledger.path]
    runner.run_campaign(ledger, steps, Box(minutes), others, say)
    return ledger


def statuses(ledger) -> dict[str, str]:
    return {s["name"]: s["status"] for s in ledger.steps}
