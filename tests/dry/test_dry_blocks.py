"""Which blocks are alike, which of them train, and what they are called on."""

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp import layers
from fusedmlp.dry import blocks, lines, warm
from fusedmlp.dry.blocks import Block, blocks_of
from fusedmlp.dry.expected import Expected, _last, expected
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.kernels.arch.tile import ADAPTED
from fusedmlp.kernels.pick import LAST

SM_90 = ARCHES["sm_90"]


def mlp(**options):
    return layers.SwiGLUMLP(16, **options)


def block_of(layer):
    (block,) = blocks_of(layer)
    return block


class Holding(nn.Module):
    """A layer of these parameters and buffers."""

    def __init__(self, parameters=(), buffers=()):
        super().__init__()
        for i, t in enumerate(parameters):
            self.register_parameter(f"p{i}", nn.Parameter(t, requires_grad=t.is_floating_point()))
        for i, t in enumerate(buffers):
            self.register_buffer(f"b{i}", t)


def holding(*tensors):
    return Block("", Holding(*tensors), None, None)


INT, HALF, WIDE = torch.ones(2, dtype=torch.int64), torch.ones(3).half(), torch.ones(4).double()


@pytest.mark.parametrize(
    "parameters, buffers, expected",
    [((INT, HALF), (WIDE,), HALF), ((INT,), (INT, WIDE), WIDE), ((WIDE,), (HALF,), WIDE)],
)
def test_a_block_is_like_its_first_floating_tensor(parameters, buffers, expected):
    assert torch.equal(holding(parameters, buffers).like, expected)


def test_a_block_without_floats_is_like_bfloat16():
    like = holding((INT,), (INT,)).like
    assert like.dtype is torch.bfloat16 and like.shape == (0,)


def spaced(layer):
    w = layer.c_up.weight
    layer.c_up.weight = nn.Parameter(torch.zeros(w.shape[0], 24)[:, :16])


