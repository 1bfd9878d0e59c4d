"""GGUF files: what the package gguf writes is read, and a file that lies is refused at once."""

import random
import re
import signal
import struct
import time
import tracemalloc
import warnings
from contextlib import contextmanager

import gguf
import pytest
import torch

from fusedmlp import quantize_binary, read_gguf
from fusedmlp.weights.gguf_file import TENSOR_TYPES

SECONDS, MEGABYTES = 1, 2


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@contextmanager
def budget():
    """The block may take SECONDS of processor time, after which it is ended, and MEGABYTES."""

    def end(*_):
        raise AssertionError(f"still reading after {SECONDS} s")

    signal.signal(signal.SIGVTALRM, end)
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        tracemalloc.stop()
    assert peak < MEGABYTES << 20, peak


def gguf_file(path, weights, experts=False, metadata=()):
    """With a tensor in float32 last, and before it perhaps two stacked experts."""
    q1_0 = gguf.GGMLQuantizationType.Q1_0
    writer = gguf.GGUFWriter(path, "llama")
    for key, values in metadata:
        writer.add_array(key, values)
    for name, w in weights.items():
        raw = torch.frombuffer(bytearray(w.to_q1_0_bytes()), dtype=torch.uint8)
        raw = raw.view(w.shape[0], -1)
        writer.add_tensor(name, raw.numpy(), raw_dtype=q1_0)
        if experts:
            writer.add_tensor(f"{name}.exps", torch.stack((raw, raw)).numpy(), raw_dtype=q1_0)
    writer.add_tensor("norm", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    weights = {f"blk.0.ffn_{n}.weight": quantize_binary(draw(*s)) for n, s in
               (("gate", (5, 256)), ("down", (3, 128)))}  # fmt: skip
    path = tmp_path / "model.gguf"
    gguf_file(path, weights)
    found = read_gguf(path)
    assert found.keys() == weights.keys()
    for name, w in weights.items():
        assert found[name].shape == w.shape
        assert torch.equal(found[name].dequantize(), w.dequantize())
    assert list(read_gguf(path, ["blk.0.ffn_down.weight"])) == ["blk.0.ffn_down.weight"]
    with pytest.raises(KeyError, match="has no tensor 'output'"):
        read_gguf(path, ["output"])
    with pytest.raises(TypeError, match="read_gguf: norm must be Q1_0, got F32"):
        read_gguf(path, ["norm"])
    with pytest.raises(TypeError, match="names must be several names or None, got the str 'norm'"):
        read_gguf(path, "norm")


def test_gguf_leaves_out_stacked_experts_and_says_so(tmp_path):
    gguf_file(path := tmp_path / "moe.gguf", {"a": quantize_binary(draw(4, 256))}, experts=True)
    with pytest.warns(
        UserWarning, match=r"moe\.gguf has 1 Q1_0 .*, the first a.exps of shape \(2, 4"
    ):
        assert list(read_gguf(path)) == ["a"]
    with pytest.raises(ValueError, match=r"a.exps must be a matrix, got shape \(2, 4, 256\)"):
        read_gguf(path, ["a.exps"])


def test_gguf_that_is_cut_short(tmp_path):
    gguf_file(path := tmp_path / "cut.gguf", {"a": quantize_binary(draw(4, 256))})
    whole = path.read_bytes()
    for size in range(0, len(whole) - 32, 8):  # less cuts padding alone
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"read_gguf: .*cut\.gguf must be a whole GGUF file"):
            read_gguf(path)


def test_the_types_are_those_of_gguf():
    sizes = {t.value: (t.name, *size) for t, size in gguf.GGML_QUANT_SIZES.items()}
    assert {n: sizes[n] for n in TENSOR_TYPES} == TENSOR_TYPES


def test_a_tokenizer_is_passed_by_in_time(tmp_path):
    path = tmp_path / "large.gguf"
    tokens = [f"token {i}" for i in range(100_000)]
    metadata = [("tokens", tokens), ("scores", [0.5] * 1000), ("nested", [[1, 2], [3]])]
    gguf_file(path, {"a": quantize_binary(draw(4, 256))}, metadata=metadata)
    with budget():
        assert list(read_gguf(path)) == ["a"]


def string(text):
    return struct.pack("<Q", len(text)) + text


