"""`fusedmlp bench campaign` on the stand-in: the real command, its steps handed to the server. A
step that is to hang has seconds, any other has time enough on a busy machine.

    python campaign.py ARGUMENT ...
"""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

from fusedmlp import cli
from fusedmlp.bench.campaign import command, plans, runner

PYTHON = (sys.executable, "-I", "-S", str(Path(__file__).with_name("python.py")))
HANGS = [
    pattern
    for pattern, kind, _ in json.loads(os.environ.get("STANDIN_FAULTS", "[]"))
    if kind == "hang"
]
HANG_S, OTHER_S = 8.0, 60.0


def on_standin(step):
    hangs = any(re.search(pattern, " ".join(step.argv)) for pattern in HANGS)
    argv = (*PYTHON, *step.argv[1:])
    return dataclasses.replace(step, argv=argv, budget_s=HANG_S if hangs else OTHER_S)


def handed_over(plan):
    return dataclasses.replace(plan, steps=lambda: list(map(on_standin, plan.steps())))


def main(*arguments):
    plans.PLANS.update({name: handed_over(plan) for name, plan in plans.PLANS.items()})
    step = command.python_step
    command.python_step = lambda *rest: on_standin(step(*rest))
    runner.LEAST_S = 1.0
    return cli.main(["bench", "campaign", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
