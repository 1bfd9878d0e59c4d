"""Every function that takes adapters, at the edges: ranks, scales, empty batches, dtypes, autocast,
checkpointing; values and gradients against the formula in float64."""

import inspect

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fusedmlp
from fusedmlp import Adapter, Lora, backend, pack_masks, quantize_binary, route_to
from fusedmlp.backends.op import OPS

T, E = 5, 3
TAKING = [n for n, op in OPS.items() if "lora" in inspect.signature(op.function).parameters]


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5


def case(name, rank, scale, rows=T, dtype=torch.float64, low=None):
    """x, the adapters (float64 or in `dtype`) and the call of one op with frozen weights."""
    to = lambda t: t.to(dtype)  # noqa: E731
    stack = (E,) if name == "moe_mlp" else ()
    D, H = (128, 256) if name == "binary_gated_mlp" else (16, 24)  # groups of one-bit weights
    sizes = {"gate": (H, D), "up": (H, D), "down": (D, H)}
    if name == "mlp":
        del sizes["gate"]
    made = {}
    for i, (part, (out, width)) in enumerate(sizes.items()):
        a, b = drawn(*stack, rank, width, seed=i), drawn(*stack, out, rank, seed=i + 9)
        made[part] = Adapter(*(t.to(low or dtype).requires_grad_() for t in (a, b)), scale)
    x = (drawn(rows, D, seed=20) * D**0.5).to(dtype).requires_grad_()
    gate, up, down = drawn(*stack, H, D, seed=21), drawn(*stack, H, D, seed=22), drawn(
        *stack, D, H, seed=23)  # fmt: skip
    options = {"activation": "gelu_tanh"}  # nobody's default
    if name == "gated_mlp":
        weights = (to(gate), to(up), to(down))
    elif name == "mlp":
        weights = (to(gate), to(down))
    elif name == "moe_mlp":
        expert = torch.arange(2 * rows).view(rows, 2) % E
        weights = (route_to(expert, to(torch.ones(rows, 2) / 2), E), *map(to, (gate, up, down)))
    elif name == "binary_gated_mlp":
        weights = tuple(quantize_binary(w.float()) for w in (gate, up, down))
    elif name == "masked_gated_mlp":
        weights = (to(gate), pack_masks(drawn(2, H, D, seed=24).float()), to(down))
    else:
        raise AssertionError(f"a call of {name} must be written here")
    function = getattr(fusedmlp, name)
    return x, Lora(**made), lambda x, lora: function(x, *weights, **options, lora=lora)


def results(x, lora, call, **how):
    tensors = [x, *(t for p in lora if p for t in p[:2])]
    y = call(x, lora, **how)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, tensors, dy)]


def close(ours, exact, tolerance):
    assert len(ours) == len(exact)
    for i, (mine, want) in enumerate(zip(ours, exact, strict=True)):
        assert mine.shape == want.shape and mine.isfinite().all(), i
        assert (mine.double() - want.double()).norm() <= tolerance * want.double().norm() + 1e-30, i


def exact(name, rank, scale, rows=T):
    with backend("reference"):
        return results(*case(name, rank, scale, rows))


@pytest.mark.interpreter
@pytest.mark.parametrize("rank, scale, rows", [(1, 2.0, T), (3, 0.0, T), (3, -1, 1), (256, 1, T),
                                               (3, 2.0, 0)])  # fmt: skip
@pytest.mark.parametrize("name", TAKING)
def test_ranks_scales_and_rows(name, rank, scale, rows, each_backend):
    ours = results(*case(name, rank, scale, rows, torch.float32))
    close(ours, exact(name, rank, scale, rows), 1e-5)


@pytest.mark.parametrize("name", TAKING)
def test_x_of_more_dimensions_is_as_many_rows(name):
    x, lora, call = case(name, 3, 2.0, rows=6)
    made = (call(x.view(*lead, x.shape[-1]), lora) for lead in ((6,), (2, 3), (1, 1, 6)))
    flat = next(made)
    for y in made:
        assert torch.equal(y.flatten(0, -2), flat)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", TAKING)
def test_dtypes_of_adapters(name, each_backend):
    """Others than x's are refused, but cast by autocast; gradients come in the adapters' own."""
    x, lora, call = case(name, 3, 2.0, dtype=torch.bfloat16, low=torch.float32)
    with pytest.raises(TypeError, match=rf"{name}: lora.\w+.a must have x's dtype .* autocast"):
        call(x, lora)
    mixed = [case(name, 3, 2.0, dtype=torch.float32),
             case(name, 3, 2.0, dtype=torch.bfloat16, low=torch.float32)]  # fmt: skip
    for x, lora, call in mixed:
        with torch.autocast("cpu", torch.bfloat16):
            ours = results(x, lora, call)
        assert ours[0].dtype == torch.bfloat16
        assert {t.dtype for t in ours[2:]} == {torch.float32} and ours[1].dtype == x.dtype
        close(ours, exact(name, 3, 2.0), 3e-2)


@pytest.mark.interpreter
@pytest.mark.parametrize("how", ("checkpoint", "no_grad", "adapters alone", "half of the adapters"))
@pytest.mark.parametrize("name", TAKING)
def test_what_is_differentiated(name, how, each_backend):
    x, lora, call = case(name, 3, 2.0, dtype=torch.float32)
    expected = exact(name, 3, 2.0)
    if how == "checkpoint":
        again = lambda x, lora: checkpoint(call, x, lora, use_reentrant=False)  # noqa: E731
        close(results(x, lora, again), expected, 1e-5)
    elif how == "no_grad":
        with torch.no_grad():
            close([call(x, lora)], expected[:1], 1e-5)
    else:
        tensors = [t for p in lora if p for t in p[:2]]
        kept = list(range(len(tensors)))[:: 1 if how == "adapters alone" else 2]
        for i, t in enumerate(tensors):
            t.requires_grad_(i in kept)
        y = call(x.detach(), lora)
        dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        grads = torch.autograd.grad(y, [tensors[i] for i in kept], dy)
        close(grads, [expected[2 + i] for i in kept], 1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", TAKING)
def test_compiled_code_is_whole(name):
    x, lora, call = case(name, 3, 2.0, dtype=torch.float32)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    close(results(x, lora, compiled), exact(name, 3, 2.0), 1e-5)