def header(tensors=0, entries=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def entry(kind, value, key=b"key"):
    return string(key) + struct.pack("<I", kind) + value


def info(name=b"a", shape=(128, 1), kind=41, offset=0, dims=None):
    size = len(shape) if dims is None else dims
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", size, *shape, kind, offset)


def file(*infos, metadata=(), data=bytes(1 << 12)):
    head = header(len(infos), len(metadata)) + b"".join((*metadata, *infos))
    return head + bytes(-len(head) % 32) + data


# Number of a metadata value's type: how struct writes one, of ggml's docs/gguf.md.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
VALUES = {kind: struct.pack(f"<{form}", 1) for kind, form in SCALARS.items()}
VALUES[8] = string(b"xyz")


def array(kind, *values):
    return struct.pack("<IQ", kind, len(values)) + b"".join(values)


def nested(depth):
    """An array in so many others."""
    value = array(0, b"0")
    for _ in range(depth):
        value = array(9, value)
    return value


EVERY_VALUE = [entry(kind, value, b"key %d" % kind) for kind, value in VALUES.items()] + [
    entry(9, array(kind, *count * [value]), b"array %d of %d" % (count, kind))
    for kind, value in VALUES.items() for count in (0, 1, 3)
]  # fmt: skip
ALIGNED = entry(4, struct.pack("<I", 8), b"general.alignment")
# Files at the limit of what is allowed.
FIT = {
    "nothing in it": header(),
    "every value": file(info(), metadata=EVERY_VALUE, data=bytes(18)),
    "version 2": b"GGUF" + struct.pack("<IQQ", 2, 0, 0),
    "a key of 65535 bytes": file(info(), metadata=[entry(0, b"0", b"k" * 65535)]),
    "a name of 65535 bytes": file(info(), info(b"n" * 65535, offset=32)),
    "arrays 4 deep": file(info(), metadata=[entry(9, nested(3))]),
    "strings at the end": header(0, 1) + entry(9, array(8, string(b"x"), string(b""))),
    "a tensor at the end": file(info(), data=bytes(18)),
    "an empty tensor at the end": file(info(), info(b"b", (0,), 0, 32), data=bytes(32)),
    "tensors side by side": file(info(shape=(128, 16)), info(b"b", offset=288), data=bytes(306)),
    "an alignment of 8": header(1, 1) + ALIGNED + info() + bytes(26),
    "4 dimensions": file(info(b"b", (1, 1, 1, 1), 0), info(offset=32)),
    "a new type in the same bytes": file(info(b"new", (7,), 57), info()),
}


@pytest.mark.parametrize("what", FIT)
def test_what_just_fits_is_read(what, tmp_path):
    (path := tmp_path / "fits.gguf").write_bytes(FIT[what])
    if b"GGUF" + FIT[what][4:8] + bytes(8) == FIT[what][:16]:  # without a tensor
        assert read_gguf(path) == {}
    else:
        weight = read_gguf(path, ["a"])["a"]
        assert weight.shape[1] == 128 and not weight.qweight.any() and not weight.scales.any()


def test_a_header_that_ends_anywhere_is_refused_at_that_byte(tmp_path):
    """Inside a number, a string or an array, before or after any."""
    strings = array(8, string(b"xyz"), string(b""))
    values = entry(6, VALUES[6], b"a") + entry(9, strings, b"b") + entry(9, array(9, strings), b"c")
    whole, path = header(1, 3) + values + info(), tmp_path / "cut.gguf"
    for size in range(4, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf" bytes at byte \d+ of {size}$") as told:
            read_gguf(path)
        needed, at = map(int, re.findall(r"at least (\d+) bytes at byte (\d+)", str(told.value))[0])
        assert at >= 4 and at + needed > size


LIES = {
    "a string that ends in its length": (header(0, 1) + entry(9, array(8, b"1234")),
                                         "takes at least 8 bytes at byte 51 of 55"),
    "3 tensors in 71 bytes": (header(3) + bytes(71), "0 metadata entries and 3 tensors takes at "
                              "least 72 bytes at byte 24 of 95"),
    "5 entries in 64 bytes": (header(0, 5) + bytes(64), "5 metadata entries and 0 tensors takes at "
                              "least 65 bytes at byte 24 of 88"),
    "a long name": (file(info(b"n" * 65536)), "the name of a tensor of 65536 bytes; at most 65535"),
    "5 nested arrays": (file(metadata=[entry(9, nested(4))]), "nested more than 4 deep in the val"),
    "a tensor one byte too long": (file(info(), data=bytes(17)), "shape .1, 128., ends at byte "
                                   "114 of 113"),
    "tensors that share a byte": (
        file(info(shape=(128, 18)), info(b"b", offset=288), data=bytes(999)), "same bytes"),
    "a tensor that begins past the end": (file(info(b"b", (0,), 0, 64), data=bytes(32)),
                                          "'b' begins at byte"),
    "2^63 elements": (file(info(shape=(1 << 32, 1 << 31))), "of more elements than 2.63: .2147483"),
    "nothing": (b"", "an empty one"),
    "other magic": (b"GGML" + bytes(64), "begins with b'GGML'"),
    "magic alone": (b"GGUF", "its version takes at least 4 bytes at byte 4 of 4"),
    "an old version": (header(version=1) + bytes(64), "version 1, older than"),
    "a new version": (header(version=4) + bytes(64), "version 4, newer than .*: versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^63 tensors": (header(1 << 63) + bytes(64), f"{1 << 63} tensors takes at least"),
    "2^64 - 1 entries": (header(0, (1 << 64) - 1) + bytes(64), "metadata entries and 0 tensors"),
    "more entries than bytes": (header(0, 60) + bytes(64), "60 metadata entries and 0 tensors"),
    "more tensors than bytes": (header(60, 0) + bytes(64), "0 metadata entries and 60 tensors"),
    "a key of 2^62 bytes": (header(0, 1) + struct.pack("<Q", 1 << 62) + bytes(64), "metadata key"),
    "a long key": (file(metadata=[entry(0, b"0", b"k" * 65536)]), "key of 65536 bytes"),
    "a key that is no text": (file(metadata=[entry(0, b"0", b"\xff")]), "no UTF-8"),
    "a key twice": (file(metadata=[entry(0, b"0")] * 2), "the metadata key 'key' twice"),
    "a new kind of value": (file(metadata=[entry(13, b"")]), "unknown type 13; types up to 12"),
    "a string of 2^63 bytes": (file(metadata=[entry(8, struct.pack("<Q", 1 << 63))]), "value of"),
    "an alignment of 3": (file(metadata=[entry(4, struct.pack("<I", 3), b"general.alignment")]),
                          "no 32-bit power of two: 3"),
    "an alignment of 0": (file(metadata=[entry(4, bytes(4), b"general.alignment")]), "two: 0"),
    "an alignment in 64 bits": (file(metadata=[entry(10, struct.pack("<Q", 32),
                                                     b"general.alignment")]), "of type 10"),
    **{f"an array of 2^33, type {kind}": (
        file(metadata=[entry(9, struct.pack("<IQ", kind, 1 << 33))]), "of 'key' takes at least")
       for kind in range(13)},
    "an array of a new kind": (file(metadata=[entry(9, struct.pack("<IQ", 99, 1))]), "type 99"),
    "3000 nested arrays": (
        file(metadata=[entry(9, struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQ", 0, 0))]),
        "nested more than 4 deep"),
    "5 dimensions": (file(info(shape=(128, 1, 1, 1, 1))), "'a' of 5 dimensions"),
    "2^32 - 1 dimensions": (file(info(dims=(1 << 32) - 1)), "'a' of 4294967295 dimensions"),
    "2^80 elements": (file(info(shape=(1 << 40, 1 << 40))), "more elements than 2"),
    "2^66 elements in no row": (file(info(shape=(1 << 33, 1 << 33, 0))), "more elements than 2"),
    "2^62 elements": (file(info(shape=(1 << 31, 1 << 31))), "ends at byte"),
    "a row that is no block": (file(info(shape=(100, 1))), "blocks of Q1_0 hold 128"),
    "a name that is no text": (file(info(b"\xff")), "no UTF-8"),
    "two of a name": (file(info(), info(offset=32)), "two tensors named 'a'"),
    "an offset of 18": (file(info(), info(b"b", offset=18)), "no multiple of the alignment 32"),
    "an offset of 2^64 - 32": (file(info(offset=(1 << 64) - 32)), "begins at byte"),
    "overlapping tensors": (file(info(shape=(256, 1)), info(b"b", offset=32)), "the same bytes"),
    "a new type within a tensor": (
        file(info(shape=(128, 16)), info(b"new", (7,), 57, 32), data=bytes(288)), "the same bytes"),
    "the same tensor often": (file(*[info(bytes([97 + i])) for i in range(20)]), "the same bytes"),
    "a tensor past the end": (file(info(offset=4096)), "'a', Q1_0 of shape .1, 128., ends at"),
    "another past the end": (file(info(), info(b"n", (2048,), 0, 32)), "'n', F32 .* ends at"),
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_a_lie_is_a_value_error_at_once(what, tmp_path):
    data, message = LIES[what]
    (path := tmp_path / "lie.gguf").write_bytes(data)
    with budget(), pytest.raises(ValueError, match=f"lie.gguf must be a whole GGUF.*{message}"):
        read_gguf(path)


def test_a_newer_type_says_so(tmp_path):
    path = tmp_path / "new.gguf"
    path.write_bytes(file(info(b"new", (7,), 57), info(b"a", offset=32)))
    message = r"new must be Q1_0 \(type 41\), got type 57, which this version .* up to 41"
    with pytest.raises(ValueError, match=f"{message}; `names` reads the others"):
        read_gguf(path)
    with pytest.raises(ValueError, match=message):
        read_gguf(path, ["new"])
    assert list(read_gguf(path, ["a"])) == ["a"]


@pytest.mark.parametrize("shape", [(128,), (128, 2, 2), (128, 2, 1, 3), (128, 1, 1)], ids=str)
def test_what_is_no_matrix_is_left_out_or_refused(shape, tmp_path):
    """A tensor of one dimension or of more than two, beside a matrix."""
    path = tmp_path / "odd.gguf"
    path.write_bytes(file(info(b"odd", shape), info(b"a", offset=1024)))
    wide = re.escape(str(shape[::-1]))
    with pytest.warns(UserWarning, match=rf"1 Q1_0 tensors .* the first odd of shape {wide}"):
        assert list(read_gguf(path)) == ["a"]
    with pytest.raises(ValueError, match=rf"odd must be a matrix, got shape {wide}"):
        read_gguf(path, ["odd"])


def test_memory_is_a_multiple_of_the_file(tmp_path):
    """As many tensors as a file can hold, in 24 bytes and a short name each."""
    path = tmp_path / "many.gguf"
    path.write_bytes(
        file(*[info(b"%x" % i, (), 24, 32 * i) for i in range(4000)], data=bytes(1 << 17))
    )
    tracemalloc.start()
    assert read_gguf(path) == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * path.stat().st_size


def mutated(data, rng):
    """`data` with one to three changes, of the kinds that a header suffers from."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        size = rng.choice((1, 4, 8, 24))
        number = rng.choice((0, 1, 9, 41, 0xFF, 1 << 16, (1 << 31) - 1, 1 << 33, (1 << 64) - 1))
        match rng.choice(("bit", "number", "number", "cut", "lose", "repeat", "swap")):
            case "bit":
                data[at] ^= 1 << rng.randrange(8)
            case "number":
                data[at : at + 8] = struct.pack("<Q", number)[: len(data[at : at + 8])]
            case "cut":
                del data[at + 1 :]
            case "lose":
                del data[at : at + size]
            case "repeat":
                data[at:at] = data[at : at + size]
            case "swap":
                data[at : at + size] = data[at : at + size][::-1]
        data = data or bytearray(b"G")
    return bytes(data)


def same_as_gguf(path, found):
    """What was read is what the package gguf reads."""
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors if t.tensor_type.name == "Q1_0"}
    matrices = {name: t for name, t in tensors.items() if len(t.shape) == 2}
    assert found.keys() == matrices.keys()
    for name, t in matrices.items():
        assert found[name].shape == tuple(reversed(t.shape.tolist()))
        assert found[name].to_q1_0_bytes() == t.data.tobytes()


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_file_is_read_right_or_refused(seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "mutated.gguf"
    metadata = [("tokens", ["a", "bc", "def"]), ("scores", [0.5, 1.0]), ("nested", [[1], [2, 3]])]
    weights = {"gate": quantize_binary(draw(2, 256)), "down": quantize_binary(draw(3, 128))}
    gguf_file(path, weights, experts=True, metadata=metadata)
    whole = path.read_bytes()
    begun, read, refused = time.process_time(), 0, 0
    for _ in range(150):
        path.write_bytes(mutated(whole, rng))
        try:
            with budget(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read_gguf(path)
        except ValueError:
            refused += 1
            continue
        read += 1
        same_as_gguf(path, found)
    assert read and refused, "the draw must try both"
    assert time.process_time() - begun < 5
