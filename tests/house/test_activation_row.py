"""One row and one device function make an activation: everything else is derived from them."""

import argparse
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it
from layer_checks import Stranger, assert_matches, draw, randomise_, stranger
from op_checks import check
from patch_blocks import GatedMLP, Model
from torch import nn

import fusedmlp
from fusedmlp import layers
from fusedmlp.bench import options
from fusedmlp.kernels.activations import DEVICE
from fusedmlp.layers.glu import GLUBase
from fusedmlp.patching.gate import Gate, gate_of
from fusedmlp.reference import activations
from fusedmlp.reference.activations import ACTIVATIONS, MODULES, Activation
from fusedmlp.testing import CASES

ROOT = Path(__file__).parents[2]


@triton.jit
def _stranger(x):
    r = 1 / (1 + x * x)
    return x * r, (1 - x * x) * r * r


@triton.jit
def _clamped(x, limit, shift):
    z = tl.where(x > limit, limit, x)
    return z * z, tl.where(x <= limit, 2 * z, 0.0)


@triton.jit
def _clamped_up(u, limit, shift):
    return u + shift, tl.full(u.shape, 1.0, tl.float32)


@pytest.fixture
def gate(monkeypatch):
    """A clamped gate with a factor of its own for u and two parameters: a row, two functions."""
    row = Activation(
        "clamped", lambda g, limit, shift: g.clamp(max=limit).square(),
        up=lambda u, limit, shift: u + shift,
        parameters={"limit": 3.0, "shift": 0.5}, kinks=("limit",),
    )  # fmt: skip
    monkeypatch.setitem(ACTIVATIONS, row.name, row)
    monkeypatch.setitem(DEVICE, "clamped", _clamped)
    monkeypatch.setitem(DEVICE, "clamped_up", _clamped_up)
    return row


@pytest.fixture
def row(monkeypatch):
    """The suite's activation without a kernel gets one: its row and its device function."""
    row = Activation("stranger", stranger, modules=(Stranger,))
    monkeypatch.setitem(ACTIVATIONS, row.name, row)
    monkeypatch.setitem(MODULES, Stranger, (row.name,))
    monkeypatch.setitem(DEVICE, row.name, _stranger)
    return row


def first_case_of_each_op():
    cases = {}
    for case in CASES.values():
        if "activation" in inspect.signature(case.fn).parameters:
            cases.setdefault(case.op, case)
    return cases


@pytest.mark.parametrize("op", first_case_of_each_op())
def test_functions_take_a_new_row(op, row, each_backend, device):
    case = first_case_of_each_op()[op]
    inputs = case.inputs(5, 128, 24, torch.float32, device, activation=row.name)
    check(case, inputs, activation=row.name)


@pytest.mark.parametrize("op", [o for o, c in first_case_of_each_op().items() if c.gated])
def test_functions_take_a_new_gate_without_a_new_kernel(op, gate, each_backend, device):
    case = first_case_of_each_op()[op]
    for name in ("clamped", "clamped(limit=0.5, shift=-2)"):
        inputs = case.inputs(5, 128, 24, torch.float32, device, activation=name)
        check(case, inputs, activation=name)


def test_a_new_gate_is_refused_where_it_has_no_sense(gate):
    t = torch.ones(2, 2)
    with pytest.raises(ValueError, match="mlp: .* no up projection; got 'clamped', a gate"):
        fusedmlp.mlp(t, t, t, activation="clamped")
    with pytest.raises(
        ValueError, match="gated_act: activation must be 'clamped' with a limit of 0"
    ):
        fusedmlp.gated_act(t, t, activation="clamped(limit=-1)")
    with pytest.raises(
        ValueError, match="as 'clamped\\(limit=3.0, shift=0.5\\)'; got 'clamped\\(a=1\\)'"
    ):
        fusedmlp.gated_act(t, t, activation="clamped(a=1)")


def test_errors_list_a_new_row(row):
    with pytest.raises(ValueError, match="mlp: activation must be one of .*, stranger; got 'new'"):
        fusedmlp.mlp(*(torch.ones(2, 2) for _ in range(3)), activation="new")