OTHERWISE = {
    "kind": lambda: layers.GELUMLP(16),
    "options": lambda: mlp(recompute=True),
    "shape": lambda: mlp(hidden=24),
    "strides": spaced,
    "dtype": lambda layer: layer.half(),
    "frozen": lambda layer: layer.c_up.requires_grad_(False),
    "mode": lambda layer: layer.eval(),
    "mode of one inside": lambda layer: layer.c_up.eval(),
    "hook": lambda layer: layer.c_up.register_forward_hook(lambda *_: None),
    "buffer": lambda layer: layer.register_buffer("more", torch.zeros(1)),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_blocks_are_alike_until_something_differs(what):
    first, second = mlp(), mlp()
    assert block_of(first).alike() == block_of(second).alike()
    make = OTHERWISE[what]
    if make.__code__.co_argcount:
        make(second)
    else:
        second = make()
    assert block_of(first).alike() != block_of(second).alike()


def test_only_the_first_width_of_a_layer_counts():
    """Vectors come before matrices in some; a one-bit layer has neither, and says its width."""
    assert blocks._width(Holding((torch.ones(5), torch.ones(2, 3), torch.ones(4, 6)))) == 3
    assert blocks._width(Holding((torch.ones(5), torch.ones(2, 7, 3)))) == 3
    assert blocks._width(layers.BinaryGatedMLP(128, 256).pack()) == 128


PHASES = {
    "all of it": (lambda layer: None, ["forward", "backward"]),
    "all but the gate": (
        lambda layer: layer.c_gate.requires_grad_(False),
        ["forward", "backward"],
    ),
    "the gate": (
        lambda layer: layer.requires_grad_(False).c_gate.requires_grad_(),
        ["forward", "backward"],
    ),
    "none of it": (lambda layer: layer.requires_grad_(False), ["forward"]),
    "eval": (lambda layer: layer.eval(), ["forward"]),
}  # fmt: skip


@pytest.mark.parametrize("what", PHASES)
def test_a_block_trains_where_a_parameter_of_it_does(what, monkeypatch):
    change, phases = PHASES[what]
    layer = mlp()
    change(layer)
    assert [p.phase for p in expected(block_of(layer), 4, SM_90, 132)] == phases
    run = []
    own = warm.backward
    monkeypatch.setattr(warm, "backward", lambda *a: run.append("backward") or own(*a))
    warm._run(block_of(layer), 4, dict(layer.named_parameters()))
    assert ["forward", *run] == phases


def test_rows_are_like_the_tensors_that_stand_in():
    """Their dtype may be autocast's; an integer has no say, and without floats the block has."""
    seen = []
    inputs = lambda rows, like: seen.append((rows, like.dtype)) or ()  # noqa: E731
    block = Block("", Holding((WIDE,)), lambda module: torch.zeros(()), inputs)
    for tensors in ({"a": INT, "p0": HALF}, {"p0": INT}):
        warm._run(block, 5, tensors)
    assert seen == [(5, torch.float16), (5, torch.float64)]


def test_results_that_are_no_tensors_count_for_nothing():
    layer = layers.SwiGLU(16, 8)
    layer.unread = nn.Parameter(torch.zeros(()))  # which has no gradient
    call = lambda module, x: (module(x), None, 3, x.long())  # noqa: E731
    block = Block("", layer, call, block_of(layer).inputs)
    found, alone = expected(block, 4, SM_90, 132), expected(block_of(layer), 4, SM_90, 132)
    assert [p.kernels for p in found] == [p.kernels for p in alone]
    assert found[0].moved - alone[0].moved == 4 * 16 * 8  # of the integers
    warm._run(block, 4, dict(layer.named_parameters()))


@pytest.mark.parametrize("on", (True, False))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_of_cuda_is_that_of_the_cpu(dtype, on):
    """Where it is in force; else that of the CPU is as it was."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", on)
        torch.set_autocast_dtype("cuda", dtype)
        for own in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=own), warm._autocast():
                assert torch.is_autocast_enabled("cpu") == (own or on)
                assert torch.get_autocast_dtype("cpu") == (dtype if on else torch.bfloat16)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("at", ("name", "name_group", f"name{ADAPTED}"))
def test_the_last_tile_is_that_of_a_row_of_the_kernel(at, monkeypatch):
    monkeypatch.setitem(LAST, "another", "wrong")
    assert _last("name") is None
    monkeypatch.setitem(LAST, at, "tile")
    assert _last("name") == "tile"


def test_a_kernel_without_tiles_has_none_of_an_earlier_launch(monkeypatch):
    layer = layers.TopKMoE(16, 8, num_experts=4, k=2).bfloat16()
    found = expected(block_of(layer), 64, SM_90, 132)
    names = {name for phase in found for name, _ in phase.kernels}
    for name in names:
        monkeypatch.setitem(LAST, name, "of a launch before")
    assert expected(block_of(layer), 64, SM_90, 132) == found
    assert {LAST[name] for name in names} == {"of a launch before"}


def test_kernels_and_lines_that_repeat_are_counted_once():
    """hits: whether the cache had a kernel, by its hash."""
    told = warm._told([None] * 3, {"a": True, "b": False, "c": False}, ["x", "y", "x"])
    assert told == fusedmlp.Warmup(blocks=3, compiled=2, cached=1, left=("x", "y"))


@pytest.mark.parametrize("tokens", (4, [4, 16], (n for n in (4, 16))))
def test_a_number_of_rows_or_several(tokens):
    assert warm._sizes(tokens) in ([4], [4, 16])


def test_stand_ins_do_not_overlap():
    """As many bytes as their strides span, in the dtype that kernels see: of autocast, but of
    float64, integers and empty ones too."""
    sparse = torch.zeros(3, 700)[:, :5]
    own = (
        torch.ones(300),
        sparse,
        torch.ones(0, 4),
        torch.ones(130).double(),
        torch.ones(2).half(),
    )
    layer = holding(own, (torch.ones(600, dtype=torch.int64), torch.ones(7)))
    own = {**dict(layer.module.named_parameters()), **dict(layer.module.named_buffers())}
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            orders = warm._ordered(layer), warm._reversed(layer)
        for tensors in orders:
            assert list(tensors) == list(own)
            for name, t in own.items():
                seen = tensors[name]
                small = cast and t.dtype in (torch.float32, torch.float16)
                assert seen.dtype == (torch.bfloat16 if small else t.dtype), name
                assert (seen.shape, seen.stride()) == (t.shape, t.stride())
                assert seen.requires_grad == t.requires_grad
            for i, seen in enumerate(tensors.values()):
                seen.data.fill_(i)
            assert all((seen == i).all() for i, seen in enumerate(tensors.values()))
        starts = [[t.data_ptr() for t in tensors.values() if t.numel()] for tensors in orders]
        assert starts[0] == sorted(starts[0]) and starts[1] == sorted(starts[1], reverse=True)


def test_stand_ins_lie_close():
    """Each takes what CUDA's allocator gives it: its bytes up to the next 512, of nothing too."""
    sizes = {1: 512, 128: 512, 129: 1024, 0: 512, 256: 1024, 2: 0}
    layer = holding([torch.ones(n) for n in sizes])
    for tensors, step in ((warm._ordered(layer), 1), (warm._reversed(layer), -1)):
        placed = [t.data_ptr() for t in tensors.values() if t.numel()][::step]
        given = [*sizes.items()][::step]
        ends = [sum(s or 512 for _, s in given[:i]) for i, (n, _) in enumerate(given) if n]
        assert [at - placed[0] for at in placed] == [end - ends[0] for end in ends]


TWO, HALVES = torch.ones(2, 2), torch.ones(2, 2).half()
DTYPES = {
    "one": ((TWO, torch.ones(3, 2, 2)), ()),
    "vectors count for nothing": ((TWO, HALVES[0], HALVES.view(1, 1, 2, 2)), ()),
    "nor do integers": ((TWO, INT.view(1, 2)), ()),
    "two": ((TWO, HALVES, HALVES),
            ("has parameters of float32, float16: a call takes one dtype, or autocast",)),
    "refused ones": ((TWO.double(), TWO, TWO[None].to(torch.float8_e5m2)),
                     ("has parameters of float64, float8_e5m2, which no kernel takes: cast it to "
                      "bfloat16",)),
}  # fmt: skip


@pytest.mark.parametrize("what", DTYPES)
def test_which_dtypes_stand_in_the_way(what):
    tensors, words = DTYPES[what]
    assert tuple(lines._dtypes(holding(tensors))) == words


@pytest.mark.parametrize("kind", (nn.Dropout, nn.AlphaDropout, nn.Dropout2d))
def test_which_dropouts_stand_in_the_way(kind):
    words = "is at work, so a block around it is two calls; not in eval() or at p = 0"
    assert list(lines._obstacles(kind(0.1))) == [words]
    assert not list(lines._obstacles(kind(0.1).eval())) and not list(lines._obstacles(kind(0.0)))
    hooked = kind(0.1)
    hooked.register_forward_hook(lambda *_: None)
    around = "has hooks, so it is called, and what is behind it is not fused with it"
    assert list(lines._obstacles(hooked)) == [words, around]


def test_obstacles_that_repeat_share_a_line():
    model = nn.Sequential(*(layers.FeedForward(16, dropout=0.5) for _ in range(3)))
    (line,) = lines.obstacle_lines(model)
    assert line.startswith("0.net.2 (Dropout) and 2 more is at work, so")


def test_a_module_without_parameters_is_not_said_to_lack_a_layer():
    assert lines.where_lines(nn.ReLU(), None) == []
    (line,) = lines.where_lines(nn.Linear(2, 2), None)
    assert line.startswith("Linear holds no layer of fusedmlp and no patched module: all of it run")


@pytest.mark.parametrize("forward", ((), (("a", None),)))
@pytest.mark.parametrize("backward", ((), (("a", None),)))
def test_a_block_fuses_where_a_phase_of_it_does(forward, backward, monkeypatch):
    """And where its call raises, which has no answer."""
    phases = [Expected("forward", (), forward, 0, 0), Expected("backward", (), backward, 0, 0)]
    monkeypatch.setattr(lines, "expected", lambda *_: phases)
    assert lines._fuses(holding()) == bool(forward or backward)
    monkeypatch.setattr(lines, "expected", lambda *_: 1 / 0)
    assert lines._fuses(holding())


def test_the_hooks_of_a_stand_in_are_as_many_and_silent():
    hooks = {3: print, 5: nn.utils.parametrize.register_parametrization, 9: object()}
    silent = blocks._silent(hooks)
    assert list(silent) == [3, 5, 9] and silent[5] is hooks[5]
    assert silent[3] is silent[9] is blocks._nothing and blocks._nothing(1, a=2) is None


@pytest.mark.parametrize(
    ("name", "roof"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("another", None)],
)
def test_the_gpu_here_has_the_figures_of_its_datasheet(name, roof, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(lines, "arch_of", lambda device: f"arch of {device}")
    monkeypatch.setattr(lines, "multiprocessors", lambda device: f"size of {device}")
    figures = roof and lines.GPUS[roof].roof
    assert lines.gpu_here() == lines.Gpu(name, "arch of cuda", "size of cuda", figures)
