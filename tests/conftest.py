"""Without a GPU the kernels run in Triton's interpreter; it has to be chosen before Triton is
imported. One thread each, unless OMP_NUM_THREADS says otherwise: NumPy, which the interpreter
computes with, reads it once, when torch imports it."""

import contextlib
import gc
import importlib
import importlib.util
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

import addresses  # noqa: E402
import launch_names  # noqa: E402
import pytest  # noqa: E402

import fusedmlp  # noqa: E402
from fusedmlp.testing import poison  # noqa: E402
from fusedmlp.testing.interpreter import prepare_once  # noqa: E402

if DEVICE == "cpu":
    prepare_once()


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["reference", "triton"])
def each_backend(request):
    """Run the test on the reference and on the kernels."""
    with fusedmlp.backend(request.param):
        yield request.param


@pytest.fixture
def on_triton():
    """Run the test on the kernels, which may touch no memory but that of their tensors."""
    importlib.import_module("torch._dynamo")  # first imported inside, it would end the poison
    checked = addresses.checked() if DEVICE == "cpu" else contextlib.nullcontext()
    with fusedmlp.backend("triton"), poison(), checked:
        yield


@pytest.fixture
def launched():
    """The names of the kernels that the test launches, as it launches them."""
    with launch_names.launches() as names:
        yield names


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Tests last from milliseconds to minutes, so an idle worker takes from a busy one. Not an
    option in pyproject.toml, which pytest without xdist would refuse."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """What is imported and collected lives until the end: the garbage collector does not walk it
    while it comes, nor again whenever a test has left enough."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or bindings report all that is never freed as leaks


LISTS = ("long", "nightly")  # a mark of each has the tests of the file of that name


def listed() -> dict[str, str]:
    """A test or a file of tests -> the mark that it gets."""
    of = {mark: Path(__file__).with_name(f"{mark}.txt").read_text().splitlines() for mark in LISTS}
    return {line: mark for mark, lines in of.items() for line in lines if line and line[0] != "#"}


def pytest_collection_modifyitems(config, items):
    """A test of another machine says nothing here: it is left out, not passed or skipped. So are
    those of the LISTS, but where their file, their folder or their mark is asked for."""
    marks = listed()
    tests = Path(__file__).parent
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    named -= {tests, *tests.parents}  # all tests are no folder of them
    others = {"gpu" if DEVICE == "cpu" else "interpreter"}
    if not shutil.which("nvcc"):
        others.add("nvcc")
    if not importlib.util.find_spec("fusedmlp._C"):
        others.add("extension")
    if not importlib.util.find_spec("cutlass_library"):
        others.add("cutlass")

    def runs(item):
        test, _, _ = item.nodeid.partition("[")
        mark = marks.get(test) or marks.get(test.partition("::")[0])
        if mark:
            item.add_marker(mark)
        wanted = not mark or mark in config.option.markexpr
        wanted = wanted or not named.isdisjoint((item.path, *item.path.parents))
        return wanted and others.isdisjoint(mark.name for mark in item.iter_markers())

    here = {item: runs(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not here[item]])
    items[:] = [item for item in items if here[item]]
