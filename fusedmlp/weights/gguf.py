"""read_gguf(path) -> BinaryWeights by name: the Q1_0 matrices of a GGUF file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from .binary import BinaryWeight


def read_gguf(
    path: str | os.PathLike[str], names: Iterable[str] | None = None
) -> dict[str, BinaryWeight]:
    """The Q1_0 matrices of a GGUF file by name, of `names` or all: pip install "fusedmlp[gguf]".

    Q1_0 tensors of other dimensions, such as stacked experts, are left out with a warning, or
    refused where `names` has them.

    Raises ImportError without the package `gguf`; OSError for a file that cannot be opened;
    KeyError for a name that the file lacks; TypeError for a tensor of another type, or names that
    are one str; ValueError for a tensor that is no matrix, or a file that is no GGUF or cut short.

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
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            'read_gguf: needs the package gguf; pip install "fusedmlp[gguf]"'
        ) from error
    if isinstance(names, str):
        raise TypeError(f"read_gguf: names must be several names or None, got the str {names!r}")
    try:
        tensors = {t.name: t for t in gguf.GGUFReader(os.fspath(path)).tensors}
    except (ValueError, IndexError, KeyError) as error:  # whatever its arrays stumble over
        raise ValueError(
            f"read_gguf: {os.fspath(path)} must be a whole GGUF file, got one that gguf cannot "
            f"read: {error}"
        ) from error
    if names is None:
        names = _matrices(path, tensors)
    found = {}
    for name in names:
        if name not in tensors:
            raise KeyError(f"read_gguf: {path} has no tensor {name!r}")
        t = tensors[name]
        if t.tensor_type.name != "Q1_0":
            raise TypeError(f"read_gguf: {name} must be Q1_0, got {t.tensor_type.name}")
        shape = _shape_of(t)
        if len(shape) != 2:
            raise ValueError(f"read_gguf: {name} must be a matrix, got shape {shape}")
        found[name] = BinaryWeight.from_q1_0_bytes(t.data.tobytes(), shape)
    return found


def _shape_of(t: Any) -> tuple[int, ...]:
    """GGUF counts from the innermost dimension."""
    return tuple(int(n) for n in reversed(t.shape))


def _matrices(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> list[str]:
    """Names of the Q1_0 matrices; warns of Q1_0 tensors that are none."""
    binary = {n: _shape_of(t) for n, t in tensors.items() if t.tensor_type.name == "Q1_0"}
    odd = [name for name, shape in binary.items() if len(shape) != 2]
    if odd:
        warnings.warn(
            f"read_gguf: {os.fspath(path)} has {len(odd)} Q1_0 tensors that are no matrices and "
            f"are left out, the first {odd[0]} of shape {binary[odd[0]]}",
            stacklevel=3,
        )
    return [name for name in binary if name not in odd]
