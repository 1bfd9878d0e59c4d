"""What a cubin says of a kernel's launch: where its parameters lie in constant bank 0, and how many
threads a block has."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

# Attributes of .nv.info, by the names that cuobjdump -elf prints: EIATTR_PARAM_CBANK,
# EIATTR_KPARAM_INFO and its successor, EIATTR_REQNTID, EIATTR_MAX_THREADS, EIATTR_REGCOUNT.
_BANK, _PARAMETERS, _REQUIRED, _THREADS, _REGISTERS = 0x0A, (0x17, 0x45), 0x10, 0x05, 0x2F


@dataclass(frozen=True)
class Layout:
    """base: of the parameters in bank 0; size: of the bank; parameters: (offset from there, size)
    of each; threads: of a block, at most; registers: of a thread; constants: the other banks,
    where tables of jumps lie."""

    base: int
    size: int
    parameters: tuple[tuple[int, int], ...]
    threads: int
    registers: int = 0
    constants: Mapping[int, bytes] = field(default_factory=dict)

    def bank(self, parameters: tuple[bytes, ...], grid: tuple[int, ...], threads: int) -> bytes:
        """Constant bank 0 of a launch."""
        bank = bytearray(max(self.size, self.base + 4096))
        x, y, z = (*grid, 1, 1)[:3]
        # Words 0 to 2 are the block's size, 3 to 5 the grid's, before Blackwell; there the driver's
        # area ends with them, on 16 bytes each.
        block, blocks = struct.pack("<3I", threads, 1, 1), struct.pack("<3I", x, y, z)
        bank[0:24] = block + blocks
        if self.base >= 0x380:
            bank[0x360:0x36C], bank[0x370:0x37C] = block, blocks
        for (offset, size), data in zip(self.parameters, parameters, strict=True):
            bank[self.base + offset : self.base + offset + size] = data[:size].ljust(size, b"\0")
        return bytes(bank)


def _sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", cubin, offset + k * entry) for k in range(count)]
    strings = cubin[rows[names][4] : rows[names][4] + rows[names][5]]
    for name, kind, _, _, at, size in rows:
        data = b"" if kind == 8 else cubin[at : at + size]  # 8 is NOBITS
        yield strings[name : strings.index(b"\0", name)].decode(), data


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:
            yield attribute, data[at : at + size]
            at += size
        else:  # the value stands in the header
            yield attribute, struct.pack("<H", size)


def _registers(sections: Mapping[str, bytes]) -> dict[str, int]:
    """Registers of a thread, by kernel."""
    symbols, strings = sections[".symtab"], sections[".strtab"]
    found = {}
    for attribute, value in _attributes(sections.get(".nv.info", b"")):
        if attribute == _REGISTERS:
            symbol, count = struct.unpack_from("<II", value)
            (name,) = struct.unpack_from("<I", symbols, 24 * symbol)
            found[strings[name : strings.index(b"\0", name)].decode()] = count
    return found


def layouts(cubin: bytes) -> dict[str, Layout]:
    """The layout of every kernel of a cubin, by its mangled name."""
    sections = dict(_sections(cubin))
    registers = _registers(sections)
    found = {}
    for name, data in sections.items():
        if not name.startswith(".nv.info."):
            continue
        kernel = name.removeprefix(".nv.info.")
        base = threads = 0
        parameters: dict[int, tuple[int, int]] = {}
        for attribute, value in _attributes(data):
            if attribute == _BANK:
                base, _ = struct.unpack_from("<HH", value, 4)
            elif attribute in _PARAMETERS:
                _, ordinal, offset, flags = struct.unpack_from("<IHHI", value)
                parameters[ordinal] = offset, flags >> 18 & 0x3FFF
            elif attribute in (_REQUIRED, _THREADS):
                x, y, z = struct.unpack_from("<III", value)
                threads = x * y * z
        bank = sections.get(f".nv.constant0.{kernel}", b"")
        rows = tuple(parameters[k] for k in sorted(parameters))
        others = {
            int(section[12 : section.index(".", 12)]): data
            for section, data in sections.items()
            if section.startswith(".nv.constant") and section.endswith(f".{kernel}")
        }
        found[kernel] = Layout(base, len(bank), rows, threads, registers.get(kernel, 0), others)
    return found
