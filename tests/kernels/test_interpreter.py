"""The interpreter prepares its language once a launch, and that changes no bit; what a release of
it lacks is mended."""

from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fusedmlp.kernels.interpreter import mend
from fusedmlp.testing import CASES, evaluate
from fusedmlp.testing.interpreter import prepare_once

pytestmark = pytest.mark.interpreter


def results():
    case = CASES["gated_mlp-bias"]
    inputs = case.inputs(19, 24, 40, torch.bfloat16)
    return evaluate(case.run, inputs, torch.ones(19, 24, dtype=torch.bfloat16))


def test_the_same_bits_as_preparing_at_every_call(on_triton, monkeypatch):
    once = results()
    prepared = []
    every_time = interpreter._patch_lang.__wrapped__
    monkeypatch.setattr(
        interpreter, "_patch_lang", lambda fn: prepared.append(fn) or every_time(fn)
    )
    for name, t in results().items():
        assert torch.equal(t, once[name]), name
    assert len(prepared) > 100  # it was indeed prepared at every call of a device function


def test_the_language_is_given_back_after_a_launch(on_triton):
    before = tl.dot, tl.load, tl.range, tl.dtype.to_ir
    results()
    assert before == (tl.dot, tl.load, tl.range, tl.dtype.to_ir)
    prepare_once()  # a second call does nothing
    assert not hasattr(interpreter._patch_lang.__wrapped__, "__wrapped__")


@pytest.mark.parametrize("version, mended", [("3.6.0", True), ("3.6.1", True), ("3.7.0", False)])
def test_a_loop_bound_is_an_int(version, mended, monkeypatch):
    """Triton 3.6 makes no int of an array of one element. `make floors` runs loops on it."""
    kept = {}
    scope = SimpleNamespace(set_attr=lambda obj, name, value: kept.update({name: value}))
    monkeypatch.setattr(triton, "__version__", version)

    def own(tensor, scope):
        for name in ("__add__", "__index__"):
            scope.set_attr(tensor, name, "own")

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", own)
    mend()
    interpreter._patch_lang_tensor(tl.tensor, scope)
    assert kept["__add__"] == "own"
    if not mended:
        assert kept["__index__"] == "own"
        return
    bound = kept["__index__"](SimpleNamespace(handle=SimpleNamespace(data=np.array([7]))))
    assert bound == 7 and type(bound) is int


def test_a_launch_prepares_each_language_once(monkeypatch):
    """Those of its function and of what that calls, whatever their names; so does the next."""
    prepared, restored = [], []

    def prepare(fn):
        prepared.append(fn)
        return SimpleNamespace(restore=lambda: restored.append(fn))

    monkeypatch.setattr(interpreter, "_patch_lang", prepare)
    prepare_once()
    once = interpreter._patch_lang
    prepare_once()
    assert interpreter._patch_lang is once
    makes = lambda **names: FunctionType((lambda: None).__code__, names)  # noqa: E731
    kernel, core = makes(tl=tl, number=1), makes(core=tl.core)
    for launch in (1, 2):
        prepared.clear()
        scopes = [once(fn) for fn in (kernel, makes(language=tl), core, makes(a=tl, b=tl.core))]
        scopes.append(once(makes(torch=torch)))
        assert prepared == [kernel, core]
        for scope in reversed(scopes):
            scope.restore()
        assert restored == [core, kernel] * launch
