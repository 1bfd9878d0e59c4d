"""The handwritten kernels of csrc/gated_linear_sm*.cu, run whole on the host: TMA, mbarriers,
wgmma, tcgen05, clusters and all. What the host cannot show is in tests/simt/README.md."""

from contextlib import contextmanager

import pytest
import simt_build
import simt_extension
import torch
from op_checks import unlike

import fusedmlp
from fusedmlp.backends.cuda.gated_linear import variant
from fusedmlp.bench import variants
from fusedmlp.testing import CASES, assert_close_to, compare, evaluate, poison

ARCHS = ("sm_90a", "sm_100a")
NAMES = [
    name
    for name, case in CASES.items()
    if case.op in ("gated_linear", "gated_mlp", "linear_act", "mlp") and case.fits_cuda
]
# One row; a second row of tiles that is ragged, with ragged K and N; three rows of tiles, which
# leave a cluster of two half empty, and several tiles for each block.
SHAPES = [(1, 8, 8), (130, 72, 136), (300, 200, 392)]


@pytest.fixture(params=ARCHS)
def on_host(request, monkeypatch):
    with simt_extension.installed(monkeypatch, request.param), fusedmlp.backend("cuda"), poison():
        yield request.param


@pytest.fixture
def on_hopper(monkeypatch):
    with simt_extension.installed(monkeypatch, "sm_90a"), fusedmlp.backend("cuda"), poison():
        yield


