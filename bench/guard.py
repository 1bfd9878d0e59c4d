"""python guard.py PARENT COMMAND ...: run a command in a group of processes that ends with PARENT.

A step of a campaign holds the GPU. Killed with SIGKILL, the campaign can end none of its steps, so
the kernel tells this guard, which kills its whole group, grandchildren included. It imports nothing
of the library: it starts in milliseconds, and answers however its command hangs.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def _end(*_: object) -> None:
    os.killpg(0, signal.SIGKILL)


def main(parent: str, *argv: str) -> int:
    signal.signal(signal.SIGTERM, _end)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        _end()
    code = subprocess.Popen(argv).wait()
    if code < 0:
        # The same end for whoever waits for this process, and no core file beside the command's.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
