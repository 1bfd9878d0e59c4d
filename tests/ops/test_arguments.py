"""What every op says of every tensor that it is given, and what it does with one bias of two."""

import inspect
import re

import pytest
import torch
from op_checks import check

from fusedmlp import _api
from fusedmlp.testing import CASES, evaluate

# The last of each op's cases that holds tensors alone: with biases, where it takes any.
LAST = {case.op: case for case in CASES.values() if not case.name.endswith("-bits")}
PAIRED = ("gated_linear-bias", "gated_mlp-bias", "gated_mlp-recompute-bias", "moe_mlp-bias",
          "binary_gated_linear-bias", "binary_gated_mlp-recompute-bias")  # fmt: skip


@pytest.mark.parametrize("without", ("b_gate", "b_up"))
@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("rows", (3, 40))
def test_one_bias_of_gate_and_up(name, without, rows, device, on_triton):
    """Few rows and many have kernels of their own; the other bias is one of the gradients."""
    inputs = CASES[name].inputs(rows, 24, 16, torch.float32, device)
    assert without in inputs
    check(CASES[name], {k: t for k, t in inputs.items() if k != without})


def arguments_of(case):
    """What the function is called with, and which of it are tensors."""
    inputs = case.inputs(4, 16, 24, torch.float32)
    arguments = {**case._arguments(inputs, _api), **case.options}
    return arguments, [k for k, t in arguments.items() if type(t) is torch.Tensor]


SPOILT = [(op, name) for op in LAST for name in arguments_of(LAST[op])[1]]
SPOILT.remove(("hyper_attention_step", "position"))  # the one index among them


@pytest.mark.parametrize("op, name", SPOILT)
def test_an_error_names_the_argument(op, name, each_backend):
    """A list, an integer, another device, a scalar: the error is about an argument by its own name,
    and names the one that is wrong."""
    arguments, tensors = arguments_of(LAST[op])
    t, fn = arguments[name], LAST[op].fn
    wrong = {"a list": [1.0], "integers": t.int(), "a scalar": t.flatten()[0]}
    if len(tensors) > 1:
        wrong["meta"] = t.to("meta")
    for other in wrong.values():
        with pytest.raises((TypeError, ValueError)) as caught:
            fn(**{**arguments, name: other})
        message = str(caught.value)
        called, _, rest = message.partition(": ")
        assert called == op, message
        assert re.match(r"\w+", rest)[0] in inspect.signature(fn).parameters, message
        # Where the first is elsewhere than the others, it is what another is not like.
        assert re.search(rf"\b{name}\b", rest), message


def sizes_of_another(t):
    """`t` with one more and with one fewer along each dimension, with a dimension more or fewer."""
    for d in range(t.dim()):
        yield f"{d}", torch.cat([t, t.narrow(d, 0, 1)], d)
        yield f"{d}", t.narrow(d, 0, t.shape[d] - 1)
    yield "rank", t.unsqueeze(0)
    if t.dim() > 1:
        yield "rank", t[0]


# What no other argument has a say in: tokens, leading dimensions, experts, masks, the width of v.
FREE = {"x": {"0", "rank"}, "g": {"0", "rank"}, "logits": {"0", "1", "rank"}, "masks": {"0"}}
WIDTH_OF_V = {("hyper_attention", "v"): {"2"}, ("hyper_attention_step", "v"): {"2"}}
# In the place of x (4, 16), (1, 4, 16) holds as many tokens as the routing has.
ROUTED = {("moe_mlp", "x"): {"rank"}, ("moe_linear", "x"): {"rank"}}


@pytest.mark.parametrize("op, name", SPOILT)
def test_another_size_is_refused(op, name, each_backend):
    """What one argument says of a size, another contradicts: an error about one of them."""
    arguments, _ = arguments_of(LAST[op])
    free = {**WIDTH_OF_V, **ROUTED}.get((op, name), FREE.get(name, set()))
    for what, other in sizes_of_another(arguments[name]):
        if what in free:
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            LAST[op].fn(**{**arguments, name: other})
        message = str(caught.value)
        called, _, rest = message.partition(": ")
        assert called == op, message
        assert re.match(r"\w+", rest)[0] in inspect.signature(LAST[op].fn).parameters, message


def wrong_dtypes(op, name):
    """float64 and float16, but where an argument may have a dtype of its own or is alone."""
    alone = len([n for o, n in SPOILT if o == op]) == 1
    return () if alone or name == "masks" else (torch.float64, torch.float16)


