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


def library(driver):
    """The code as a process finds it whose driver has such a version, which it asks for once."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:  # loaded by another name: a new one
        shutil.copy(build(HOST), file.name)
        found = ctypes.CDLL(file.name)
    found.set_driver(driver)
    return found


def make(found, size, stride, box=(64, 64, 1), blackwell=True):
    """(size, strides in bytes) as the driver got them, and the second word of the map."""
    noted, words = (ctypes.c_uint64 * 15)(), (ctypes.c_uint64 * 2)()
    long, short = ctypes.c_uint64 * 3, ctypes.c_uint32 * 3
    strides = (ctypes.c_uint64 * 2)(*stride)
    error = found.make_map(
        long(*size), strides, short(*box), ctypes.c_bool(blackwell), noted, words
    )
    assert error == 0 and noted[0] == 3 and words[0] == ONES
    return tuple(noted[1:4]), tuple(noted[6:8]), words[1]


def test_what_is_asked_for():
    found = library(13000)
    assert make(found, (512, 96, 2), (520, 520 * 96)) == ((512, 96, 2), (1040, 1040 * 96), ONES)


@pytest.mark.parametrize("driver", (12080, 13000, 13010, 13020, 13030))
def test_small_maps_of_blackwell_with_gaps(driver):
    found = library(driver)
    rows_of_less = 63  # 63 rows of 1024 values apart: their last value lies before 128 KB
    gap = ((512, rows_of_less, 1), (1024, 1024 * rows_of_less))
    assert make(found, *gap)[2] == MENDED
    assert make(found, *gap, blackwell=False)[2] == ONES
    # 64 rows and a part of the next begin after 128 KB; whole rows have no gap.
    assert make(found, (512, 65, 1), (1024, 1024 * 65))[2] == ONES
    assert make(found, (1024, 63, 1), (1024, 1024 * 63))[2] == ONES
    assert make(found, (64, 8, 2), (64, 64 * 9))[2] == MENDED  # a gap between matrices


def test_newer_drivers_are_left_alone():
    assert make(library(13040), (512, 63, 1), (1024, 1024 * 63))[2] == ONES


@pytest.mark.parametrize("arch, blackwell", (("90", "false"), ("100", "true")))
def test_who_asks(arch, blackwell):
    text = (ROOT / f"csrc/gated_linear_sm{arch}.cu").read_text()
    assert re.search(rf"arguments_of\(.*, {blackwell}, &args\)", text)
