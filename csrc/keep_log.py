"""Run a compiler and keep what it says beside the object it makes, where fusedmlp.bench.gate.csrc
reads it: for what ptxas warns of cannot be seen in the object."""

import subprocess
import sys

command = sys.argv[1:]
done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
sys.stderr.write(done.stderr)
if "-o" in command:
    with open(command[command.index("-o") + 1] + ".log", "w") as file:
        file.write(done.stderr)
sys.exit(done.returncode)
