"""What one call of an op costs the host, over a CUDA driver that does nothing (host_stub.py).

    python tests/support/host_cost.py [OP ...]                  microseconds of CPU time
    python tests/support/host_cost.py --instructions [OP ...]   by valgrind's callgrind; minutes

Prints a row of JSON for each op: a call by launch plans, without, and the same mathematics by
PyTorch on CPU tensors so small that it is all overhead. Needs gcc.
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import host_stub

CALLS, ROUNDS = 200, 15
COUNTED = 20  # calls that callgrind counts
WITH_PRODUCTS = ("gated_mlp", "mlp")  # the second is PyTorch's own, which computes here


def plain():
    """Op -> the same by PyTorch."""
    import torch
    import torch.nn.functional as F

    from fusedmlp import reference
    from fusedmlp.reference import Routing

    def draw(*shape):
        return torch.ones(shape, dtype=torch.bfloat16)

    M, D, H, E, T, r = 8, 16, 16, 8, 8, 2
    x, g, u, w, w_up = (draw(n, D) for n in (M, M, M, H, H))
    b = draw(H)
    experts = draw(E, H, D), draw(E, H, D), draw(E, D, H)
    routing: Routing = reference.top1_route(draw(M, E))
    logits = draw(M, E)
    q, k, v = draw(2, 4, T, 8), draw(2, 4, T, 8), draw(2, 2, T, 8)
    mixings = [
        t for n in (4, 2) for t in (draw(2, n, T, r), draw(n, T, r), draw(n, r, T), draw(n, T))
    ]
    options = ("glu", "out_scale", "offset", True, True, True, True, True, 1e-12)
    return {
        "gated_act": lambda: F.silu(g) * u,
        "gated_linear": lambda: F.silu(F.linear(x, w)) * F.linear(x, w_up),
        "linear_act": lambda: F.gelu(F.linear(x, w, b)),
        "top1_route": lambda: reference.top1_route(logits),
        "moe_mlp": lambda: reference.moe_mlp(x, routing, *experts),
        "hyper_attention": lambda: reference.hyper_attention(q, k, v, *mixings, *options),
    }


def microseconds(call):
    """Least CPU time of a call over rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time() - start) / CALLS * 1e6)
    return round(best, 1)


def instructions(folder):
    """From a call to the instructions that it runs, in a process that callgrind watches."""
    library = ctypes.CDLL(str(Path(folder) / "counting.so"))

    def count(call):
        for _ in range(3):
            call()
        library.start()
        for _ in range(COUNTED):
            call()
        library.stop()
        newest = max(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        return int(re.search(r"^summary: (\d+)", newest.read_text(), re.M)[1]) // COUNTED

    return count


def measure(only, count):
    import host_count
    import torch

    from fusedmlp.kernels.plans import RECORDED, unplanned

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with host_stub.stubbed():
        pytorch = plain()
        for op, call in host_count.calls().items():
            if op in WITH_PRODUCTS or (only and op not in only):
                continue
            for _ in range(RECORDED + 2):
                call()
            row = {"op": op, "by plans": count(call)}
            with unplanned():
                row["without"] = count(call)
            if op in pytorch:
                row["pytorch"] = count(pytorch[op])
            print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--in-folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_folder:
        count = instructions(given.in_folder) if given.instructions else microseconds
        measure(given.ops, count)
        return
    with tempfile.TemporaryDirectory() as folder:
        host_stub.build(folder)
        argv = [sys.executable, __file__, "--in-folder", folder, *given.ops]
        if given.instructions:
            source = Path(__file__).with_name("host") / "counting.c"
            library = Path(folder) / "counting.so"
            subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
            tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
            argv = [*tool, f"--callgrind-out-file={folder}/out", *argv, "--instructions"]
        subprocess.run(argv, env=host_stub.environment(folder), check=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
