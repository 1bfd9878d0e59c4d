"""Bad input: one clear error each, naming op, argument, what was expected and what was got."""

import re

import pytest
import torch
import torch.nn.functional as F
from op_checks import PLAIN
from torch import nn

import fusedmlp
from fusedmlp import _api
from fusedmlp.ops.tree_path import tree_path
from fusedmlp.packing import ORDERS
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.testing import CASES

D, H = 16, 24


def good(name):
    return CASES[name].inputs(4, D, H, torch.float32)


# case, argument to spoil, its bad value, error, what the message must say
BAD = [
    ("gated_act", "u", torch.ones(4, 3), ValueError, r"gated_act: u must have g's shape \(4, 24\), got \(4, 3\)"),
    ("gated_act-gate_up", "g", torch.ones(4, 5), ValueError, r"g must be \(\.\.\., 2H\) when packed, got \(4, 5\)"),
    ("gated_act", "g", torch.ones(()), ValueError, r"g must be \(\.\.\., H\), got a scalar"),
    ("gated_linear", "x", torch.ones(4, 7), ValueError, r"x must be \(\.\.\., 16\): D of w_gate; got \(4, 7\)"),
    ("gated_linear", "x", torch.ones(()), ValueError, r"x must be \(\.\.\., 16\).*got \(\)"),
    ("gated_linear", "w_gate", torch.ones(16), ValueError, r"w_gate must be a matrix \(H, D\).*got shape \(16,\)"),
    ("gated_linear", "w_up", torch.ones(9, D), ValueError, r"w_up must have shape \(24, 16\), got \(9, 16\)"),
    ("gated_linear-bias", "b_gate", torch.ones(3), ValueError, r"b_gate must have shape \(24,\), got \(3,\)"),
    ("gated_linear-bias", "b_up", torch.ones(3), ValueError, r"b_up must have shape \(24,\), got \(3,\)"),
    ("gated_linear-gate_up-bias", "w_gate", torch.ones(7, D), ValueError, r"w_gate must be \(2H, D\) when packed, got \(7, 16\)"),
    ("gated_act-interleaved", "g", torch.ones(4, 5), ValueError, r"g must be \(\.\.\., 2H\) when packed, got \(4, 5\)"),
    ("gated_linear-interleaved-bias", "w_gate", torch.ones(7, D), ValueError, r"w_gate must be \(2H, D\) when packed, got \(7, 16\)"),
    ("gated_mlp-interleaved-bias", "w_gate", torch.ones(7, D), ValueError, r"w_gate must be \(2H, D\) when packed, got \(7, 16\)"),
    ("gated_mlp-interleaved-bias", "b_up", torch.ones(H), ValueError, r"b_up must be None when packed"),
    ("gated_linear-gate_up-bias", "b_gate", torch.ones(H), ValueError, r"b_gate must have shape \(48,\), got \(24,\)"),
    ("gated_linear-gate_up-bias", "b_up", torch.ones(H), ValueError, r"b_up must be None when packed"),
    ("gated_mlp", "w_down", torch.ones(D, 3), ValueError, r"w_down must have shape \(16, 24\), got \(16, 3\)"),
    ("gated_mlp-bias", "b_down", torch.ones(3), ValueError, r"b_down must have shape \(16,\), got \(3,\)"),
    ("linear_act", "w", torch.ones(H, 3), ValueError, r"x must be \(\.\.\., 3\): D of w; got \(4, 16\)"),
    ("linear_act-bias", "b", torch.ones(2), ValueError, r"b must have shape \(24,\), got \(2,\)"),
    ("mlp", "w_out", torch.ones(D, H, 1), ValueError, r"w_out must be a matrix \(D_out, H\), got shape \(16, 24, 1\)"),
    ("mlp-bias", "b_in", torch.ones(2), ValueError, r"b_in must have shape \(24,\), got \(2,\)"),
    ("mlp-bias", "b_out", torch.ones(2), ValueError, r"b_out must have shape \(16,\), got \(2,\)"),
    ("mlp", "x", torch.ones(4, D, dtype=torch.int64), TypeError, r"x must have a floating dtype, got torch.int64"),
    ("mlp", "x", [1.0, 2.0], TypeError, r"x must be a Tensor, got list"),
    ("gated_mlp", "w_up", torch.ones(H, D).bfloat16(), TypeError, r"w_up must have x's dtype torch.float32, got torch.bfloat16"),
    ("gated_mlp", "w_down", "no", TypeError, r"w_down must be a Tensor, got str"),
    ("gated_linear", "w_gate", None, TypeError, "w_gate must be a Tensor, got NoneType"),
    ("gated_mlp", "w_down", None, TypeError, "w_down must be a Tensor, got NoneType"),
    ("linear_act", "w", None, TypeError, "w must be a Tensor, got NoneType"),
    ("mlp", "w_out", None, TypeError, "w_out must be a Tensor, got NoneType"),
    ("gated_mlp", "w_gate", torch.ones(H, D, device="meta"), ValueError, r"w_gate must be on x's device cpu, got meta"),
    ("gated_act", "u", torch.ones(4, H).double(), TypeError, r"u must have g's dtype torch.float32, got torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize("name, argument, value, error, message", BAD,
                         ids=[f"{b[0]}-{b[1]}-{i}" for i, b in enumerate(BAD)])  # fmt: skip
def test_one_clear_error(name, argument, value, error, message, each_backend):
    case = CASES[name]
    with pytest.raises(error, match=message) as caught:
        case.run({**good(name), argument: value})
    assert str(caught.value).startswith(f"{case.op}: ")


def weights():
    """(case, the name of a weight, by what makes it transposed) of every op."""
    for name, case in CASES.items():
        for argument, w in weights_of(name).items():
            if isinstance(w, fusedmlp.BinaryWeight):
                turned = fusedmlp.quantize_binary(torch.randn(w.shape[1], w.shape[0]))
                yield pytest.param(case, argument, turned, id=f"{name}-{argument}")
            elif type(w) is torch.Tensor:
                yield pytest.param(case, argument, w.mT, id=f"{name}-{argument}")


def weights_of(name):
    # Sizes that differ, in whole groups of a one-bit weight.
    arguments = CASES[name]._arguments(CASES[name].inputs(4, 128, 256, torch.float32), _api)
    return {k: w for k, w in arguments.items() if k.startswith("w") or k == "masks"}


WEIGHTS = list(weights())


def test_each_op_with_a_weight_has_one_transposed():
    ops = {param.values[0].op for param in WEIGHTS}
    assert {case.op for name, case in CASES.items() if weights_of(name)} == ops and len(ops) > 9


@pytest.mark.parametrize("case, argument, turned", WEIGHTS)
def test_a_transposed_weight_is_named(case, argument, turned, each_backend):
    """First of all, with the shape that it should have: what it meets is not blamed."""
    given = case._arguments(case.inputs(4, 128, 256, torch.float32), _api)
    right = tuple(given[argument].shape)
    with pytest.raises(ValueError) as raised:
        case.fn(**{**given, **case.options, argument: turned})
    message = str(raised.value)
    assert message.startswith(f"{case.op}: {argument} must "), message
    assert f" {right}" in message and f", got {tuple(turned.shape)}; " in message
    hint = f"{argument} is (out, in), as nn.Linear's weight: is it transposed? Transpose it back"
    assert message.endswith(hint)


def test_other_shapes_are_not_called_transposed():
    for argument, bad in (("w_gate", torch.ones(7, 3)), ("w_down", torch.ones(D, 3))):
        with pytest.raises(ValueError) as raised:
            CASES["gated_mlp"].run({**good("gated_mlp"), argument: bad})
        assert "transpose" not in str(raised.value)


@pytest.mark.parametrize(
    "given, name",
    [
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (nn.SiLU, "silu"),
        ("SiLU", "silu"),
        ("swish", "silu"),
        ("swiglu", "silu"),
        (F.gelu, "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (torch.relu, "relu"),
        (F.relu, "relu"),
        (nn.LeakyReLU(0.5), "leaky_relu(negative_slope=0.5)"),
    ],
)
def test_an_activation_that_is_no_string_is_named(given, name):
    x, w = torch.ones(2, D), torch.ones(H, D)
    with pytest.raises(ValueError, match=re.escape(f"got {given!r}: give its name, {name!r}")):
        fusedmlp.gated_linear(x, w, w, activation=given)
    fusedmlp.gated_linear(x, w, w, activation=name)


@pytest.mark.parametrize("given", ["prelu", None, lambda x: x, nn.PReLU(), nn.Softplus, nn.Linear])
def test_an_unsupported_activation_says_what_to_do(given):
    """What PyTorch must run is a module of FeedForward's; a class with a row is named."""
    x, w = torch.ones(2, D), torch.ones(H, D)
    remedy = r"\. Any other runs in PyTorch as a module: fusedmlp\.layers\.FeedForward\(dim, activ"
    with pytest.raises(ValueError, match="'softplus'" if given is nn.Softplus else remedy):
        fusedmlp.mlp(x, w, w.mT, activation=given)
    assert fusedmlp.FeedForward(D, activation=nn.PReLU)(x).shape == x.shape


@pytest.mark.parametrize("name", ("gated_act", "gated_linear", "gated_mlp", "linear_act", "mlp"))
def test_activation_names(name, each_backend):
    names = PLAIN if name in ("linear_act", "mlp") else ACTIVATIONS
    for wrong in ("swish", "swish(limit=7)", []):
        expected = f"{name}: activation must be one of {', '.join(names)}; got {wrong!r}"
        with pytest.raises(ValueError, match=re.escape(expected)):
            CASES[name].run(good(name), activation=wrong)


@pytest.mark.parametrize("name", ("gated_act", "gated_linear", "gated_mlp"))
def test_packed_and_apart_are_told_apart(name, each_backend):
    case = CASES[name]
    with pytest.raises(
        ValueError,
        match=f"{name}: packed must be None, 'gate_up', 'up_gate' or 'interleaved', got 'gu'",
    ):
        case.run(good(name), packed="gu")
    with pytest.raises(
        ValueError, match=f"{name}: packed must be .* got packed='gate_up' and .*=a tensor"
    ):
        case.run(good(name), packed="gate_up")
    second = "u" if name == "gated_act" else "w_up"
    with pytest.raises(ValueError, match=f"got packed=None and {second}=None"):
        case.run({**good(name), second: None})


@pytest.mark.parametrize("packed", ORDERS)
@pytest.mark.parametrize(
    ("op", "remedy"),
    (
        ("masked_gated_linear", "one weight w (H, D) is gate and up, and masks tell them apart"),
        ("masked_gated_mlp", "one weight w (H, D) is gate and up, and masks tell them apart"),
        ("binary_gated_linear", "quantize gate and up apart: w_gate and w_up are (H, D) each"),
        ("binary_gated_mlp", "quantize gate and up apart: w_gate and w_up are (H, D) each"),
    ),
)
def test_gate_and_up_that_share_no_tensor_refuse_an_order(op, remedy, packed, each_backend):
    case = next(case for case in CASES.values() if case.op == op)
    message = f"{op}: packed must be None, got {packed!r}; {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        case.run(case.inputs(4, 128, 128, torch.float32), packed=packed)


def test_triton_refuses_what_it_cannot_run(on_triton, device):
    with pytest.raises(TypeError, match=r"mlp: x must be bfloat16, float16 or float32 on backend 'triton', "
                                        r"got torch.float64; backend\('reference'\)"):  # fmt: skip
        CASES["mlp"].run(CASES["mlp"].inputs(2, 4, 4, torch.float64, device))


def first_of_each_op():
    """op -> its first case; a new op is here with its Case."""
    return {case.op: case for case in reversed(CASES.values())}


@pytest.mark.parametrize("op", first_of_each_op())
def test_integers_are_refused_by_name(op, each_backend):
    case = first_of_each_op()[op]
    inputs = case.inputs(4, D, H, torch.float32)
    first = next(iter(inputs))
    with pytest.raises(TypeError, match=f"^{op}: {first} must have a floating dtype, got"):
        case.run({**inputs, first: inputs[first].to(torch.int64)})


@pytest.mark.parametrize("op", first_of_each_op())
def test_triton_refuses_float64_of_every_op(op, on_triton, device):
    case = first_of_each_op()[op]
    inputs = case.inputs(4, D, H, torch.float64, device)
    first = next(iter(inputs))
    # A case of experts makes its routing first, from float64 as well.
    named = f"({op}: {first}|route_to: prob)"
    with pytest.raises(TypeError, match=f"^{named} must be bfloat16, float16 or float32 on"):
        case.run(inputs)


W = torch.ones(1, 2, 3, 4, dtype=torch.float64)
ZERO = torch.zeros(1, dtype=torch.int64)
WIDE = {  # op without a case -> (its argument, a call with float64 for it)
    "pack_masks": ("logits", lambda: fusedmlp.pack_masks(W[0])),
    "route_to": ("prob", lambda: fusedmlp.route_to(ZERO, W[0, 0, 0, :1], 2)),
}  # fmt: skip


@pytest.mark.parametrize("op", WIDE)
def test_triton_names_the_argument_that_it_refuses(op, on_triton):
    name, call = WIDE[op]
    with pytest.raises(TypeError, match=f"^{op}: {name} must be bfloat16, float16 or float32 on"):
        call()


@pytest.mark.parametrize(
    "op, message",
    [("gated_mlp", "it needs CUDA tensors, got cpu"), ("gated_act", "it has no CUDA kernel")],
)
def test_cuda_backend_says_what_is_missing(op, message):
    with (
        fusedmlp.backend("cuda"),
        pytest.raises(RuntimeError, match=f"{op}: backend 'cuda' was asked for, but {message}; or"),
    ):
        CASES[op].run(good(op))


@pytest.mark.parametrize("argument", ("x", "w_in"))
def test_autocast_casts_no_integers(argument, each_backend):
    integers = {argument: good("mlp")[argument].to(torch.int64)}
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=f"mlp: {argument} must have .* dtype.*, got torch.int64"),
    ):
        CASES["mlp"].run({**good("mlp"), **integers})


@pytest.mark.parametrize(
    "logits, depth, error, message",
    [(None, 2, TypeError, "logits must be a Tensor, got NoneType"),
     (torch.ones(2, 7).long(), 2, TypeError, "logits must have a floating dtype, got torch.int64"),
     (torch.ones(2, 7), -1, ValueError, "depth must be at least 0, got -1"),
     (torch.ones(2, 6), 3, ValueError, "N at least 7 for depth 3, got (2, 6)"),
     (torch.tensor(1.0), 0, ValueError, "N at least 0 for depth 0, got ()")],
)  # fmt: skip
def test_paths_through_trees(logits, depth, error, message, each_backend):
    with pytest.raises(error, match=f"tree_path: .*{re.escape(message)}$"):
        tree_path(logits, depth=depth)
    assert tree_path(torch.ones(2, 7), depth=3).tolist() == [[0, 2, 6, 14]] * 2
    assert tree_path(torch.ones(2, 3, 1), depth=0).shape == (2, 3, 1)
