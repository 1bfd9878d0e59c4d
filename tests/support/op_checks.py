"""What every op must do, as functions of a Case; tests/ops/ says for which cases each is called."""

import itertools

import torch

import fusedmlp
from fusedmlp import reference
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.testing import assert_close_to, compare, evaluate
from fusedmlp.testing.memory import kept_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = [name for name, row in ACTIVATIONS.items() if row.up is None]  # no gates
# For the large ops, whose epilogues differ while a row's device function is one: each kind of row,
# with a kink or without, with parameters, with a factor of u. Every row runs in the small ops.
FEW_PLAIN = ["silu", "gelu_tanh", "relu", "identity", "leaky_relu(negative_slope=0.25)"]
FEW = [*FEW_PLAIN, "swiglu_oai", "swiglu_step(limit=2.5)", "situ"]


def unlike(name):
    """The row with parameters that are not its defaults, and no two alike."""
    row = ACTIVATIONS[name]
    return row.spelled(**dict(zip(row.parameters, (1.25, 0.75, 1.5), strict=False)))


def check(case, inputs, **options):
    for name, triple in compare(case, inputs, **options).items():
        assert_close_to(*triple, name=name)


def strided(t, how):
    """The same values in memory laid out otherwise."""
    if how == "wide rows":
        return placed(t, step=3)
    if how == "every other row":
        return torch.stack([t, torch.full_like(t, 7)], 1).flatten(0, 1)[::2]
    return t.t().contiguous().t() if t.dim() == 2 else t


def placed(t, inner=1, step=0, offset=0):
    """The values of `t` amid NaN (or what is no index): columns `inner` elements apart, rows `step`
    elements more than they need, the first element `offset` elements behind 64 bytes' alignment."""
    row = inner * t.shape[-1] + step
    rows = t.numel() // max(t.shape[-1], 1)
    filler = float("nan") if t.is_floating_point() else 77
    guard = 64 // t.element_size()
    memory = t.new_full((2 * guard + offset + rows * row,), filler)
    first = guard - memory.data_ptr() % 64 // t.element_size() + offset
    place = memory[first : first + rows * row].view(*t.shape[:-1], row)
    return place[..., : inner * t.shape[-1] : inner].copy_(t)


# Zeros of both signs, magnitudes down to 1e-6, and more below 0.2, where tanh changes its formula.
PROBES = torch.cat([
    torch.logspace(-6, 0, 97), torch.linspace(0.01, 0.21, 401), torch.tensor([0.2, 0.1999999, 0.0])
])  # fmt: skip
PROBES = torch.cat([PROBES, -PROBES])


def assert_precise_near_zero(activation, value, slope):
    """Value and slope at PROBES with u = 1, in float32: relative to the value itself, which is
    small there, and at 0 to the bit where float32 has it, as PyTorch does: relu'(0) = 0."""
    leaf = PROBES.double().requires_grad_()
    exact = reference.gated_act(leaf, torch.ones_like(leaf), activation)
    (exact_slope,) = torch.autograd.grad(exact.sum(), leaf)
    zero = PROBES == 0
    for ours, theirs in ((value, exact), (slope, exact_slope)):
        here = zero & (theirs == theirs.float())  # softplus(0) is no float32
        assert torch.equal(ours[here], theirs[here].float())
    # Bsilu is a difference of two terms that do not vanish at 0, laplace one of 1 and nearly 1;
    # tanh is a series, to avoid one.
    known = {"bsilu": (0, 2e-7), "laplace": (0, 6e-8), "tanh": (3e-7, 0)}
    rtol, atol = known.get(activation, (6e-7, 0))
    torch.testing.assert_close(value.double(), exact.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=6e-7, atol=6e-7)


def saved_bytes(case, inputs):
    """Bytes that autograd keeps beyond the arguments themselves."""
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    return kept_bytes(lambda: case.run(leaves), leaves.values())


def gradcheck(case):
    """The formula, in float64: autograd's gradients of the reference against finite differences."""
    inputs = case.inputs(3, 5, 4, torch.float64)
    leaves = [t.requires_grad_(k not in case.straight_through) for k, t in inputs.items()]
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *tensors: case.run(dict(zip(names, tensors, strict=True))), leaves
    )


def no_rows(case, device):
    inputs = case.inputs(0, 6, 10, torch.float32, device)
    results = evaluate(
        case.run, inputs, torch.zeros(case.fake_output(0, 6, 10).shape, device=device)
    )
    assert results["out"].shape == case.fake_output(0, 6, 10).shape
    for name, t in inputs.items():
        assert results[f"d{name}"].shape == t.shape
        assert not results[f"d{name}"].any()  # a sum over no rows is 0, not garbage


