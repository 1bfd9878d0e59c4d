"""A plugin of pytest for `gate fill-cache`: the tests that need a GPU run on CPU tensors, and what
they launch is compiled for a GPU that is not there. Kernels compute nothing, so whatever an
assertion finds wrong is passed over.

FUSEDMLP_COMPILED_TESTS = <name of the GPU's row>:<file to write>, which gets
[{hash of a kernel: whether it was cached}, [what stopped a test]].
"""

import json
import os
from pathlib import Path

import pytest
import torch
from standin import device as standin
from torch import nn

import fusedmlp.testing
from fusedmlp.bench.gate import fill
from fusedmlp.kernels.arch import ARCHES

NAME, _, FILE = os.environ[fill.TESTS].partition(":")
HITS, FAULTS = {}, []

standin.fake_cuda()
torch.cuda.device_count = lambda: 0  # no ranks are spawned
torch.Tensor.cuda = lambda t, *args, **options: t
nn.Module.cuda = lambda module, *args, **options: module
torch.compile = lambda function=None, **options: function or (lambda f: f)
fusedmlp.testing.assert_close_to = lambda *args, **options: None
torch.equal = lambda a, b: True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with standin.OnCpu(), fill.compiling(ARCHES[NAME]) as hits:
        try:
            return (yield)
        except AssertionError:  # what nobody computed is wrong
            return None
        except Exception as error:  # what would have been launched after it is not compiled
            name = f"{item.path.name}::{item.name}"
            FAULTS.append(f"{name}: {type(error).__name__}: {str(error)[:160]}")
            return None
        finally:
            for kernel, hit in hits.items():
                HITS.setdefault(kernel, hit)


def pytest_sessionfinish():
    Path(FILE).write_text(json.dumps([HITS, FAULTS]))
