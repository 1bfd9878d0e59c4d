"""Where elements of a matrix lie: in registers and in shared memory, by NumPy.

Swizzles are written here as a permutation of 16-byte chunks in each row; the machine XORs
addresses. Matrices are (rows, k): A as M x K, B as N x K.
"""

import numpy as np
from ptx_numbers import KINDS

BYTES = {0: 0, 1: 32, 2: 64, 3: 128}  # of a swizzle mode
WGMMA_MODE = {0: 0, 1: 3, 2: 2, 3: 1}  # in bits 62 and 63 of a descriptor
TENSOR_MODE = {0: 0, 1: 6, 2: 4, 3: 2}  # in bits 61 to 63


def numbers(kind, shape, seed):
    """Random bits of a type, and the values that a tensor core sees."""
    x = np.random.default_rng(seed).normal(size=shape)
    if kind == "tf32":
        held = x.astype(np.float32).view(np.uint32)
        return held, (held & np.uint32(0xFFFFE000)).view(np.float32).astype(float)
    held = KINDS[kind].encode(x).astype(np.uint16)
    return held, KINDS[kind].decode(held)


def chunks_moved(rows, width):
    """Rows of `width` bytes, their chunks where a swizzle of that width puts them."""
    if not width:
        return rows
    chunks = rows.reshape(len(rows), -1, 16)
    count, r = chunks.shape[1], np.arange(len(rows)) % 8
    to = np.arange(count) ^ (r // (8 // count))[:, None]
    moved = np.empty_like(chunks)
    np.put_along_axis(moved, to[:, :, None], chunks, 1)
    return moved.reshape(rows.shape)


def _bytes(a):
    a = np.ascontiguousarray(a)
    return a.view(np.uint8).reshape(*a.shape[:-1], -1)


def image(matrix, mode, inner):
    """(bytes, leading offset, stride offset, start) of a canonical layout; `inner`: rows lie side
    by side, K apart. Without that, what is not the operand's own K is filled with other numbers."""
    rows, depth = matrix.shape
    unit, width = 16 // matrix.itemsize, BYTES[mode]
    if not inner and not mode:
        cores = matrix.reshape(rows // 8, 8, depth // unit, unit).transpose(2, 0, 1, 3)
        return _bytes(cores).ravel(), rows * 16, 128, 0
    if not inner:
        start = width - depth * matrix.itemsize  # the last of its K
        box = np.random.default_rng(9).integers(0, 60, (rows, width), np.uint8)
        box[:, start:] = _bytes(matrix)
        return chunks_moved(box, width).ravel(), 16, 8 * width, start
    if not mode:
        cores = matrix.reshape(rows // unit, unit, depth // 8, 8).transpose(2, 0, 3, 1)
        return _bytes(cores).ravel(), rows // unit * 128, 128, 0
    atom = width // matrix.itemsize
    boxes = matrix.reshape(rows // atom, atom, depth).transpose(0, 2, 1)
    moved = [chunks_moved(_bytes(box), width) for box in boxes]
    return np.concatenate(moved).ravel(), depth * width, 8 * width, 0


def descriptor(layout, mode, at, tensor=False):
    """All of a matrix descriptor but the address of the shared array. at: its offset there."""
    _, leading, stride, start = layout
    modes = TENSOR_MODE[mode] << 61 | 1 << 46 if tensor else WGMMA_MODE[mode] << 62
    return modes | stride >> 4 << 32 | leading >> 4 << 16 | at + start >> 4


# ---- fragments of mma.sync, after the figures of the ISA: (row, column) of element i of a lane


def fragment_a(shape, lane, i):
    group, t = lane // 4, lane % 4
    if "tf32" in shape:
        return group + 8 * (i % 2), t + 4 * (i // 2)
    return group + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)


def fragment_b(shape, lane, i):
    group, t = lane // 4, lane % 4
    return (t + 4 * i if "tf32" in shape else 2 * t + i % 2 + 8 * (i // 2)), group


def fragment_d(lane, i):
    """Also, N / 8 times side by side, those of wgmma."""
    return lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


def gathered(matrix, place, count):
    """Registers x lanes, 32 bits each, of a matrix of bits."""
    each = 4 // matrix.itemsize
    out = np.empty((count, 32, each), matrix.dtype)
    for lane in range(32):
        for i in range(count * each):
            out[i // each, lane, i % each] = matrix[place(lane, i)]
    return out.view(np.uint32)[..., 0]


def scattered(registers, rows, columns):
    """A matrix of float32 from registers x lanes."""
    out = np.full((rows, columns), np.nan)
    for i, lanes in enumerate(registers.view(np.float32)):
        for lane, value in enumerate(lanes):
            out[fragment_d(lane, i)] = value
    return out


def close(got, a, b, c=0.0, depth=None):
    """Is got = a b^T + c, as float32 sums in any order give it?"""
    depth = depth or a.shape[1] + 1
    bound = (np.abs(a) @ np.abs(b).T + np.abs(c)) * depth * 2.0**-23
    return bool((np.abs(got - (a @ b.T + c)) <= bound).all())
