"""Hand-written PTX for the machine of bench/gate/ptx: a kernel from its body, and a launch of it.

An argument that is an array is a 64-bit register of its name, which holds its address; one that is
an int is a 32-bit register. %tid, %lane, %warp, %block are 32-bit registers; %p0, %h0, %r0, %d0
and on are free ones of 1, 16, 32 and 64 bits. A tensor map is a parameter of its own.
"""

import re

import numpy as np
import pytest

from fusedmlp.bench.gate.ptx import Finding, Order, load
from fusedmlp.bench.gate.ptx.memory import Regions

ORDERS = (
    Order("late"),
    Order("once", sums="backwards", noise=1.0),
    Order("seed", seed=3, sums="exactly", noise=-1.0),
)
WHENS = [pytest.param(order, id=order.when) for order in ORDERS]

_HEAD = """.version 8.7
.target sm_100a
.address_size 64
.visible .entry kernel({params})
.reqntid {threads}
{{
.reg .pred %p<32>; .reg .b16 %h<32>; .reg .b32 %r<400>; .reg .b64 %d<32>;
.reg .b32 %tid, %lane, %warp, %block;
{loads}
mov.u32 %tid, %tid.x;
mov.u32 %lane, %laneid;
mov.u32 %warp, %warpid;
mov.u32 %block, %ctaid.x;
"""


def kernel(body, arguments, threads=32):
    """PTX text of a kernel with these arguments."""
    params, loads = [], []
    for name, value in arguments.items():
        if isinstance(value, bytes):
            params.append(f".param .align 64 .b8 {name}[{len(value)}]")
            continue
        bits = 32 if isinstance(value, int) else 64
        params.append(f".param .b{bits} in_{name}")
        loads.append(f".reg .b{bits} %{name}; ld.param.b{bits} %{name}, [in_{name}];")
    head = _HEAD.format(params=", ".join(params), threads=threads, loads="\n".join(loads))
    return f"{head}{body}\n    ret;\n}}\n"


class Launch:
    """What a launch needs: its text, its parameters, where its arrays lie."""

    def __init__(self, body, arguments, threads=32, maps=()):
        self.regions = Regions()
        self.kept = list(arguments.values())
        addresses = {
            name: self._address(name, value)
            for name, value in arguments.items()
            if not isinstance(value, int | bytes)
        }
        arguments = dict(arguments)
        for name, (array, tensor_map) in dict(maps).items():
            arguments[name] = tensor_map(addresses[array]).encoded()
        self.text = kernel(body, arguments, threads)
        self.params = [
            value
            if isinstance(value, bytes)
            else (value & 0xFFFFFFFF).to_bytes(4, "little")
            if isinstance(value, int)
            else addresses[name].to_bytes(8, "little")
            for name, value in arguments.items()
        ]

    def _address(self, name, value):
        array, marks = value if isinstance(value, tuple) else (value, None)
        self.kept.append(marks)
        written = 0 if marks is None else marks.ctypes.data
        return self.regions.add(name, array.ctypes.data, array.nbytes, written)

    def run(self, grid=1, **options):
        return load(self.text).run((grid,), self.params, self.regions, **options)


def launch(body, *, grid=1, threads=32, maps=(), options=None, order=ORDERS[0], **arguments):
    """Run a body. An argument (array, marks) is memory whose written bytes `marks` tells."""
    one = Launch(body, arguments, threads, maps)
    return one.run(grid, order=order, **(options or {}))


def finds(what, body, *, at="", warp=None, block=None, **given):
    """The launch must end in a finding that matches `what`, at the line that ends in `// here` (or
    that contains `at`), by that warp and block."""
    threads, maps = given.pop("threads", 32), given.pop("maps", ())
    options, grid = given.pop("options", None) or {}, given.pop("grid", 1)
    order = given.pop("order", ORDERS[0])
    one = Launch(body, given, threads, maps)
    with pytest.raises(Finding, match=what) as caught:
        one.run(grid, order=order, **options)
    found = caught.value
    marked = [
        number
        for number, line in enumerate(one.text.splitlines(), 1)
        if (at in line if at else line.rstrip().endswith("// here"))
    ]
    assert found.kernel == "kernel"
    if marked:
        assert found.line in marked, f"{found}, not at line {marked}"
        code = re.sub(r"//.*", "", one.text.splitlines()[found.line - 1])
        assert found.text in " ".join(code.split())
    assert warp is None or found.warp == warp
    assert block is None or found.block == (block, 0, 0)
    return found


def aligned(shape, dtype, align=1024):
    """Zeros whose address is a multiple of `align`."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + align, np.uint8)
    skip = -raw.ctypes.data % align
    return raw[skip : skip + size].view(dtype).reshape(shape)


STORE = "mul.wide.u32 %d0, %lane, 4; add.s64 %d0, %d0, %out; st.global.b32 [%d0], %r0;"


def lanes(code, **given):
    """%r0 of the 32 lanes after `code`; %r0 is 0xAAAA before."""
    out = np.zeros(32, np.uint32)
    launch(f"mov.b32 %r0, 0xAAAA; {code}\n{STORE}", out=out, **given)
    return out


def loaded(name="x", register="%r1"):
    """A value of each lane."""
    return (
        f"mul.wide.u32 %d1, %lane, 4; add.s64 %d1, %d1, %{name}; ld.global.b32 {register}, [%d1];"
    )


def only(mask):
    """%p9 in the lanes of a mask."""
    return f"shr.u32 %r9, {mask}, %lane; and.b32 %r9, %r9, 1; setp.ne.s32 %p9, %r9, 0;"