@pytest.mark.parametrize("autocast", (False, True), ids=("", "autocast"))
@pytest.mark.parametrize("op, name", [p for p in SPOILT if wrong_dtypes(*p)])
def test_another_dtype_is_refused(op, name, autocast, each_backend):
    """Under autocast too: it leaves float64 alone, and makes one of all others."""
    arguments, _ = arguments_of(LAST[op])
    for dtype in wrong_dtypes(op, name)[: 1 if autocast else None]:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(TypeError, match=rf"^{op}: .*\b{name}\b.*float(64|16)") as caught,
        ):
            LAST[op].fn(**{**arguments, name: arguments[name].to(dtype)})
        assert str(dtype) in str(caught.value)


@pytest.mark.parametrize("op", LAST)
def test_autocast_leaves_float64_alone(op):
    case = LAST[op]
    inputs = case.inputs(4, 16, 24, torch.float64)
    expected = case.run(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.run(inputs)
    assert out.dtype == torch.float64 and torch.equal(out, expected)


# Arguments that keep a dtype of their own beside x in bfloat16, and that dtype.
WIDER = [
    *((f"binary_{op}", f"s_{name}", dtype)
      for op, names in (("linear", ("weight",)), ("gated_linear", ("gate", "up")),
                        ("gated_mlp", ("gate", "up", "down")))
      for name in names for dtype in (torch.float32, torch.float16)),
    *((f"masked_gated_{op}", "masks", torch.float32) for op in ("linear", "mlp")),
    ("moe_mlp", "prob", torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("op, name, dtype", WIDER)
def test_a_wider_argument_has_a_gradient_as_wide(op, name, dtype, device, on_triton):
    """It is not rounded to x's dtype on its way."""
    case = LAST[op]
    inputs = case.inputs(20, 16, 24, torch.bfloat16, device)
    inputs[name] = inputs[name].to(dtype)
    dy = torch.randn(case.fake_output(20, 16, 24).shape, device=device).bfloat16()
    grad = evaluate(case.run, inputs, dy, (name,))[f"d{name}"]
    assert grad.dtype == dtype
    assert (grad != grad.bfloat16().to(dtype)).float().mean() > 0.5


OF_ROWS = [op for op, name in SPOILT if name == "x"]


@pytest.mark.parametrize("op", OF_ROWS)
def test_x_of_more_dimensions_is_as_many_rows(op, each_backend):
    arguments, _ = arguments_of(LAST[op])
    x = arguments["x"]
    flat, deep = (LAST[op].fn(**{**arguments, "x": t}) for t in (x, x.view(2, 2, -1)))
    assert deep.shape[:-1] == (2, 2)
    assert torch.equal(deep.flatten(0, 1), flat)


@pytest.mark.parametrize("op", OF_ROWS)
def test_the_last_dimension_of_x_is_the_one_that_is_named(op, each_backend):
    """Not one before it, which may be as wide as the weight by chance."""
    arguments, _ = arguments_of(LAST[op])
    D = arguments["x"].shape[-1]
    weight = next(name for name in ("w_gate", "w_in", "w") if name in arguments)
    H = arguments[weight].shape[-2]
    for size, blamed in (((2, D, 7), "x"), ((2, H, 7), "x"), ((D, 2, 7), "x"), ((2, D, H), weight)):
        with pytest.raises(ValueError, match=rf"^{op}: {blamed} must "):
            LAST[op].fn(**{**arguments, "x": torch.ones(size)})


@pytest.mark.parametrize("op, name", [p for p in SPOILT if p[1].startswith("w")])
def test_a_module_in_the_place_of_its_weight(op, name):
    arguments, _ = arguments_of(LAST[op])
    for given, words in (
        (torch.nn.Linear(16, 24), "Linear; give its weight"),
        (torch.nn.ReLU(), "ReLU"),
    ):
        with pytest.raises(TypeError) as caught:
            LAST[op].fn(**{**arguments, name: given})
        assert str(caught.value) == f"{op}: {name} must be a Tensor, got {words}"


# Routers compute in float32.
@pytest.mark.parametrize("op", [op for op in LAST if not op.endswith("_route")])
def test_autocast_makes_one_dtype_of_all(op):
    """Tensors in another narrow one are cast too; a gradient comes back in its own dtype."""
    arguments, tensors = arguments_of(LAST[op])
    tensors = [name for name in tensors if arguments[name].is_floating_point()]
    for dtype in (torch.float32, torch.float16):
        given = {k: arguments[k].to(dtype).requires_grad_() for k in tensors}
        with torch.autocast("cpu", torch.bfloat16):
            out = LAST[op].fn(**{**arguments, **given})
        assert out.dtype == torch.bfloat16
        first = given[tensors[0]]
        assert torch.autograd.grad(out.sum(), first)[0].dtype == dtype
