"""Is the device still usable? After an illegal access or a failed capture nothing in this process
can be believed: what was not tried by then is on record as "not run"."""

from __future__ import annotations

import torch

from .options import Refusal

NOT_RUN = "not run"


class DeviceLost(Refusal):
    """This process can use its device no more; the message says why."""


def why_lost(device: str) -> str | None:
    """What the CUDA context of this process died of; None where it is alive, or there is none."""
    if device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:  # of several types, by the version of torch
        return f"the CUDA context is lost: {(str(error).splitlines() or [''])[0][:160]}"
    return None


def not_run(why: str) -> str:
    return f"{NOT_RUN}: {why}"
