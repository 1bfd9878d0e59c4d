"""How many bytecodes one call runs, in Python's own and fusedmlp's and Triton's files: a count that
is the same on every processor. Kernels are launched on the stand-in of plan_driver.py, so that what
a driver does is not in it."""

import sys

import plan_driver
import torch

import fusedmlp
from fusedmlp.kernels.plans import unplanned


def bytecodes(call):
    """Bytecodes of one call, whatever file they are in; those of C are none."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def calls():
    """Op -> a call that is all overhead."""

    def draw(*shape):
        return torch.ones(shape, dtype=torch.bfloat16)

    M, D, H, E, T, r = 256, 512, 1024, 8, 64, 16
    x, g, u = draw(M, D), draw(M, H), draw(M, H)
    w, w_up = draw(2 * H, D).chunk(2)
    w_down, b, logits = draw(D, H), draw(H), draw(M, E)
    e_gate, e_up, e_down = draw(E, H, D), draw(E, H, D), draw(E, D, H)
    with fusedmlp.backend("reference"):
        routing = fusedmlp.top1_route(logits)
    q, k, v = draw(2, 4, T, 16), draw(2, 4, T, 16), draw(2, 2, T, 32)
    first, second = ((draw(2, n, T, r), draw(n, T, r), draw(n, r, T), draw(n, T)) for n in (4, 2))
    position = torch.tensor([T - 1])
    step = (first[0][:, :, -1], *first[1:], second[0][:, :, -1], *second[1:])
    return {
        "gated_act": lambda: fusedmlp.gated_act(g, u),
        "gated_linear": lambda: fusedmlp.gated_linear(x, w, w_up),
        "linear_act": lambda: fusedmlp.linear_act(x, w, b),
        "gated_mlp": lambda: fusedmlp.gated_mlp(x, w, w_up, w_down),
        "mlp": lambda: fusedmlp.mlp(x, w, w_down),
        "top1_route": lambda: fusedmlp.top1_route(logits),
        "moe_mlp": lambda: fusedmlp.moe_mlp(x, routing, e_gate, e_up, e_down),
        "hyper_attention": lambda: fusedmlp.hyper_attention(q, k, v, *first, *second),
        "hyper_attention_step": lambda: fusedmlp.hyper_attention_step(
            q[:, :, -1], k, v, position, *step
        ),
    }


def counts():
    """Op -> (bytecodes of a call by plans, without)"""
    found = {}
    with plan_driver.served():
        for op, call in calls().items():
            for _ in range(4):
                call()
            by_plans = bytecodes(call)
            with unplanned():
                call()
                found[op] = by_plans, bytecodes(call)
    return found
