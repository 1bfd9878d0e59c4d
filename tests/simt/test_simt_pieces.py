"""The host SIMT runner's primitives one by one, against what their documentation says."""

import pytest
import torch
from simt_build import SEEDS, SimtError, empty, guarded, in_out, load

SOURCE = "tests/simt/examples/pieces.cu"


@pytest.mark.parametrize("by", (0, 1, 3, 16))
@pytest.mark.parametrize("width", (4, 16, 32))
def test_warp(width, by):
    out = empty(32, 10, dtype=torch.int32)
    load(SOURCE).run_warp_pieces(out, width, by)
    for lane, row in enumerate(out.tensor.tolist()):
        first = lane // width * width
        last = first + width - 1
        assert row[0] == first + by % width
        assert row[1] == (lane ^ by if lane ^ by <= last else lane)
        assert row[2] == (lane - by if lane - by >= first else lane)
        assert row[3] == (lane + by if lane + by <= last else lane)
        assert row[4] & 0xFFFFFFFF == sum(1 << i for i in range(0, 32, 3))
        assert row[5] == 3
        assert row[6] & 0xFFFFFFFF == sum(1 << i for i in range(32) if i % 5 == lane % 5)
        assert row[7] == sum(range(32))
        assert row[8] == (3 if lane < 16 else 20)
        assert row[9] == (7 if lane < 8 else -1)


def test_bits():
    x, y = 0x00F2C4B8, 0x9A3D5E71
    out = empty(8, dtype=torch.int32)
    load(SOURCE).run_bit_pieces(out, x, y)
    both = y << 32 | x
    permuted = [both >> 8 * i & 0xFF for i in (0, 5, 2, 7)]
    expected = [
        x.bit_count(), 32 - x.bit_length(), 4, int(f"{x:032b}"[::-1], 2),
        sum(byte << 8 * i for i, byte in enumerate(permuted)),
        both << 12 >> 32 & 0xFFFFFFFF, both >> 12 & 0xFFFFFFFF, x * y >> 32,
    ]  # fmt: skip
    assert [value & 0xFFFFFFFF for value in out.tensor.tolist()] == expected


def box_of(tensor, box, at):
    """The box, innermost dimension first, of a tensor that goes on with zeros on all sides."""
    padded = torch.nn.functional.pad(tensor, (64,) * 6)
    z, y, x = (64 + c for c in reversed(at))
    return padded[z : z + box[2], y : y + box[1], x : x + box[0]]


def swizzle(box):
    """Chunk c of 16 bytes of row r goes where chunk c ^ (r % 8) would be."""
    rows = box.reshape(-1, 8, 8)
    return torch.stack([row[torch.arange(8) ^ r % 8] for r, row in enumerate(rows)])


CORNERS = [(0, 0, 0), (8, 2, 1), (-3, -1, 0), (11, 5, 2), (60, 0, 0), (0, 7, 0)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("at", CORNERS, ids=str)
@pytest.mark.parametrize("box", [(64, 16, 1), (16, 3, 2), (64, 4, 2)], ids=str)
def test_tma_box(box, at, seed):
    swizzled = box[0] == 64
    size = (72, 7, 3)
    values = torch.arange(72 * 7 * 3, dtype=torch.int16).reshape(3, 7, 72) + 1
    target = in_out(torch.zeros_like(values))
    seen = empty(box[0] * box[1] * box[2], dtype=torch.int16)
    load(SOURCE).run_copy_box(
        guarded(values), target, seen, *size, *box, *at, *at[:2], 0, swizzled, seed=seed
    )
    loaded = box_of(values, box, at)
    staged = swizzle(loaded) if swizzled else loaded
    assert torch.equal(seen.tensor, staged.flatten())
    x, y = at[:2]
    stored = torch.zeros(3 + 128, 7 + 128, 72 + 128, dtype=torch.int16)
    stored[64 : 64 + box[2], 64 + y : 64 + y + box[1], 64 + x : 64 + x + box[0]] = loaded
    assert torch.equal(target.tensor, stored[64:-64, 64:-64, 64:-64])


@pytest.mark.parametrize(
    ("size", "box", "swizzled"),
    [
        ((72, 7, 0), (64, 4, 1), True),  # an empty dimension
        ((70, 7, 1), (64, 4, 1), True),  # rows of a multiple of 4 bytes
        ((72, 7, 1), (64, 257, 1), True),  # a box too high
        ((72, 7, 1), (12, 4, 1), False),  # box rows of 24 bytes
        ((144, 7, 1), (72, 4, 1), True),  # box rows longer than the swizzle
    ],
)
def test_encode_refuses_what_the_driver_does(size, box, swizzled):
    values = torch.zeros(max(size[0] * size[1] * size[2], 1), dtype=torch.int16)
    seen = empty(1, dtype=torch.int16)
    arguments = (*size, *box, 0, 0, 0, 0, 0, 0, swizzled)
    with pytest.raises(SimtError, match="returned error 1$"):
        load(SOURCE).run_copy_box(guarded(values), in_out(values), seen, *arguments)


def test_portable_switch():
    """Machines without a hand-written switch take ucontext's."""
    out = empty(32, 10, dtype=torch.int32)
    load(SOURCE, "SIMT_UCONTEXT").run_warp_pieces(out, 32, 1)
    assert out.tensor[:, 7].eq(496).all()
