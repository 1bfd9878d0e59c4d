"""Rows of ops and kernels: a row with a missing piece is refused by name, and an op that is new is
seen by everything that reads the rows, or told what it still lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedmlp import reference
from fusedmlp.backends import op as rows
from fusedmlp.backends.flops import no_products
from fusedmlp.backends.library import FOR_CPU
from fusedmlp.backends.op import KERNELS, OPS, Kernel, Op, RowError, add_kernel, kernel, register
from fusedmlp.bench.gate.jobs import jobs_of
from fusedmlp.bench.gate.kernels import brief_of
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.kernels.launch import Launch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ARCHES)
def test_the_gate_compiles_every_registered_kernel(name):
    jobs = list(jobs_of(ARCHES[name], ["gelu"]))
    assert {job.kernel for job in jobs} == KERNELS.keys()
    assert {job.kernel for job in brief_of(jobs)} == KERNELS.keys()


def test_every_kernel_belongs_to_an_op_or_says_whose_it_is():
    """linear_act_h and gated_act_fwd also serve where a block wants one gradient alone."""
    assert {k.name for op in OPS.values() for k in op.kernels} | {"linear_act_h"} == KERNELS.keys()


# ---- a row that lacks something

COMPILED = (Launch("made_up_fwd", size=(8, 8, 8)),)


def made_up(x):
    """x"""
    return x


def kernel_row(**changes):
    good = {"triton": made_up, "fake": made_up, "flops": no_products, "launches": COMPILED}
    return Kernel("made_up_fwd(Tensor x) -> Tensor", **{**good, **changes})


def op_row(**changes):
    forward = (kernel(OPS["gated_act"].forward[0].call),)
    good = {"function": made_up, "reference": made_up, "forward": forward, "flops": no_products}
    return Op("made_up", **{**good, **changes})


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    monkeypatch.setattr(rows, "OPS", dict(OPS))
    monkeypatch.setattr(rows, "KERNELS", dict(KERNELS))


KERNEL_FAULTS = [
    ({"triton": None}, "made_up_fwd: triton must be a function, got None; give it to library.def"),
    ({"fake": None}, "made_up_fwd: fake must be a function, got None; give it to library.define"),
    ({"flops": None}, "made_up_fwd: flops must be a function, got None; give it to library.define"),
    ({"result": "HM"}, "made_up_fwd: result must be None or one of MH, MD, HD, got 'HM'; name the"),
    (
        {"launches": ()},
        r"made_up_fwd: launches must be calls at real sizes, got \(\); write one in",
    ),
]
OP_FAULTS = [
    ({"function": None}, "made_up: function must be a function called made_up, got None; complete"),
    ({"reference": reference.mlp}, "made_up: reference must be a function called made_up, got <fu"),
    ({"reference": None}, "made_up: reference must be a function called made_up, got None; compl"),
    ({"forward": ()}, r"made_up: forward must be the kernels of a call, got \(\); complete regis"),
    ({"forward": ("gated_act_fwd",)}, r"made_up: forward must be a tuple of kernel\(...\), got "),
    ({"flops": None}, "made_up: flops must be a formula over the shapes of arguments, got None; "),
]


@pytest.mark.parametrize("changes, message", KERNEL_FAULTS)
def test_a_kernel_that_lacks_something(changes, message):
    with pytest.raises(RowError, match=message):
        add_kernel(kernel_row(**changes))
    add_kernel(kernel_row())


@pytest.mark.parametrize("changes, message", OP_FAULTS)
def test_an_op_that_lacks_something(changes, message):
    with pytest.raises(RowError, match=message):
        register(op_row(**changes))
    register(op_row())


def test_two_of_one_name():
    register(op_row())
    with pytest.raises(
        RowError, match="made_up: name must be new, got 'made_up, of .*'; rename one"
    ):
        register(op_row())
    add_kernel(kernel_row())
    with pytest.raises(RowError, match="made_up_fwd: name must be new, .*: rename one"):
        add_kernel(kernel_row())
    with pytest.raises(RowError, match="other_fwd: kernel must be registered, .* library.define"):
        kernel("other_fwd")


# ---- an op that is new

DOUBLE = '''
"""y = 2 x."""
import torch, triton, triton.language as tl
from .. import check
from ..backends import choice, library
from ..backends.op import Op, kernel, register
from ..kernels.launch import Launch
from ..packing import rows

def reference(x):
    return 2 * x
reference.__name__ = "double"

@triton.jit
def _double_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < N), mask=at < N)

def double_fwd(x):
    y = torch.empty_like(x)
    _double_kernel[triton.cdiv(x.numel(), 64),](x, y, x.numel(), BLOCK=64)
    return y

LAUNCH = Launch("double_fwd", lambda t, training: {"y": double_fwd(t["x"])},
                lambda M, D, H: {"x": (M, D)}, (64, 64, 64))
fwd = library.define("double_fwd(Tensor x) -> Tensor", double_fwd, torch.empty_like,
                     flops=lambda x: 2 * x[0] * x[1], launches=(LAUNCH,))

def double(x):
    """2 x, as if by a product with 2."""
    if choice.pick("double", x) == "reference":
        return reference(x)
    return fwd(rows(x)).view(x.shape)

register(Op("double", double, reference, (kernel(fwd),),
            lambda shapes: 2 * shapes["x"][0] * shapes["x"][1]))
'''

SEEN = """
import importlib.util, sys
import fusedmlp
spec = importlib.util.find_spec("fusedmlp.ops")
spec.submodule_search_locations.append(FOLDER)  # as if the file lay in ops/
module = importlib.util.module_from_spec(spec)
sys.modules["fusedmlp.ops"] = module
spec.loader.exec_module(module)

