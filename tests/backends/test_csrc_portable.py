"""The kernels of csrc/ for every architecture, through bindings and ops, on the host."""

import pytest
import simt_extension
import torch

import fusedmlp
from fusedmlp import reference
from fusedmlp.backends import choice
from fusedmlp.backends.cuda import route as cuda_route
from fusedmlp.bench.campaign import worker
from fusedmlp.bench.rivals import RIVALS
from fusedmlp.bench.work import Work
from fusedmlp.kernels.arch.tile import SKINNY_M
from fusedmlp.testing import CASES, assert_close_to, compare, poison

DECODED = [name for name in CASES if name.startswith("masked_gated_") and name.endswith("-bits")]


@pytest.fixture(autouse=True)
def on_host(monkeypatch):
    with simt_extension.installed(monkeypatch, "sm_80"), fusedmlp.backend("cuda"), poison():
        yield


def packed(masks):
    return fusedmlp.PackedMasks(reference.pack_masks(masks), masks.shape[2])


def inputs_of(name, *shape, dtype):
    inputs = CASES[name].inputs(*shape, dtype)
    return {k: t.detach() for k, t in inputs.items()}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", ((1, 2056, 20), (SKINNY_M, 72, 33)), ids=str)
@pytest.mark.parametrize("name", DECODED)
def test_masked_gated_linear(name, shape, dtype):
    """The first shape is cut into two parts, which a second kernel adds up."""
    case = CASES[name]
    results = compare(case, inputs_of(name, *shape, dtype=dtype), backward=False)
    for tensor, numbers in results.items():
        assert_close_to(*numbers, name=tensor)
    assert choice.SERVED["masked_gated_linear_fwd"] == "cuda"


def test_the_parts_of_the_first_shape_are_two():
    from fusedmlp.backends.cuda.masked import splits_of

    assert splits_of(torch.empty(1, 2056), 20, 2056) == 2


def test_masked_gated_mlp():
    x, w = torch.randn(3, 64).bfloat16(), torch.randn(40, 64).bfloat16() / 8
    w_down, masks = torch.randn(64, 40).bfloat16() / 6, torch.randn(2, 40, 64)
    y = fusedmlp.masked_gated_mlp(x, w, packed(masks), w_down)
    exact = reference.masked_gated_mlp(x.double(), w.double(), masks, w_down.double())
    assert_close_to(y, exact, reference.masked_gated_mlp(x, w, masks, w_down))
    assert choice.SERVED["masked_gated_linear_fwd"] == "cuda"


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("binary_")])
def test_binary(name):
    case = CASES[name]
    results = compare(case, inputs_of(name, 3, 1024, 128, dtype=torch.bfloat16), backward=False)
    assert_close_to(*results["out"])
    served = {k: v for k, v in choice.SERVED.items() if k.startswith("binary_")}
    assert set(served.values()) == {"cuda"}


@pytest.mark.parametrize(
    ("rows", "D", "n_m", "words"),
    [(SKINNY_M + 1, 16, 1, "16 rows of x or fewer, got 17"), (2, 16, 3, "n_m to be one of"),
     (2, 12, 1, "D to be a multiple of 8, and not 0, got 12")],
)  # fmt: skip
def test_what_the_masked_kernel_does_not_take(rows, D, n_m, words):
    x, w = torch.randn(rows, D).bfloat16(), torch.randn(8, D).bfloat16()
    with pytest.raises(ValueError, match=f"masked_gated_linear_fwd: backend 'cuda' needs {words}"):
        fusedmlp.masked_gated_linear(x, w, packed(torch.randn(n_m, 8, D)))


@pytest.mark.parametrize(
    "name, size",
    [("masked_gated_linear-8-bits", "3x256x128"), ("binary_gated_mlp", "3x256x128"),
     ("top1_route", "3x136x72")],
)  # fmt: skip
def test_the_small_cases_of_a_campaign(name, size, monkeypatch, capsys):
    of_case = type(CASES[name]).inputs
    monkeypatch.setattr(type(CASES[name]), "inputs", lambda self, *a: of_case(self, *a[:-1]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(worker, "SMALL_CUDA", worker.SMALL_CUDA[1:])
    monkeypatch.setattr(worker, "SMALL_DECODED", worker.SMALL_DECODED[1:])
    worker.exercise(name, "cuda")
    assert f"{name} {size} on cuda, own choice" in capsys.readouterr().out


def test_what_the_bench_leaves_out():
    ours, case = RIVALS["fusedmlp-cuda"], CASES["masked_gated_linear-1-bits"]
    assert ours.skip(Work(case, "silu", "bfloat16", 16, 64, 32), "forward") is None
    few = "serves inference of 16 rows or fewer"
    assert ours.skip(Work(case, "silu", "bfloat16", 17, 64, 32), "forward") == few
    assert ours.skip(Work(case, "silu", "bfloat16", 1, 64, 32), "both") == few
    assert "float16 only" in ours.skip(Work(case, "silu", "float32", 1, 64, 32), "forward")


def assert_same(found, expected):
    for field, t in expected._asdict().items():
        mine = getattr(found, field)
        if t is None:
            assert mine is None
        elif t.is_floating_point():
            torch.testing.assert_close(mine, t, msg=lambda m, f=field: f"{f}: {m}")
        else:
            assert torch.equal(mine, t), field


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("capacity", (None, 7))
@pytest.mark.parametrize("size", ((0, 3), (1, 1), (200, 40)), ids=str)
def test_top1_route(size, capacity, dtype):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    routing = fusedmlp.top1_route(logits, capacity=capacity)
    assert_same(routing, reference.top1_route(logits, capacity))
    assert choice.SERVED["top1_route_fwd"] == "cuda"


def test_route_to():
    expert = torch.randint(-1, 6, (2, 90), generator=torch.Generator().manual_seed(2))
    prob = torch.rand(2, 90)
    routing = fusedmlp.route_to(expert, prob, 5, capacity=20)
    expected = reference.route_to(expert, prob, 5, 20)
    assert_same(routing, expected)
    assert choice.SERVED["route_to_fwd"] == "cuda"


def test_more_experts_than_are_counted():
    with pytest.raises(ValueError, match="needs 4096 experts or fewer, got 4097"):
        fusedmlp.top1_route(torch.randn(2, 4097))


def test_what_a_block_of_the_router_counts_fits_its_shared_memory():
    """48 KB without asking for more; a warp ranks 32 tokens at a time."""
    extension = simt_extension.extension("sm_80")
    chunk = cuda_route._chunk("top1_route_fwd", torch.empty(1), 10**6, extension.MAX_EXPERTS)
    assert chunk == extension.MAX_CHUNK and chunk % 32 == 0
    assert 4 * (extension.MAX_EXPERTS + 3 * chunk) <= 48 * 1024


def test_logits_of_another_dtype():
    with pytest.raises(TypeError, match="x must be bfloat16 or float16 or float32 on backend"):
        fusedmlp.top1_route(torch.randn(2, 3, dtype=torch.float64))
