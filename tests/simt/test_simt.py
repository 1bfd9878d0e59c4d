"""The host SIMT runner: its example kernels against PyTorch, and the bugs that it must find."""

import pytest
import simt_build
import torch
from simt_build import SEEDS, SimtError, empty, guarded, in_out, load

from fusedmlp.testing import assert_close_to, yardsticks

each_seed = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture(scope="module")
def faults():
    return load("tests/simt/examples/faults.cu")


@pytest.fixture(scope="module")
def blocks():
    return load("tests/simt/examples/blocks.cu")


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def known(fn, *tensors):
    """What the tolerance rule judges fn(*tensors) by, in float32."""
    inputs = {str(i): t.float() for i, t in enumerate(tensors)}
    return yardsticks(lambda t: fn(*t.values()), inputs)["out"]


@each_seed
def test_gemv(seed):
    w, x = random(33, 301, dtype=torch.bfloat16), random(301, dtype=torch.bfloat16)
    y = empty(33, dtype=torch.float32)
    load("tests/simt/examples/gemv.cu").run_gemv(guarded(w), guarded(x), y, 33, 301, seed=seed)
    assert_close_to(y.tensor, *known(torch.mv, w, x))


@each_seed
def test_block_sum(blocks, seed):
    x = random(5, 300)
    sums, positive = empty(5, dtype=torch.float32), empty(5, dtype=torch.int32)
    blocks.run_block_sum(guarded(x), sums, positive, 5, 300, seed=seed)
    assert_close_to(sums.tensor, *known(lambda x: x.sum(1), x))
    assert torch.equal(positive.tensor, (x > 0).sum(1).int())


@each_seed
def test_histogram(blocks, seed):
    values = torch.randint(0, 37, (1001,), dtype=torch.int32)
    counts = in_out(torch.zeros(37, dtype=torch.int32))
    blocks.run_histogram(guarded(values), counts, 1001, 37, seed=seed)
    assert torch.equal(counts.tensor, torch.bincount(values, minlength=37).int())


@each_seed
def test_pipeline(blocks, seed):
    x = random(5 * 256)
    y = empty(5 * 256, dtype=torch.float32)
    blocks.run_pipeline(guarded(x), y, 5, True, seed=seed)
    assert torch.equal(y.tensor, x + 1)


@each_seed
def test_named_barriers(blocks, seed):
    x = random(7, 32)
    sums = empty(3, dtype=torch.float32)
    blocks.run_produce(guarded(x), sums, 7, seed=seed)
    assert_close_to(sums.tensor, *known(lambda x: x.sum().expand(3), x))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_mma(dtype):
    a, b = random(45, 70, dtype=dtype), random(70, 50, dtype=dtype)
    c = empty(45, 50, dtype=torch.float32)
    kernels = load("tests/simt/examples/mma_gemm.cu")
    run = kernels.run_mma_bf16 if dtype == torch.bfloat16 else kernels.run_mma_fp16
    run(guarded(a), guarded(b), c, 45, 50, 70)
    assert_close_to(c.tensor, *known(torch.mm, a, b))


def test_missing_sync_differs_between_seeds(faults):
    x = random(64)
    results = []
    for seed in SEEDS:
        y = empty(64, dtype=torch.float32)
        faults.run_no_sync(guarded(x), y, seed=seed)
        results.append(y.tensor.clone())
    assert any(not torch.equal(result, x.roll(-1)) for result in results)
    assert any(not torch.equal(result, results[0]) for result in results)


def test_missing_wait_of_cp_async(blocks):
    x = random(5 * 256)
    y = empty(5 * 256, dtype=torch.float32)
    blocks.run_pipeline(guarded(x), y, 5, False)
    assert y.tensor.isnan().any()


def test_unwritten_shared_memory_is_nan(faults):
    y = empty(64, dtype=torch.float32)
    faults.run_unwritten(y)
    assert (y.tensor[:32] == 1).all()
    assert y.tensor[32:].isnan().all()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("half_syncs", ["y"], r"deadlock\n.*named barrier \(32 of 64 .* 0-31\n.*__sync.* 32-63"),
        ("two_barriers", [], r"meets another barrier of the block, at faults.cu:\d+"),
        ("lanes_apart", ["y"], "__shfl_sync of lanes 0xffffffff while lanes"),
        ("static_index", ["y", 8], "index out of an array's bounds.*faults.cu"),
        ("dynamic_index", ["y", 8, True], "wrote beside its 32 bytes of dynamic shared memory"),
        ("dynamic_index", ["y", 256, True], "out-of-bounds write .*faults.cu"),
        ("dynamic_index", ["y", 256, False], "out-of-bounds read .*faults.cu"),
        ("global_index", ["x", "y", 64, False], "read at argument 0, 0 bytes past the end"),
        ("global_index", ["x", "y", 64, True], "write at argument 1, 0 bytes past the end"),
        ("global_index", ["x", "y", -1024, True], "write at argument 1, 4096 bytes before"),
        ("global_index", ["x", "y", -2, True], "wrote beside argument 1's elements"),
        ("global_index", ["x", "z", 0, True], "write at argument 1, inside, but it is an input"),
        ("endless", ["x", True], "takes too long"),
        ("endless", ["x", False], "takes too long"),
        ("deep", ["y"], "stack overflow"),
        ("traps", [], r"__trap, block \(0, 0, 0\) thread \(0, 0, 0\)"),
        ("nothing", [], r"launch of a grid of \(0, 1, 1\) blocks"),
        ("too_much_shared", [], r"launch of 300000 bytes of shared memory"),
        ("static_in_cluster", ["y"], "__shared__ variables in a kernel with clusters"),
    ],
)
def test_fault_is_found(faults, name, arguments, message):
    buffers = {name: guarded(torch.zeros(64)) for name in "xz"}
    buffers["y"] = empty(64, dtype=torch.float32)
    arguments = [buffers.get(a, a) if isinstance(a, str) else a for a in arguments]
    with pytest.raises(SimtError, match=message):
        faults.call(f"run_{name}", *arguments, seconds=1.5)
    y = empty(64, dtype=torch.float32)  # and the next launch is none the worse
    faults.run_unwritten(y)


def test_padding_between_rows_is_guarded(faults):
    rows = torch.empty(2, 8)
    y = simt_build.output(torch.empty(2, 16)[:, :8])
    faults.run_dynamic_index(y, 0, False)
    assert (y.tensor[0] == 1).all()
    assert y.tensor.stride() == (16, 1)
    assert rows.shape == y.tensor.shape
    with pytest.raises(SimtError, match="wrote beside argument 1's elements"):
        faults.run_global_index(guarded(rows), y, 9, True)


def test_compile_error_is_the_message(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text('#include "device.cuh"\nint x = missing;\n')
    with pytest.raises(SimtError, match=r"does not compile for the host:\n.*missing"):
        simt_build.build(source)


def test_edited_header_builds_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDMLP_SIMT_CACHE", str(tmp_path / "cache"))
    source, header = tmp_path / "value.cu", tmp_path / "value.h"
    source.write_text('#include "value.h"\nextern "C" int value() { return VALUE; }\n')
    header.write_text("#define VALUE 1\n")
    first = simt_build.build(source)
    assert simt_build.build(source) == first
    header.write_text("#define VALUE 2\n")
    assert simt_build.build(source) != first


def test_missing_compiler_or_headers_fail(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SimtError, match=r"no g\+\+"):
        simt_build.compile_command()
    monkeypatch.setattr(simt_build.triton, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(SimtError, match="no cuda_bf16.h: set CUDA_HOME"):
        simt_build.cuda_headers()
