"""What csrc/tensor_map.cpp asks the driver for, and what it mends of the answer."""

import ctypes
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from simt_build import build

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests/support/tensor_map_host.cpp"
ONES, MENDED = (1 << 64) - 1, ((1 << 64) - 1) & ~(1 << 21)  # the second word of a map


def library(driver, fails=False, lacks=False):
    """The code as a process finds it whose driver has such a version, which it asks for once."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:  # loaded by another name: a new one
        shutil.copy(build(HOST), file.name)
        found = ctypes.CDLL(file.name)
    found.set_driver(driver, ctypes.c_bool(fails), ctypes.c_bool(lacks))
    return found


def asked(found, size, stride, box, swizzle, blackwell):
    """What came back, what the driver was asked for, and the words that begin the map."""
    noted, words = (ctypes.c_uint64 * 22)(), (ctypes.c_uint64 * 2)()
    error = found.make_map(
        ctypes.c_void_p(4096), (ctypes.c_uint64 * 3)(*size), (ctypes.c_uint64 * 2)(*stride),
        (ctypes.c_uint32 * 3)(*box), ctypes.c_bool(swizzle), ctypes.c_bool(blackwell), noted, words,
    )  # fmt: skip
    return error, list(noted), list(words)


def make(found, size, stride, blackwell=True):
    """The second word of the map."""
    error, _, words = asked(found, size, stride, (64, 64, 1), True, blackwell)
    assert error == 0 and words[0] == ONES
    return words[1]


@pytest.mark.parametrize("swizzle", (True, False))
def test_what_is_asked_for(swizzle):
    size, stride, box = (512, 96, 2), (520, 520 * 96), (64, 32, 5)
    error, noted, words = asked(library(13000), size, stride, box, swizzle, True)
    assert error == 0 and words == [ONES, ONES]
    assert noted[:6] == [3, *size, 0, 0]
    assert noted[6:10] == [1040, 1040 * 96, 0, 0]  # in bytes
    assert noted[10:20] == [*box, 0, 0, 1, 1, 1, 0, 0]  # dense
    assert noted[20:] == [swizzle, 4096]


@pytest.mark.parametrize("driver", ({"fails": True}, {"lacks": True}), ids=str)
def test_a_driver_without_the_function(driver):
    """Known by -1, and nothing is left behind that the next caller would take for its own error."""
    found = library(13000, **driver)
    error, noted, _ = asked(found, (512, 96, 2), (520, 520 * 96), (64, 64, 1), True, True)
    assert error == -1 and noted[0] == 0
    assert found.cudaGetLastError() == 0


@pytest.mark.parametrize("driver", (-1, 12080, 13000, 13010, 13020, 13030))
def test_small_maps_of_blackwell_with_gaps(driver):
    found = library(driver)
    rows_of_less = 63  # 63 rows of 1024 values apart: their last value lies before 128 KB
    gap = ((512, rows_of_less, 1), (1024, 1024 * rows_of_less))
    assert make(found, *gap) == MENDED
    assert make(found, *gap, blackwell=False) == ONES
    # The last value ends where 128 KB end, or 16 bytes before.
    assert make(found, (16, 64, 1), (1040, 1040 * 64)) == ONES
    assert make(found, (8, 64, 1), (1040, 1040 * 64)) == MENDED
    # 64 rows and a part of the next begin after 128 KB; whole rows have no gap.
    assert make(found, (512, 65, 1), (1024, 1024 * 65)) == ONES
    assert make(found, (1024, 63, 1), (1024, 1024 * 63)) == ONES
    assert make(found, (64, 8, 2), (64, 64 * 9)) == MENDED  # a gap between matrices


def test_newer_drivers_are_left_alone():
    assert make(library(13040), (512, 63, 1), (1024, 1024 * 63)) == ONES


@pytest.mark.parametrize("arch, blackwell", (("90", "false"), ("100", "true")))
def test_who_asks(arch, blackwell):
    text = (ROOT / f"csrc/gated_linear_sm{arch}.cu").read_text()
    assert re.search(rf"arguments_of\(.*, {blackwell}, &args\)", text)
