"""What every op says of every tensor that it is given, and what it does with one bias of two."""

import inspect
import re

import pytest
import torch
from op_checks import check

from fusedmlp import _api
from fusedmlp.testing import CASES

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
