"""Tokens that no expert takes are exactly 0, bias or not, whatever they hold: eager, compiled and
under torch.func, where each expert sees every row."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vjp

import fusedmlp
from fusedmlp import layers
from fusedmlp.testing import CASES, evaluate, floating

EXPERT = torch.tensor([0, 3, 2, -1, 0, 0, 1, 7, 0, 2])  # of 3: indices 3, -1 and 7 are no expert
KEPT = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 0, 1], dtype=torch.bool)  # by a capacity of 2
NAMES = ("moe_mlp-bias", "moe_mlp-plain-recompute-bias", "moe_linear")


def compiled(run):
    torch._dynamo.reset()
    return torch.compile(run, backend="aot_eager", fullgraph=True)


def transformed(run):
    """Its results and gradients by torch.func.vjp, through autograd's own interface."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            with torch.enable_grad():
                out, ctx.pullback = vjp(run, *(t.detach() for t in tensors))
            return out

        @staticmethod
        def backward(ctx, dy):
            return ctx.pullback(dy)

    return Through.apply


WAYS = {"eager": lambda run: run, "compiled": compiled, "vjp": transformed}
ROWS = [
    *((name, way, "reference") for name in NAMES for way in ("eager", "vjp")),
    ("moe_linear", "compiled", "reference"),
    *((name, "eager", "triton") for name in NAMES),
]


@pytest.mark.parametrize("name, way, where", ROWS)
def test_a_dropped_token_is_zero_in_every_way(name, way, where, device):
    with fusedmlp.backend(where):
        dropped(name, WAYS[way], device)


def dropped(name, way, device):
    case = CASES[name]
    inputs = {**case.inputs(len(EXPERT), 16, 8, torch.float32, device), "expert": EXPERT.to(device)}
    for key in {"x", "prob"} & inputs.keys():
        inputs[key][~KEPT] = float("nan")
    names = list(floating(inputs))

    def run(*tensors):
        t = {**inputs, **dict(zip(names, tensors, strict=True))}
        expert, prob = t.pop("expert"), t.pop("prob", torch.ones(len(EXPERT), device=device))
        routing = fusedmlp.route_to(expert, prob, 3, capacity=2)
        if name != "moe_linear":
            t.setdefault("w_up", None)
        return case.fn(routing=routing, **t, **case.options)

    dy = torch.randn(len(EXPERT), 8 if name == "moe_linear" else 16, device=device)
    found = evaluate(lambda t: way(run)(*(t[k] for k in names)), inputs, dy)
    assert not found["out"][~KEPT].any() and not found["dx"][~KEPT].any()
    # The kept ones alone, each by its own expert.
    rows = ("x", "prob", "expert")
    kept = {k: t[KEPT] if k in rows else t for k, t in inputs.items()}
    alone = evaluate(case.run, kept, dy[KEPT])
    for key, t in alone.items():
        ours = found[key][KEPT] if key in ("out", "dx", "dprob") else found[key]
        torch.testing.assert_close(ours, t, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_drops_the_same_tokens():
    """Experts that are not one call: each sees every row."""
    torch.manual_seed(0)
    layer = layers.SwitchFFN(16, 3, 0.4, ff_kwargs={"mult": 1, "pre_norm": True}, dropped="zero")
    with torch.no_grad():  # biases begin at 0, and would not show
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    parameters, x = dict(layer.named_parameters()), torch.randn(12, 16)

    def run(t):
        return functional_call(layer, {k: t[k] for k in parameters}, (t["x"],))[0]

    inputs = {**{k: nn.Parameter(p.detach().clone()) for k, p in parameters.items()}, "x": x}
    dy = torch.randn(12, 16)
    for key, t in evaluate(compiled(run), inputs, dy).items():
        torch.testing.assert_close(t, evaluate(run, inputs, dy)[key])