def check(case, inputs, **options):
    for name, numbers in compare(case, inputs, **options).items():
        assert_close_to(*numbers, name=name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_matches_reference(name, shape, dtype, on_host):
    check(CASES[name], CASES[name].inputs(*shape, dtype))


@pytest.mark.parametrize("absent", ("b_gate", "b_up"))
@pytest.mark.parametrize("name", ("gated_linear-bias", "gated_mlp-bias"))
def test_one_bias_alone(name, absent, on_host):
    inputs = CASES[name].inputs(*SHAPES[1], torch.bfloat16)
    del inputs[absent]
    check(CASES[name], inputs)


@pytest.mark.parametrize("name", ("gated_mlp-bias", "mlp-bias"))
def test_many_tiles(name, on_host):
    check(CASES[name], CASES[name].inputs(*SHAPES[2], torch.bfloat16))


TAKE_ONE = {"gated_mlp-bias": map(unlike, simt_build.FUNCTORS),
            "mlp": map(unlike, simt_build.PLAIN)}  # fmt: skip


@pytest.mark.parametrize("name, activation", [(n, a) for n, rows in TAKE_ONE.items() for a in rows])
def test_every_activation(name, activation, on_host):
    """Forward and backward; clamps bite, and no parameter has its default or another's value."""
    inputs = CASES[name].inputs(33, 48, 64, torch.bfloat16, activation=activation)
    check(CASES[name], inputs, activation=activation)


@pytest.mark.parametrize("activation", ("swiglu_oai", "situ"))
def test_a_gate_over_many_tiles(activation, on_host):
    case = CASES["gated_mlp-up_gate-bias"]
    inputs = case.inputs(*SHAPES[2], torch.float16, activation=activation)
    check(case, inputs, activation=activation)


def test_another_limit_builds_nothing(on_host, monkeypatch):
    """The limit is a number of the call: in one build, each has its own results."""
    case, found = CASES["gated_mlp"], []
    inputs = case.inputs(33, 48, 64, torch.bfloat16, activation="swiglu_oai(limit=1.25)")
    case.run(inputs, activation="swiglu_oai")
    monkeypatch.setattr(simt_build.subprocess, "run", None)
    for limit in (1.25, 0.5, 3.0):
        activation = f"swiglu_oai(limit={limit})"
        check(case, inputs, activation=activation, backward=False)
        found.append(case.run(inputs, activation=activation))
    assert not any(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("chosen", variants.variants_of("gated_linear_fwd"))
@pytest.mark.parametrize("name", ("gated_linear-bias", "linear_act-bias"))
def test_forward_variants(name, chosen, on_hopper):
    with variant(chosen):
        check(CASES[name], CASES[name].inputs(*SHAPES[2], torch.bfloat16), backward=False)


@pytest.mark.parametrize("chosen", variants.variants_of("gated_linear_bwd"))
@pytest.mark.parametrize("name", ("gated_mlp-bias", "mlp-bias"))
def test_backward_variants(name, chosen, on_hopper):
    with variant(chosen):
        check(CASES[name], CASES[name].inputs(*SHAPES[2], torch.float16))


@pytest.mark.parametrize("arch", ARCHS)
def test_no_order_of_threads_changes_a_bit(arch, monkeypatch):
    """Every barrier that the kernel needs is there: each seed is another order of execution, with
    copies and products done early or late."""
    case = CASES["gated_mlp-bias"]
    inputs = case.inputs(260, 136, 264, torch.bfloat16)
    dy = torch.randn(260, 136, dtype=torch.bfloat16)
    results = []
    for seed in simt_build.SEEDS:
        with simt_extension.installed(monkeypatch, arch, seed), fusedmlp.backend("cuda"), poison():
            results.append(evaluate(case.run, inputs, dy))
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("blocks", (1, 2, 7, 64))
def test_any_number_of_multiprocessors(blocks, monkeypatch):
    case = CASES["gated_mlp"]
    inputs = case.inputs(140, 72, 264, torch.bfloat16)
    for arch in ARCHS:
        here = simt_extension.installed(monkeypatch, arch, multiprocessors=blocks)
        with here, fusedmlp.backend("cuda"), poison():
            check(case, inputs)


def test_a_bad_row_stays_in_its_row(on_host):
    case = CASES["gated_mlp"]
    inputs = case.inputs(140, 72, 136, torch.bfloat16)
    clean = case.run(inputs)
    for bad in (torch.nan, torch.inf):
        x = inputs["x"].clone()
        x[131, 3] = bad
        out = case.run({**inputs, "x": x})
        assert not out[131].isfinite().any()
        rest = torch.arange(140) != 131
        assert torch.equal(out[rest], clean[rest])


@contextmanager
def outputs_guarded():
    """Memory from new_empty ends at a page that faults; what lies around it must stay."""
    made = []
    original = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        made.append(simt_build.output(original(self, *args, **kwargs)))
        return made[-1].tensor

    torch.Tensor.new_empty = new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty = original
    assert not any(buffer.overwritten() for buffer in made)


@pytest.mark.parametrize("shape", [(1, 8, 8), (130, 72, 136)], ids=str)
@pytest.mark.parametrize("name", ("gated_mlp-bias", "mlp-bias", "gated_mlp-up_gate-bias"))
def test_nothing_outside_is_touched(name, shape, on_host):
    case = CASES[name]
    inputs = case.inputs(*shape, torch.bfloat16)
    dy = torch.randn(shape[0], shape[1], dtype=torch.bfloat16)
    expected = evaluate(case.run, inputs, dy)
    buffers = {k: simt_build.guarded(t) for k, t in inputs.items()}
    with outputs_guarded():
        results = evaluate(case.run, {k: b.tensor for k, b in buffers.items()}, dy)
    for key, t in results.items():
        assert torch.equal(t, expected[key]), key


def test_wide_rows_and_an_expanded_gradient(on_host):
    case = CASES["gated_mlp-bias"]
    inputs = case.inputs(50, 40, 56, torch.float16)
    wide = {
        k: torch.zeros(*t.shape[:-1], t.shape[-1] + 16, dtype=t.dtype)[..., : t.shape[-1]].copy_(t)
        if t.dim() == 2
        else t
        for k, t in inputs.items()
    }
    assert wide["x"].stride(0) == 56
    check(case, wide)
    for dy in (torch.ones(()).expand(50, 40), torch.randn(40, 50).mT):  # as after y.sum()
        check(case, inputs, dy=dy.half())


@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("size", [(1, 1), (128, 256), (1300, 900), (5000, 100)], ids=str)
def test_every_tile_once(size, cluster):
    library = simt_build.load("tests/simt/schedule.cu")
    count = simt_build.empty(1, dtype=torch.int32)
    arguments = (*size, 128, 64, cluster)
    library.tiles(count, *arguments)
    n = int(count.tensor)
    order = simt_build.empty(n, cluster, 2, dtype=torch.int32)
    library.schedule(order, *arguments)
    tiles_m, tiles_n = -(-size[0] // 128), -(-size[1] // 64)
    rows = -(-tiles_m // cluster) * cluster
    seen = order.tensor.tolist()
    assert sorted(map(tuple, sum(seen, []))) == [
        (m, k) for m in range(rows) for k in range(tiles_n)
    ]
    for tile in seen:  # a cluster has neighbouring rows of one column
        assert [m - tile[0][0] for m, _ in tile] == list(range(cluster))
        assert len({k for _, k in tile}) == 1
