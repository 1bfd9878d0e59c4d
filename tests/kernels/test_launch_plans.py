"""Launch plans: by them launchers launch what they launch without."""

import ast
import sys
from pathlib import Path

import host_count
import plan_driver
import pytest
import torch
from compiled import in_compiler

import fusedmlp
from fusedmlp.backends.library import BY_PLANS
from fusedmlp.backends.op import KERNELS
from fusedmlp.kernels import plans
from fusedmlp.testing import CASES, evaluate

ROOT = Path(fusedmlp.__file__).parent
# The functions that look at an address, and what of it a key holds.
LOOK = {
    "tiles.py": {"_aligned": "modulo 16"},
    "stacked.py": {"stacked_of": "that of a weight"},
    "masked/masks.py": {"words_of": "modulo 4"},
    "../packing.py": {"interleaved": "whether two are less than 16 bytes apart"},
}
FEW = ("gated_linear", "linear_act", "moe_mlp", "gated_act")


@pytest.mark.parametrize("seed", range(2))
def test_launches_are_the_same_by_plans(seed):
    """Every op and its gradients, in drawn shapes, strides, offsets and dtypes: the same compiled
    kernels with the same arguments, and memory for results and between launches that lies alike."""
    differing, used, unused = in_compiler(plan_driver.compared, tuple(CASES), 12, seed)
    assert not differing
    # Neither is launched with every gradient wanted.
    assert set(unused) == {"linear_act_h", "tree_path_fwd"}
    assert used
    assert in_compiler(plan_driver.alone) == []


@pytest.mark.parametrize(
    ("template", "old", "new"),
    [
        ("_WEIGHT", "a{i}.data_ptr()", "0"),
        ("_OTHER", "p % 16", "0"),
        ("_OTHER", "a{i}.stride()", "0"),
        ("_OTHER", "a{i}.dtype", "None"),
    ],
)
def test_what_a_key_leaves_out_is_found(template, old, new):
    assert in_compiler(plan_driver.with_key, template, old, new, FEW, 40)


def test_tensors_side_by_side():
    assert in_compiler(plan_driver.turns) == []
    assert in_compiler(plan_driver.one_tensor_twice) == []


def test_what_has_no_plan():
    """An element, another tensor, and a place in a storage are in no key; and a record needs more
    memory than a call."""
    found = in_compiler(plan_driver.planned_or_not)
    assert found == {
        "_reads": [False],
        "_uses_another": [False],
        "_changes_another": [False],
        "_runs_out_of_memory": [False],
        "_asks_for_its_place": [False],
        "_well": [True],
    }
    assert in_compiler(plan_driver.of_another_triton)


def test_hooks_see_every_launch():
    assert in_compiler(plan_driver.watched) == (5, 2, 1)


def test_other_machines_see_every_launch():
    assert in_compiler(plan_driver.of_the_machine_for_ptx) == [5, 5]


def test_settings_are_in_the_key():
    """Three drivers, of which the second debugs and has no plans; two ways to multiply float32."""
    assert in_compiler(plan_driver.under_settings) == ([1, 1, 2], 2, 2)


def test_memory_on_another_boundary():
    """The launcher runs as it is written."""
    off, passed_whole = in_compiler(plan_driver.on_other_boundaries)
    assert off == 0
    assert passed_whole


def test_threads_and_forgetting():
    assert in_compiler(plan_driver.in_threads, 4, 200) == (800, True, [], 3)


def test_a_plan_keeps_nothing_alive():
    assert in_compiler(plan_driver.kept_alive) == [False, False]


def test_a_plan_gives_memory_back_as_soon_as_its_launcher():
    assert in_compiler(plan_driver.given_back) == ["a0", "t2"]


def test_an_environment_variable_turns_plans_off(monkeypatch):
    monkeypatch.setattr(plans, "INTERPRETED", False)
    assert plans.plans_are_off() is None
    monkeypatch.setenv("FUSEDMLP_PLANS", "0")
    assert plans.plans_are_off() == "FUSEDMLP_PLANS is 0"


def test_explain_knows_the_tile_of_a_plan():
    assert in_compiler(plan_driver.tile_after_a_plan)


@pytest.mark.interpreter
def test_the_interpreter_has_no_plans():
    assert {k: BY_PLANS[k] is row.triton for k, row in KERNELS.items()} == dict.fromkeys(
        KERNELS, True
    )


def _launchers():
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        if path.name != "plans.py":
            yield path.relative_to(ROOT / "kernels").as_posix(), ast.parse(path.read_text())


def test_every_launch_is_noted():
    """What is launched otherwise would be missing from a plan."""
    count = 0
    for name, tree in _launchers():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = node.func.value
                assert isinstance(kernel, ast.Call), f"{name}:{node.lineno}"
                assert kernel.func.id == "noted", f"{name}:{node.lineno}"
                count += 1
    assert count >= 45


def test_who_looks_at_addresses():
    """A launcher that looks at another address needs it in the key."""
    found = {}
    files = [*_launchers(), ("../packing.py", ast.parse((ROOT / "packing.py").read_text()))]
    for name, tree in files:
        for function in tree.body:
            if isinstance(function, ast.FunctionDef) and "data_ptr" in ast.unparse(function):
                found.setdefault(name, set()).add(function.name)
    assert found == {name: set(functions) for name, functions in LOOK.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_by_plans(name):
    """On a GPU: bit for bit, in a CUDA graph too, and after weights moved."""
    case = CASES[name]
    inputs = case.inputs(40, 64, 48, torch.bfloat16, "cuda")
    with fusedmlp.backend("triton"):
        with plans.unplanned():
            dy = None if case.forward_only else torch.ones_like(case.run(inputs))
            expected = evaluate(case.run, inputs, dy)
        for _ in range(plans.RECORDED + 2):
            found = evaluate(case.run, inputs, dy)
        assert all(torch.equal(found[k], expected[k]) for k in expected)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            for _ in range(plans.RECORDED + 1):
                case.run(inputs)
            with torch.cuda.graph(graph):
                captured = case.run(inputs)
        graph.replay()
        assert torch.equal(captured, expected["out"])
        elsewhere = {k: t.clone() for k, t in inputs.items()}
        found = evaluate(case.run, elsewhere, dy)
        assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.gpu
def test_each_device_has_its_own():
    devices = range(torch.cuda.device_count())
    results = []
    with fusedmlp.backend("triton"):
        for _ in range(plans.RECORDED + 2):
            for device in devices:
                g, u = torch.ones(2, 8, 64, dtype=torch.bfloat16, device=f"cuda:{device}")
                results.append(fusedmlp.gated_act(g, u).sum().item())
    assert len(set(results)) == 1


# Bytecodes of one call by CPython 3.11: by plans, without.
BYTECODES = {
    "gated_act": (712, 1015),
    "gated_linear": (949, 2697),
    "linear_act": (899, 2300),
    "gated_mlp": (1061, 2809),
    "mlp": (936, 2378),
    "top1_route": (723, 2237),
    "moe_mlp": (2162, 5306),
    "hyper_attention": (2300, 5895),
    "hyper_attention_step": (2381, 5486),
}


def test_what_a_call_costs_the_host():
    """A call by plans runs no more bytecodes than it did; other Pythons' are counted otherwise."""
    slack = 1.02 if sys.version_info[:2] == (3, 11) else 1.3
    found = in_compiler(host_count.counts)
    print(found)
    assert found.keys() == BYTECODES.keys()
    for op, (by_plans, without) in found.items():
        assert by_plans <= slack * BYTECODES[op][0], op
        assert by_plans < 0.75 * without, op
