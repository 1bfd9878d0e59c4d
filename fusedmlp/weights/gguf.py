"""read_gguf(path) -> BinaryWeights by name: the Q1_0 matrices of a GGUF file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping

from .binary import BinaryWeight
from .gguf_file import TENSOR_TYPES, GGUFFile, Info, opened


def read_gguf(
    path: str | os.PathLike[str], names: Iterable[str] | None = None
) -> dict[str, BinaryWeight]:
    """The Q1_0 matrices of a GGUF file by name, of `names` or all.

    Q1_0 tensors of other dimensions, such as stacked experts, are left out with a warning, or
    refused where `names` has them.

    Raises OSError for a file that cannot be opened; KeyError for a name that the file lacks;
    TypeError for a tensor of another type, or names that are one str; ValueError for a tensor that
    is no matrix or has a type newer than this version, or a file that is no GGUF of version 2 or 3
    in little-endian, is cut short, or contradicts itself. A file from anyone may be read: that
    takes no more time and memory than some multiple of its size, whatever it claims.

    Examples:
        >>> import gguf, numpy, os, tempfile, torch
        >>> from fusedmlp import quantize_binary, read_gguf
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.gguf")
        >>> w = quantize_binary(torch.randn(64, 256))
        >>> rows = numpy.frombuffer(w.to_q1_0_bytes(), numpy.uint8).reshape(64, -1)
        >>> writer = gguf.GGUFWriter(path, "llama")
        >>> writer.add_tensor("blk.0.ffn_up", rows, raw_dtype=gguf.GGMLQuantizationType.Q1_0)
        >>> writer.write_header_to_file()
        >>> writer.write_kv_data_to_file()
        >>> writer.write_tensors_to_file()
        >>> writer.close()
        >>> read = read_gguf(path)
        >>> torch.equal(read["blk.0.ffn_up"].qweight, w.qweight)
        True
    """
    if isinstance(names, str):
        raise TypeError(f"read_gguf: names must be several names or None, got the str {names!r}")
    with opened("read_gguf", path) as file:
        wanted = _matrices(path, file.tensors) if names is None else names
        return {name: _weight(path, file, name) for name in wanted}


def _weight(path: str | os.PathLike[str], file: GGUFFile, name: str) -> BinaryWeight:
    if name not in file.tensors:
        raise KeyError(f"read_gguf: {path} has no tensor {name!r}")
    t = file.tensors[name]
    if t.type_name is None:
        raise ValueError(_newer(name, t))
    if t.type_name != "Q1_0":
        raise TypeError(f"read_gguf: {name} must be Q1_0, got {t.type_name}")
    if len(t.shape) != 2:
        raise ValueError(f"read_gguf: {name} must be a matrix, got shape {t.shape}")
    rows, width = t.shape
    return BinaryWeight.from_q1_0_bytes(file.read(t), (rows, width))


def _newer(name: str, t: Info) -> str:
    return (
        f"read_gguf: {name} must be Q1_0 (type 41), got type {t.type}, which this version of "
        f"fusedmlp does not know; it knows those up to {max(TENSOR_TYPES)}"
    )


def _matrices(path: str | os.PathLike[str], tensors: Mapping[str, Info]) -> list[str]:
    """Names of the Q1_0 matrices; warns of Q1_0 tensors that are none."""
    for name, t in tensors.items():
        if t.type_name is None:
            raise ValueError(f"{_newer(name, t)}; `names` reads the others")
    binary = {name: t.shape for name, t in tensors.items() if t.type_name == "Q1_0"}
    odd = [name for name, shape in binary.items() if len(shape) != 2]
    if odd:
        warnings.warn(
            f"read_gguf: {os.fspath(path)} has {len(odd)} Q1_0 tensors that are no matrices and "
            f"are left out, the first {odd[0]} of shape {binary[odd[0]]}",
            stacklevel=3,
        )
    return [name for name in binary if name not in odd]
