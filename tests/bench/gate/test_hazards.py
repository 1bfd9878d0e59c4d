"""What the gates know to go wrong is found in PTX and in machine code, and nothing else is."""

import pytest
import torch

from fusedmlp.bench.gate import hazards, inspecting
from fusedmlp.bench.gate.jobs import Job
from fusedmlp.kernels.arch import arch_for

NARROW = "wgmma of 8 columns along which B is contiguous"
PTX = "wgmma.mma_async.sync.aligned.{}.f32.bf16.bf16 {{%r1,%r2,%r3,%r4}}, {}, %rd2, %p7, 1, 1, {};"


@pytest.mark.parametrize("code, found", [
    (PTX.format("m64n8k16", "%rd1", "0, 1"), [NARROW]),
    (PTX.format("m64n8k16", "%rd1", "1, 0"), []),  # A is contiguous along rows, B along depth
    (PTX.format("m64n16k16", "%rd1", "0, 1"), []),
    ("HGMMA.64x8x16.F32.BF16 R40, gdesc[UR8].tnspB, R40, gsb0 ;", [NARROW]),
    ("HGMMA.64x8x16.F32.BF16 R40, gdesc[UR8], R40, gsb0 ;", []),
    ("HGMMA.64x8x16.F32 R4, gdesc[UR8], R4 ;\nHGMMA.64x32x16.F32 R2, gdesc[UR8].tnspB, R2 ;", []),
    ("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1}, %rd1, %rd2, %p7, 1, 1;", []),
])  # fmt: skip
def test_eight_columns(code, found):
    assert hazards.in_code(code, "13.4.59") == found


@pytest.mark.parametrize("code", (
    PTX.format("m64n64k16", "{%r5,%r6,%r7,%r8}", "0"),
    "HGMMA.64x64x16.F32.BF16 R24, R28, gdesc[UR4], RZ, !UPT, gsb0 ;",
    "QGMMA.64x64x32.F32.E4M3.E4M3 R24, R28, gdesc[UR4], R24 ;",
))  # fmt: skip
def test_operands_in_registers_by_an_old_assembler(code):
    for old in ("12.8", "12.9.86", "13.0.88", "13.2"):
        assert hazards.in_code(code, old) == [
            f"wgmma from registers by ptxas {old}, older than 13.3"
        ]
    for fixed in ("13.3.33", "13.4", "14.0"):
        assert not hazards.in_code(code, fixed)


@pytest.mark.parametrize("code", (
    PTX.format("m64n64k16", "%rd1", "0, 0"),
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;",
))  # fmt: skip
def test_descriptors_are_safe_by_any_assembler(code):
    assert not hazards.in_code(code, "12.8.93")


def test_grids():
    assert not hazards.in_grid((1 << 30, 65_535, 65_535))
    assert hazards.in_grid((1, 65_536)) == ["grid.y 65536 > 65535"]
    assert hazards.in_grid((1, 1, 70_000)) == ["grid.z 70000 > 65535"]


def test_the_gate_reports_them(monkeypatch):
    """From PTX, from machine code and from the grid of a launch: each fault once."""
    code = inspecting._Code(64, 0, False, 0, 0, (), (NARROW,))
    monkeypatch.setattr(inspecting, "_read", lambda cubin, assembler: code)

    class Kernel:
        class metadata:
            shared = tmem_size = 0

        class src:
            class fn:
                __module__ = "kernels.hyper.backward"

        asm = {"cubin": b"", "ptx": PTX.format("m64n8k16", "%rd1", "0, 1")}

    job = Job(arch_for(90), torch.bfloat16, "train", lambda: None)
    assert inspecting.inspect(job, "dz2_kernel", Kernel, (9, 70_000)).faults == (
        NARROW, "grid.y 70000 > 65535",
    )  # fmt: skip
