"""What the tests of HyperGLU share: the core written out as loops over rows and sources, and
perturbed layers."""

from collections import Counter

import torch
import torch.nn.functional as F

import fusedmlp
from fusedmlp import backend, hyper_attention
from fusedmlp.backends.library import serve_cpu
from fusedmlp.bench.gate.ptx import emulate
from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.ops import hyper_attention as op
from fusedmlp.testing import assert_close_to, evaluate, yardsticks


def by_loops(q, k, v, c1, u1, vt1, d1, c2, u2, vt2, d2, *, kind="glu", norm="out_scale",
             aligner="offset", causal=True, shortcut1=True, shortcut2=True, mask1=True,
             mask2=True, eps=1e-12):  # fmt: skip
    """fusedmlp.reference.hyper_attention, one number at a time: rows t, columns by their slot."""
    B, Q, T, _ = q.shape
    H = v.shape[1]
    offset = aligner == "offset"

    def mix(X, c, u, vt, d, shortcut, seen, masked):
        """X: {column: value} of one row; one head's parameters."""
        if c is None:
            return X
        slot = {j: u.shape[0] - T + j for j in X}
        h = sum(X[j] * u[slot[j]] for j in X)
        out = {}
        for j in X:
            value = ((h * c) * vt[:, slot[j]]).sum()
            value = value + (X[j] * d[slot[j]] if d is not None else 0)
            value = value + (X[j] if shortcut else 0)
            out[j] = value if j in seen or not masked else torch.zeros_like(value)
        return out

    def of(parameters, i):
        return [None if t is None else t[i] for t in parameters]

    result = torch.zeros_like(v)
    for b in range(B):
        for i in range(H):
            for t in range(T):
                source = {j: t - (T - 1) + j if offset else j for j in range(T)}
                seen = {j for j, s in source.items() if 0 <= s <= t}

                def scores(a, b=b, t=t, source=source, seen=seen):
                    zero = q.new_zeros(())
                    visible = seen if offset or causal else set(source)
                    S = {j: q[b, a, t] @ k[b, a, s] if j in visible else zero
                         for j, s in source.items()}  # fmt: skip
                    row = None if c1 is None else c1[b, a, t]
                    return mix(S, row, *of((u1, vt1, d1), a), shortcut1, seen, causal and mask1)

                P1 = scores(i)
                rho = sum(p * p for p in P1.values()).sqrt().clamp_min(eps)
                n = 1 / rho if norm != "none" else torch.ones_like(rho)
                A = {j: F.relu(p) for j, p in P1.items()}
                if kind == "glu":
                    P2 = scores(i + H)
                    A = {j: F.softplus(P2[j]) * a for j, a in A.items()}
                row = None if c2 is None else c2[b, i, t]
                Y = mix(A, row, *of((u2, vt2, d2), i), shortcut2, seen, causal and mask2)
                inside = [j for j, s in source.items() if s >= 0]
                result[b, i, t] = n * sum(Y[j] * v[b, i, source[j]] for j in inside)
    return result


def config(**options):
    """A small layer's, ranks and widths all different."""
    fixed = {"n_embd": 24, "n_head": 2, "block_size": 40, "qk_rank": 24, "vo_rank": 20,
             "op1_rank": 5, "op2_rank": 3, "chunk_T": 8}  # fmt: skip
    return HyperGLUConfig(**{**fixed, **options})


def perturbed(cls=HyperGLU, dtype=torch.float64, seed=0, std=0.2, **options):
    """Every parameter moved by 0.2: at initialisation a wrong order of lags passes unnoticed."""
    torch.manual_seed(seed)
    layer = cls(config(**options)).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(std * torch.randn_like(p))
    return layer


def core_inputs(
    B=2, H=2, T=7, dq=3, dv=4, r1=3, r2=2, L=9, kind="glu", dtype=torch.float64, seed=0
):
    """Arguments of hyper_attention by name. In 16 bits a P1 near 0 may round across it, in eager's
    result or in ours, and its gradient with it: there scores are drawn off 0 and mixed by little,
    so that every P1 keeps the sign of its score, one in two below 0."""
    g = torch.Generator().manual_seed(seed)
    Q = 2 * H if kind == "glu" else H

    def t(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    inputs = {
        "q": t(B, Q, T, dq), "k": t(B, Q, T, dq), "v": t(B, H, T, dv),
        "c1": t(B, Q, T, r1), "u1": t(Q, L, r1, scale=0.3), "vt1": t(Q, r1, L, scale=0.3),
        "d1": t(Q, L, scale=0.3), "c2": t(B, H, T, r2), "u2": t(H, L, r2, scale=0.3),
        "vt2": t(H, r2, L, scale=0.3), "d2": t(H, L, scale=0.3),
    }  # fmt: skip
    if dtype.itemsize == 2:
        for name in ("q", "k"):
            sign = t(B, Q, T, 1).sign()
            inputs[name] = sign * (0.5 + inputs[name].abs().clamp(max=2))
        for name in ("u1", "vt1", "d1"):
            inputs[name] = inputs[name] / 8
    # Scores near 1: of heavier tails a few values decide a whole tensor's bound.
    inputs["q"] = inputs["q"] / dq**0.5
    return inputs


def reference(inputs, options):
    absent = {name: None for name in op.NAMES if name not in inputs}
    return fusedmlp.reference.hyper_attention(**inputs, **absent, **options)


def check(inputs, dy=None, wanted=None, **options):
    """Output and gradients by the tolerance rule; None arguments left out."""
    inputs = {k: t for k, t in inputs.items() if t is not None}
    torch.manual_seed(1)
    dy = torch.randn_like(inputs["v"]) if dy is None else dy
    ours = evaluate(lambda t: hyper_attention(**t, **options), inputs, dy, wanted)
    known = yardsticks(lambda t: reference(t, options), inputs, dy, wanted)
    for name, out in ours.items():
        assert_close_to(out, *known[name], name=name)
    return ours


def chunks_executed(arch, multiprocessors, T):
    """How often each compiled kernel ran in a checked forward and backward of two heads."""
    serve_cpu()
    inputs = core_inputs(B=1, H=2, T=T, L=T + 3, dq=8, dv=8, dtype=torch.bfloat16)
    with emulate(ARCHES[arch], multiprocessors=multiprocessors) as machine, backend("triton"):
        check(inputs)
    return Counter(run.kernel for run in machine.runs)
