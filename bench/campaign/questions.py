"""What nobody could answer without a GPU, by name: each is one process and one record."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ...testing import CASES, judge

# From cuda.h: CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _SWIZZLE_128B, _L2_PROMOTION_L2_128B.
_BFLOAT16, _SWIZZLE_128B, _PROMOTION_128B = 9, 3, 2
ROWS, COLUMNS = 512, 1024
# T, D, H of hyper_attention in "narrow-halves".
HALVES = ((509, 256, 64), (1024, 256, 128))


@dataclasses.dataclass(frozen=True)
class Question:
    """ask: returns (answer, what was seen)."""

    text: str
    ask: Callable[[], tuple[str, str]]


def _encoded(driver: Any, step: int, base: torch.Tensor) -> int:
    """What cuTensorMapEncodeTiled says of two matrices, `step` bytes apart, as one box."""
    row = COLUMNS * base.itemsize
    storage = ctypes.create_string_buffer(128 + 64)
    aligned = (ctypes.addressof(storage) + 63) // 64 * 64
    sizes = (ctypes.c_uint64 * 3)(COLUMNS, ROWS, 2)
    strides = (ctypes.c_uint64 * 2)(row, step)
    box, steps = (ctypes.c_uint32 * 3)(64, 64, 2), (ctypes.c_uint32 * 3)(1, 1, 1)
    return int(
        driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(aligned), _BFLOAT16, 3, ctypes.c_void_p(base.data_ptr()), sizes,
            strides, box, steps, 0, _SWIZZLE_128B, _PROMOTION_128B, 0,
        )
    )  # fmt: skip


def _stacked_box() -> tuple[str, str]:
    base = torch.zeros(4 * ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda")
    driver = ctypes.CDLL("libcuda.so.1")
    row = COLUMNS * base.itemsize
    whole = ROWS * row
    steps = {"whole rows": whole, "a row and 16 bytes": whole + row + 16, "16 bytes": whole + 16,
             "8 bytes": whole + 8}  # fmt: skip
    codes = {name: _encoded(driver, step, base) for name, step in steps.items()}
    seen = ", ".join(f"{name}: CUresult {code}" for name, code in codes.items())
    if codes["whole rows"]:
        return "unknown", f"even whole rows do not encode: {seen}"
    any_step = not (codes["16 bytes"] or codes["a row and 16 bytes"])
    return ("yes" if any_step else "no"), seen


def _narrow_halves() -> tuple[str, str]:
    """The ranks are under 16 here: wgmma multiplied halves of 8 columns under a 32-byte swizzle,
    which CUTLASS does not do, before they were padded."""
    lines, good = [], True
    for T, D, H in HALVES:
        inputs = CASES["hyper_attention"].inputs(T, D, H, torch.bfloat16, "cuda")
        errors = judge(CASES["hyper_attention"], inputs)
        wrong = [name for name, error in errors.items() if not error.passed]
        lines.append(f"T = {T}: " + (f"{', '.join(wrong)} wrong" if wrong else "all right"))
        good = good and not wrong
    return ("yes" if good else "no"), "; ".join(lines)


QUESTIONS = {
    "stacked-box": Question(
        "does a box of two matrices encode whatever multiple of 16 bytes lies between them?",
        _stacked_box,
    ),
    "narrow-halves": Question(
        "does hyper_attention give right numbers where its products have few columns?",
        _narrow_halves,
    ),
}


def record_of(name: str) -> dict[str, Any]:
    question = QUESTIONS[name]
    answer, detail = question.ask()
    return {
        "kind": "answer", "question": name, "text": question.text, "answer": answer,
        "detail": detail,
    }  # fmt: skip