def leading_dimensions(case, device):
    inputs = case.inputs(12, 16, 24, torch.float32, device)
    flat = case.run(inputs)
    shaped = case.run({**inputs, "x": inputs["x"].view(2, 3, 2, 16)})
    assert shaped.shape == (2, 3, 2, flat.shape[-1])
    torch.testing.assert_close(shaped.flatten(0, 2), flat, rtol=0, atol=0)
    single = case.run({**inputs, "x": inputs["x"][0]})
    assert single.shape == flat.shape[-1:]


def strides(case, shape, how, device):
    inputs = case.inputs(*shape, torch.float32, device)
    check(case, {k: strided(t, how) for k, t in inputs.items()})


def rows_far_apart(case, device):
    """Offsets beyond 2^31 elements, in memory of which only the rows' own pages are touched."""
    M, D, H, step = 4, 24, 40, 2**30
    inputs = case.inputs(M, D, H, torch.float16, device)
    first = next(iter(inputs))
    far = torch.empty(3 * step + 64, dtype=torch.float16, device=device)
    far = far.as_strided(inputs[first].shape, (step, 1)).copy_(inputs[first])
    with fusedmlp.backend("triton"):
        check(case, {**inputs, first: far})


def zero_stride_gradient(case, device):
    inputs = case.inputs(9, 24, 40, torch.float32, device)
    dy = torch.ones((), device=device).expand(case.fake_output(9, 24, 40).shape)
    assert not any(dy.stride())
    check(case, inputs, dy=dy)


def every_subset_of_gradients(case, device):
    inputs = case.inputs(5, 12, 20, torch.float32, device)
    dy = torch.randn(case.fake_output(5, 12, 20).shape, device=device)
    full = evaluate(case.run, inputs, dy)
    # All of up to five; of seven the singles, pairs and all but one, which take every branch.
    for size in range(1, len(inputs)) if len(inputs) <= 5 else (1, 2, len(inputs) - 1):
        for wanted in itertools.combinations(inputs, size):
            part = evaluate(case.run, inputs, dy, wanted)
            for key in part:
                torch.testing.assert_close(part[key], full[key], rtol=2e-6, atol=2e-6)


def reruns(case, device):
    inputs = case.inputs(33, 40, 136, torch.bfloat16, device)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    before = {k: t.detach().clone() for k, t in inputs.items()}
    out = case.run(leaves)
    dy = torch.randn_like(out)
    first = torch.autograd.grad(out, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(out, list(leaves.values()), dy)
    again = case.run(leaves)
    third = torch.autograd.grad(again, list(leaves.values()), dy)
    assert torch.equal(out, again)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for k, t in before.items():
        assert torch.equal(t, leaves[k])


def bad_rows(case, bad, device):
    inputs = case.inputs(35, 40, 48, torch.float32, device)
    first = next(iter(inputs))
    dy = torch.ones(case.fake_output(35, 40, 48).shape, device=device)
    clean = evaluate(case.run, inputs, dy, (first,))
    inputs[first] = inputs[first].clone()
    inputs[first][7] = bad
    dirty = evaluate(case.run, inputs, dy, (first,))
    others = [i for i in range(35) if i != 7]
    for key in clean:
        assert torch.equal(clean[key][others], dirty[key][others])
    assert not dirty["out"][7].isfinite().all()


def compiles(case, dynamic, device):
    torch._dynamo.reset()
    inputs = case.inputs(6, 16, 24, torch.float32, device)
    dy = torch.randn(case.fake_output(6, 16, 24).shape, device=device)
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = evaluate(case.run, inputs, dy)
    for key, t in evaluate(compiled, inputs, dy).items():
        torch.testing.assert_close(t, eager[key])
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs), eager["out"])


def modified_in_place(case, device):
    """As a residual `y += x` or an in-place dropout does; the gradients stay right."""
    inputs = {
        k: t.requires_grad_() for k, t in case.inputs(6, 16, 24, torch.float32, device).items()
    }
    plain = torch.autograd.grad(case.run(inputs).sum(), list(inputs.values()))
    changed = torch.autograd.grad(case.run(inputs).mul_(2).sum(), list(inputs.values()))
    for a, b in zip(plain, changed, strict=True):
        torch.testing.assert_close(2 * a, b)


def opcheck(op, args, **options):
    """torch.library.opcheck of the overload that is called outside of batch_invariant()."""
    torch.library.opcheck(getattr(op, "__wrapped__", op), args, **options)