LAYERS = {
    "FeedForward": lambda: layers.FeedForward(8, activation=Stranger),
    "MLP": lambda: layers.MLP(8, act_fn=Stranger, use_norm=False),
    "GatingMechanism": lambda: layers.GatingMechanism(
        8, bottleneck_dim=4, act_fn=Stranger, use_norm=False
    ),
    "GLUBase": lambda: GLUBase(8, 8, Stranger()),
    "MaskedGLU": lambda: layers.MaskedGLU(8, 8, Stranger(), mask_mode="element"),
    "SwitchFFN": lambda: layers.SwitchFFN(8, 2, ff_kwargs={"activation": Stranger}),
    "BinaryGatedMLP": lambda: layers.BinaryGatedMLP(128, 128, "stranger"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_explain_take_a_new_row(name, row):
    explained = fusedmlp.explain(LAYERS[name]().eval())
    assert re.search(r"fused as 'stranger'|Linear \+ Stranger|one gated_mlp, 'stranger'", explained)


def test_a_layer_runs_a_new_row(row, each_backend, device):
    layer = randomise_(GLUBase(12, 6, Stranger())).to(device)

    def formula(p, x):
        value, gate = (x @ p["proj.weight"].T + p["proj.bias"]).chunk(2, -1)
        return value * stranger(gate)

    assert_matches(layer, formula, draw(5, 12, device=device))


def test_patch_finds_a_new_row_by_value(row):
    class Lookalike(nn.Module):
        def forward(self, x):
            return x * (1 + x * x).reciprocal()

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.act_fn = Lookalike()

        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1)
            return self.act_fn(gate) * up

    (entry,) = fusedmlp.patch(Model(GatedMLP(Lookalike()))).patched
    assert entry.detail == "activation 'stranger'"
    assert gate_of(Experts(), "_apply_gate") == Gate("stranger", "gate_up")


def test_the_bench_takes_a_new_row(row):
    parser = argparse.ArgumentParser()
    options.add_selection(parser)
    chosen = options.chosen_activations(parser.parse_args(["--activation", "stranger"]))
    assert chosen == ("stranger",)
    assert "stranger" in options.chosen_activations(parser.parse_args(["--activation", "all"]))


def load_again(monkeypatch, rows):
    """kernels/activations.py as a first import of it would run, over a table of `rows`."""
    monkeypatch.setattr(activations, "ACTIVATIONS", rows)
    spec = importlib.util.find_spec("fusedmlp.kernels.activations")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_row_without_a_device_function(monkeypatch):
    load_again(monkeypatch, ACTIVATIONS)
    message = (
        "kernels/activations.py: activation 'stranger' of fusedmlp/reference/activations.py must "
        "have a device function, got none: write `@triton.jit def stranger(x)` in kernels/"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        load_again(monkeypatch, ACTIVATIONS | {"stranger": Activation("stranger", stranger)})


def test_a_gate_without_a_device_function_of_u(monkeypatch):
    row = Activation("silu", stranger, up=stranger, parameters={"limit": 1.0})
    message = (
        "kernels/activations.py: activation 'silu_up' of fusedmlp/reference/activations.py must "
        "have a device function, got none: write `@triton.jit def silu_up(u, limit)` in kernels/"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        load_again(monkeypatch, ACTIVATIONS | {"silu": row})


def test_a_device_function_without_a_row(monkeypatch):
    message = (
        "kernels/activations.py: device function 'silu' must have a row, got none: write "
        "`Activation('silu', ...)` in fusedmlp/reference/activations.py"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        load_again(monkeypatch, {name: row for name, row in ACTIVATIONS.items() if name != "silu"})


def test_every_row_says_its_own_name():
    assert all(name == row.name for name, row in ACTIVATIONS.items())
    rows = [(kind, name) for name, row in ACTIVATIONS.items() for kind in row.modules]
    assert all(name in MODULES[kind] for kind, name in rows)
    assert all(name in ACTIVATIONS for names in MODULES.values() for name in names)


def test_the_page_of_activations_lists_the_table():
    page = (ROOT / "docs" / "activations.md").read_text()
    listed = re.search(r"^(`silu`.*?)\.\n\n", page, re.M | re.S)
    names = list(ACTIVATIONS)
    assert re.findall(r"`(\w+)`", listed[1]) == names, f"docs/activations.md must list {names}"


def test_the_page_of_gates_lists_every_row_with_parameters():
    """With names and defaults as a call writes them."""
    listed = re.findall(r"^\| `(\w+)\((.*?)\)` \|", (ROOT / "docs" / "gates.md").read_text(), re.M)
    rows = {n: r for n, r in ACTIVATIONS.items() if r.parameters or r.up is not None}
    spelled = {n: ", ".join(f"{k}={v}" for k, v in r.parameters.items()) for n, r in rows.items()}
    assert dict(listed) == spelled
    assert len(listed) == len(rows)


# Calls into every file of fusedmlp.reference. What they import is test_imports.py's.
ALONE = """
import sys

sys.modules["triton"] = None  # importing it raises

import torch

from fusedmlp import activations, reference as r
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.reference.binary import binary_scales, pack_signs

x, w, q = torch.randn(3, 8), torch.randn(8, 8), torch.randn(1, 2, 3, 4)
masks, stack = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
bits = pack_signs(w), binary_scales(w)
routing = r.top1_route(torch.randn(3, 2))
calls = {
    "Routing": lambda: routing.prob,
    "binary_gated_linear": lambda: r.binary_gated_linear(x, *bits, *bits),
    "binary_gated_mlp": lambda: r.binary_gated_mlp(x, *bits, *bits, *bits),
    "binary_linear": lambda: r.binary_linear(x, *bits),
    "dequantize_binary": lambda: r.dequantize_binary(*bits, 8),
    "gated_act": lambda: r.gated_act(x, x),
    "gated_linear": lambda: r.gated_linear(x, w, w),
    "gated_mlp": lambda: r.gated_mlp(x, w, w, w),
    "hyper_attention": lambda: r.hyper_attention(q, q, q[:, :1]),
    "hyper_attention_step": lambda: r.hyper_attention_step(
        q[:, :, 0], q, q[:, :1], torch.zeros(1, dtype=torch.int64)
    ),
    "linear_act": lambda: r.linear_act(x, w),
    "load_balancing_loss": lambda: r.load_balancing_loss(routing),
    "masked_gated_linear": lambda: r.masked_gated_linear(x, w, masks),
    "masked_gated_mlp": lambda: r.masked_gated_mlp(x, w, masks, w),
    "mlp": lambda: r.mlp(x, w, w),
    "moe_linear": lambda: r.moe_linear(x, routing, stack),
    "moe_mlp": lambda: r.moe_mlp(x, routing, stack, stack, stack),
    "pack_masks": lambda: r.pack_masks(masks),
    "route_to": lambda: r.route_to(torch.zeros(3, dtype=torch.int64), torch.ones(3), 2).prob,
    "router_z_loss": lambda: r.router_z_loss(routing),
    "top1_route": lambda: r.top1_route(torch.randn(3, 2)).prob,
    "topk_route": lambda: r.topk_route(torch.randn(3, 2), 2, groups=1, topk_group=1).prob,
    "tree_path": lambda: r.tree_path(torch.randn(3, 3), 2),
    "unpack_masks": lambda: r.unpack_masks(r.pack_masks(masks), 8),
    "unpack_signs": lambda: r.unpack_signs(bits[0], 8),
}
assert calls.keys() <= set(r.__all__), calls.keys() - set(r.__all__)
for name, call in calls.items():
    assert call().isfinite().all(), name
for name in ACTIVATIONS:
    assert r.gated_act(x, x, name).shape == x.shape, name
for name in ("BSiLU", "Gelu2", "NeLU", "ReluNelu", "ReluSquared", "SugarReLU"):
    assert getattr(activations, name)()(x).shape == x.shape, name
"""


def test_the_reference_runs_without_triton():
    run = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
