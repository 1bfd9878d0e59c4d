"""The gate of csrc/: it must read what nvcc built, and fail on what it is there for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusedmlp.bench.gate import csrc as aot_csrc
from fusedmlp.bench.gate.csrc import BuildError, Kernel, compare, main, objects

ROOT = Path(__file__).parents[3]

# A wgmma whose accumulator is touched while it runs, and a setmaxnreg with nothing to start from.
BAD = r"""
#include <cstdint>
namespace fusedmlp {
namespace {
template <int kSteps>
__global__ void serialised(float* out, uint64_t a, uint64_t b) {
  float d[4] = {0, 0, 0, 0};
  for (int i = 0; i < kSteps; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + i), "l"(b + i));
    d[0] += 1;
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
}  // namespace
__global__ void narrow(float* out, uint32_t a, uint64_t b) {
  float d[4] = {0, 0, 0, 0};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%4,%4,%4}, %5, "
      "1, 1, 1, 1;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
__global__ void ignored(float* out) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  out[threadIdx.x] += 1;
}
void launch(float* out) { serialised<8><<<1, 128>>>(out, 1, 1); }
}  // namespace fusedmlp
"""
SPILLING = """
__global__ void spilling(float* out, int n) {
  float many[64];
  for (int i = 0; i < 64; ++i) many[i] = out[i];
  for (int i = 0; i < n; ++i) many[(i * n) % 64] += many[i % 64];
  for (int i = 0; i < 64; ++i) out[i] = many[i];
}
__global__ void fine(float* out) { out[threadIdx.x] += 1; }
"""


def compiled(folder, stem, text, archs):
    """A build folder with one object, made as CMake makes it."""
    place = folder / f"CMakeFiles/{stem}.dir/csrc"
    place.mkdir(parents=True)
    (folder / "build.ninja").touch()
    cmake = folder / "CMakeFiles/3.25.1"
    cmake.mkdir(exist_ok=True)
    (cmake / "CMakeCUDACompiler.cmake").write_text('set(CMAKE_CUDA_COMPILER_VERSION "13.0.88")\n')
    source, item = folder / f"{stem}.cu", place / f"{stem}.cu.o"
    source.write_text(text)
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags.append("-Xfatbin=-compress-all")
    log = [sys.executable, str(ROOT / "csrc/keep_log.py")]
    subprocess.run([*log, "nvcc", *flags, "-c", source, "-o", item], check=True)
    return item


@pytest.fixture
def baseline(tmp_path, monkeypatch):
    path = tmp_path / "baseline.json"
    monkeypatch.setattr(aot_csrc, "BASELINE", path)
    return path


@pytest.mark.nvcc
def test_faults_are_found(tmp_path):
    kernels = aot_csrc.inspect(compiled(tmp_path, "bad_sm90", BAD, ["90a"]), "13.0.88")
    faults = {kernel.name: kernel.faults for kernel in kernels}
    assert faults.keys() == {"serialised<8>", "ignored", "narrow"}
    assert {
        "wgmma of 8 columns along which B is contiguous",
        "wgmma from registers by ptxas 13.0.88, older than 13.3",
    } <= set(faults["narrow"])
    assert not any(
        f.startswith("wgmma") for name in ("serialised<8>", "ignored") for f in faults[name]
    )
    assert {"no UTMALDG", "no USETMAXREG", "serialised wgmma"} <= set(faults["serialised<8>"])
    assert any(fault.startswith("ptxas C751") for fault in faults["serialised<8>"])
    assert {"no HGMMA", "ptxas C7508"} <= set(faults["ignored"])
    assert not any("C751" in fault for fault in faults["ignored"])


@pytest.mark.nvcc
def test_the_gate_end_to_end(tmp_path, baseline, capsys):
    build = tmp_path / "build"
    build.mkdir()
    compiled(build, "plain", SPILLING, ["80", "90a"])
    assert main(["--build", str(build), "--json", str(tmp_path / "rows.json")]) == 1
    text = capsys.readouterr().out
    assert "no baseline.json; --update writes it" in text
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["name"], row["arch"]) for row in rows} == {
        (name, arch) for name in ("fine", "spilling") for arch in ("sm_80", "sm_90a")
    }
    for row in rows:
        assert row["registers"] > 0
        spills = row["name"] == "spilling"
        assert (row["stack"] > 0) == spills
        assert any(fault.startswith("spills (256 bytes") for fault in row["faults"]) == spills
    shutil.rmtree(build)
    build.mkdir()
    compiled(build, "plain", SPILLING[SPILLING.index("__global__ void fine") :], ["80"])
    assert main(["--build", str(build), "--update"]) == 0
    assert json.loads(baseline.read_text())["kernels"].keys() == {"plain sm_80 fine"}
    assert "1 kernels, 0 with faults, 0 worse" in capsys.readouterr().out
    better = json.loads(baseline.read_text())
    better["kernels"]["plain sm_80 fine"]["registers"] -= 1
    baseline.write_text(json.dumps(better))
    assert main(["--build", str(build)]) == 1
    assert "worse: plain sm_80 fine: registers " in capsys.readouterr().out
    baseline.write_text(json.dumps({**better, "nvcc": "12.8.0"}))
    assert main(["--build", str(build)]) == 0
    assert "not compared: baseline.json is of nvcc 12.8.0" in capsys.readouterr().out


def test_every_change_for_the_worse_is_named():
    kernel = Kernel("gemm_sm90", "gemm<1>", "sm_90a", 168, 0, 1024, 0, (), ())
    was = {"registers": 168, "stack": 0, "spills": 0, "shared": 1024}
    key = kernel.key
    assert not compare([kernel], {key: was})
    assert not compare([kernel], {key: {**was, "registers": 200}})
    assert compare([kernel], {key: {**was, "registers": 160}}) == [
        f"{key}: registers 168, were 160"
    ]
    assert compare([kernel], {key: {**was, "shared": 0}}) == [f"{key}: shared 1024, were 0"]
    assert compare([kernel], {}) == [f"{key}: not in the baseline"]
    assert compare([], {key: was}) == [f"{key}: gone"]


def test_rows_of_a_module_that_was_not_built_are_not_gone(baseline, capsys):
    """Those by CUTLASS, which is built where its package is; --update keeps them."""
    was = {"registers": 168, "stack": 0, "spills": 0, "shared": 1024}
    ours = Kernel("gemm_sm90", "gemm<1>", "sm_90a", 168, 0, 1024, 0, (), ())
    theirs = Kernel(
        "cutlass_sm90", "device_kernel<half_t, true>", "sm_90a", 168, 0, 1024, 0, (), ()
    )
    rows = {ours.key: was, theirs.key: was}
    baseline.write_text(json.dumps({"nvcc": "13.0.88", "kernels": rows}))
    assert not aot_csrc._judged("13.0.88", [ours])
    assert f"not built, so not compared: {theirs.key}" in capsys.readouterr().out
    assert aot_csrc._judged("13.0.88", [theirs]) == [f"{ours.key}: gone"]
    aot_csrc._write_baseline("13.0.88", [ours])
    assert json.loads(baseline.read_text())["kernels"].keys() == rows.keys()


def test_no_build_and_an_old_build_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(BuildError, match=r"no CUDA objects; .*FUSEDMLP_CUDA=1 pip install -e \."):
        objects(tmp_path)
    with pytest.raises(SystemExit):
        main(["--build", str(tmp_path)])
    assert "no CUDA objects" in capsys.readouterr().err
    item = tmp_path / "build/CMakeFiles/a.dir/csrc/a.cu.o"
    item.parent.mkdir(parents=True)
    item.touch()
    (tmp_path / "build/build.ninja").touch()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(aot_csrc, "ROOT", tmp_path)
    assert objects(tmp_path / "build") == [item]
    newer = tmp_path / "csrc/a.cu"
    newer.touch()
    later = item.stat().st_mtime + 10
    os.utime(newer, (later, later))
    with pytest.raises(BuildError, match=r"older than a\.cu; build again"):
        objects(tmp_path / "build")


def test_the_compiler_is_the_one_that_built_last(tmp_path):
    """A build folder keeps what each version of CMake has found."""
    with pytest.raises(BuildError, match="no nvcc"):
        aot_csrc.compiler(tmp_path)
    for age, (cmake, nvcc) in enumerate([("4.4.5", "13.0.48"), ("3.31.10", "12.8.61")]):
        file = tmp_path / "CMakeFiles" / cmake / "CMakeCUDACompiler.cmake"
        file.parent.mkdir(parents=True)
        file.write_text(f'set(CMAKE_CUDA_COMPILER_VERSION "{nvcc}")\n')
        os.utime(file, (1000 - age, 1000 - age))
    assert aot_csrc.compiler(tmp_path) == "13.0.48"