import torch
from torch.utils.flop_counter import FlopCounterMode
from fusedmlp.backends.cuda import loader
from fusedmlp.backends.library import FOR_CPU
from fusedmlp.backends.op import KERNELS, OPS
from fusedmlp.bench import options, predict, work
from fusedmlp.bench.gate.jobs import jobs_of
from fusedmlp.bench.machine import ROOFS
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.testing import Case

x = torch.arange(6.0).view(2, 3)
with fusedmlp.backend("triton"), FlopCounterMode(display=False) as counter:
    right = torch.equal(fusedmlp.double(x), 2 * x)
case = Case("double", fusedmlp.double, OPS["double"].reference, lambda M, D, H: {"x": (M, D)})
planned = predict.predict(work.Work(case, "silu", "float32", 2, 3, 4), "forward")
sys.path.insert(0, HOUSE)
from test_anatomy import missing
seen = {
    "the op": right,
    "public names": "double" in fusedmlp.__all__ and "double" in dir(fusedmlp),
    "explain()": "double" in fusedmlp.explain().partition("ops: ")[2].split("\\n")[0].split(", "),
    "the CUDA backend": loader.kernels_of("double") == () and not OPS["double"].cuda,
    "FlopCounterMode": counter.get_total_flops() == 12,
    "gate jobs": {job.variant for job in jobs_of(ARCHES["sm_80"], []) if job.kernel == "double_fwd"}
    == {"train"},
    "predict": {record["flops"] for record in planned} == {12} and len(planned) == len(ROOFS),
    "report lists and --op": work.ops()[-1] == "double",
    "the tests' walk": "double_fwd" in KERNELS,
}
print([name for name, right in seen.items() if not right], missing("double"))
"""


@pytest.mark.interpreter
def test_a_new_file_in_ops_is_seen_by_everything(tmp_path):
    (tmp_path / "double.py").write_text(DOUBLE)
    code = f"FOLDER, HOUSE = {str(tmp_path)!r}, {str(ROOT / 'tests/house')!r}\n{SEEN}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("FUSEDMLP_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    blind, places = done.stdout.strip().split("] ")
    assert blind == "[", "who did not see it"
    for place in ("reference/__init__.py: double", "typed_ops.py: double", "a Case of double"):
        assert place in places


def test_the_tables_hold_what_torch_has():
    registered = set(torch._C._dispatch_get_all_op_names())
    ours = {name.partition("::")[2] for name in registered if name.startswith("fusedmlp::")}
    in_the_mode = {f"{name}_invariant" for name in KERNELS}  # of batch_invariant()
    assert ours == KERNELS.keys() | in_the_mode | FOR_CPU
    assert not KERNELS.keys() & FOR_CPU


@pytest.mark.parametrize("name", KERNELS)
def test_a_product_sums_over_the_size_that_its_result_has_not(name):
    row = KERNELS[name]
    assert (row.depth is None) == (row.result is None)
    assert row.result is None or sorted(row.result + row.depth) == ["D", "H", "M"]
