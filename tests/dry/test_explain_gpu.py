"""explain(): what would run on a GPU that is not there, and what stands in the way here."""

import re

import pytest
import torch
from layer_makers import MAKERS
from torch import nn

import fusedmlp
from fusedmlp import explaining, layers
from fusedmlp.backends.cuda import loader
from fusedmlp.backends.op import OPS, public_ops
from fusedmlp.bench import predict
from fusedmlp.bench.machine import ARCH_OF, ROOFS
from fusedmlp.bench.work import Work
from fusedmlp.dry.blocks import blocks_of
from fusedmlp.dry.expected import Expected, expected
from fusedmlp.dry.lines import GPUS, _phase
from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig
from fusedmlp.kernels.arch.roof import Roof
from fusedmlp.kernels.pick import LAST
from fusedmlp.layers import BinaryLinear, FeedForward
from fusedmlp.testing import CASES


def explained(layer, **options):
    """What explain() says of the layer beyond what it says without."""
    return fusedmlp.explain(layer, **options).removeprefix(fusedmlp.explain()).strip()


def planned(layer, **options):
    _, _, text = explained(layer, **options).partition("nothing was run\n")
    return text.splitlines()


class MLP(nn.Module):
    def __init__(self, dim=64, hidden=128):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, False), nn.Linear(dim, hidden, False)
        self.down = nn.Linear(hidden, dim, False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


# Layers whose call reads what a router gave.
READS = ("FastFeedForward all",)


@pytest.mark.parametrize("name", MAKERS)
def test_every_layer_is_planned(name):
    """What a layer is said to launch is what its path says; numbers, state and modes stay."""
    layer = MAKERS[name]().bfloat16()
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    random, last = torch.get_rng_state(), dict(LAST)
    lines = planned(layer, gpu="H100", tokens=64)
    blocks = blocks_of(layer)
    assert bool(lines) == bool(blocks) == (name != "L2Norm")
    if name in READS:
        assert "cannot be planned: its call raises on results of zeros: " in lines[0]
        assert "its fused calls: " in explained(layer)
    elif blocks:
        assert [line.partition(", ")[2].partition(",")[0] for line in lines] == [
            "forward", "backward"
        ], lines  # fmt: skip
        assert all("GFLOP" in line and "at best" in line for line in lines)
        fused = re.search(r"one (\w+_)?mlp|fused as|one moe_mlp|one tree_path", explained(layer))
        assert ("by triton" in lines[0]) >= bool(fused), lines
        launches = "PyTorch alone" not in lines[0]
        assert ("its fused calls: " in explained(layer)) == launches
        assert ("none of its calls is fused" in explained(layer)) != launches
    assert torch.equal(torch.get_rng_state(), random) and last == LAST
    for n, t in layer.state_dict().items():
        assert torch.equal(t, before[n]), n
    assert all(p.grad is None for p in layer.parameters())
    assert len(planned(layer.eval(), gpu="H100", tokens=64)) <= 1
    assert not any(m.training for m in layer.modules())


BY_SEQUENCE = {
    "HyperGLU": lambda: HyperGLU(HyperGLUConfig(n_embd=32, n_head=2, block_size=8)),
    **{name: MAKERS[name] for name in ("GMLP", "GMLP all")},  # of 4 tokens
}


@pytest.mark.parametrize("rows", (1, 3, 4, 5, 8, 9, 17))
@pytest.mark.parametrize("name", (*BY_SEQUENCE, "SwiGLU", "TopKMoE", "FastFeedForward"))
def test_a_block_runs_on_as_many_rows_as_asked_for(name, rows):
    """Or on the sequences that hold as many."""
    layer = {**MAKERS, **BY_SEQUENCE}[name]()
    for block in blocks_of(layer):
        (x,) = block.inputs(rows, block.like)
        length = x.shape[-2] if name in BY_SEQUENCE else 1
        assert rows <= x.shape[:-1].numel() < rows + length and x.dtype == torch.float32
        block.module(x)


@pytest.mark.parametrize("gpu", ROOFS)
@pytest.mark.parametrize("M", (1, 8192))
def test_it_agrees_with_predict(gpu, M):
    """The bench plans the same call by the op's row."""
    D, H = 1024, 2752
    work = Work(CASES["gated_mlp"], "silu", "bfloat16", M, D, H)
    layer = layers.SwiGLUMLP(D, hidden=H).bfloat16()
    (block,) = blocks_of(layer)
    roof = ROOFS[gpu]
    for own in expected(block, M, ARCH_OF[gpu], roof.multiprocessors):
        (launch,) = predict.launches(work, own.phase, roof)
        assert own.kernels == ((launch.kernel, launch.tile),)
        assert (own.flops, own.moved) == (work.flops(own.phase), work.bytes(own.phase))
    (line, _) = planned(layer, gpu=gpu.lower(), tokens=M)
    ms = f"{roof.milliseconds(work.flops('forward'), work.bytes('forward'), 'bfloat16'):.3g}"
    assert f"at best {ms} ms by {'memory' if M == 1 else 'compute'}" in line


def test_a_width_decides_the_tile():
    tile = {}
    for H in (2730, 2736):
        layer = layers.FeedForward(1024, hidden=H, glu_variant="swiglu").bfloat16()
        tile[H] = planned(layer, gpu="H100")[0]
    assert "element loads" in tile[2730] and "tma loads" in tile[2736]


def test_recomputing_costs_flops():
    plain, sparing = (layers.SwiGLUMLP(64, hidden=128, recompute=r) for r in (False, True))
    flops = [expected(blocks_of(m)[0], 64, ARCH_OF["H100"], 132)[1].flops for m in (plain, sparing)]
    assert flops[1] - flops[0] == 4 * 64 * 64 * 128


def test_dropout_splits_a_block():
    layer = layers.FeedForward(64, dropout=0.1, glu_variant="swiglu").bfloat16()
    line = "net.1 (Dropout) is at work, so a block around it is two calls"
    assert line in explained(layer)
    assert "gated_linear by triton" in planned(layer, gpu="H100")[0]
    assert line not in explained(layer.eval())
    assert "gated_mlp by triton" in planned(layer, gpu="H100")[0]


def test_a_hook_and_a_dtype_stand_in_the_way():
    layer = layers.SwiGLUMLP(64)
    layer.c_up.register_forward_hook(lambda *_: None)
    assert "c_up (Linear) has hooks, so it is called" in explained(layer)
    assert "has parameters of float64, which no kernel takes" in explained(layer.double())
    layer.bfloat16().c_up.float()
    assert "parameters of bfloat16, float32: a call takes one" in explained(layer)


def test_what_is_outside_a_fused_call_does_not_stand_in_its_way():
    layer = layers.FeedForward(64, glu_variant="swiglu", pre_norm=True).bfloat16()
    layer.register_forward_hook(lambda *_: None)
    layer.pre_norm.float()
    assert not re.search("hooks|dtype", explained(layer))

    class Layer(MLP):
        """A block among the statements of a forward, beside a dropout of its own."""

        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Dropout(0.1), nn.Dropout(0.1)

        def forward(self, x):
            x = x + self.before(x)
            h = nn.functional.silu(self.gate(x)) * self.up(x)
            return x.sin() + self.down(self.after(h))

    model = nn.Sequential(Layer())
    assert fusedmlp.patch(model).patched
    text = explained(model)
    assert "0.after (Dropout) is at work" in text and "0.before" not in text


def test_a_block_without_a_fused_call_is_said_to_have_none():
    own = FeedForward(64)
    own.net[0].forward = own.net[0].forward
    text = explained(own)
    assert "one by one, since Linear has a forward of its own, set on the instance" in text
    assert "hooks" not in text
    for layer in (own, FeedForward(64, activation=nn.Softsign), BinaryLinear(128, 128)):
        for lines in (explained(layer), explained(nn.Sequential(layer))):
            assert "none of its calls is fused: all of it runs in PyTorch" in lines
            assert "its fused calls" not in lines
    assert "its fused calls" in explained(nn.Sequential(own, FeedForward(64)))
    assert "tokens" not in explained(nn.Linear(64, 64), gpu="H100")  # no heading of nothing


def test_blocks_alike_share_a_line():
    model = nn.Sequential(*(MLP() for _ in range(3))).bfloat16()
    assert "finds its MLPs" in explained(model)
    fusedmlp.patch(model)
    assert "on B200, 8192 tokens: planned and computed" in explained(model, gpu="B200")
    forward, backward = planned(model, gpu="B200", tokens=4096)
    assert forward.startswith("  0 (MLP) and 2 more, forward, bfloat16: gated_mlp by triton: ")
    assert "gated_linear_bwd (" in backward
    model[1].up.register_forward_hook(lambda *_: None)
    assert len(planned(model, gpu="B200", tokens=4096)) == 4


def test_a_model_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(MLP(8192, 28672)).bfloat16()
    fusedmlp.patch(model)
    assert "gated_mlp by triton" in planned(model.eval(), gpu="H100")[0]


def test_where_it_runs_here():
    layer = layers.SwiGLUMLP(64)
    assert "on CUDA: triton; here: reference" in explained(layer)
    with fusedmlp.backend("reference"):
        assert "its fused calls: by reference" in explained(layer)
        report = fusedmlp.patch(nn.Sequential(MLP()))
        assert "gated_mlp on reference" in str(report)
    assert "on CUDA: triton; here: reference, " in str(fusedmlp.patch(nn.Sequential(MLP())))


@pytest.mark.parametrize("name", public_ops())
def test_a_function_is_explained(name):
    op, tiles = OPS[name], GPUS["H100"].arch.tiles
    lines = explained(op.function, gpu="H100").splitlines()
    head = f"{name}: on CUDA: triton; here: reference"
    phases = [
        f"{name}, {phase}: "
        + ", ".join(f"{k.name} (triton{', or cuda' * (k.cuda is not None)})" for k in kernels)
        for phase, kernels in (("forward", op.forward), ("backward", op.backward))
        if kernels
    ]
    planned = [
        f"tiles of {k.name} on H100 in 16 bits, by sizes: " + "; ".join(map(str, tiles[k.name, 2]))
        for k in op.kernels
        if (k.name, 2) in tiles
    ]
    assert lines == [head, *phases, *planned]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"gpu": "V100"}, ValueError, "explain: gpu must be one of H100, H200, B200, got 'V100'"),
        ({"gpu": 1}, ValueError, "explain: gpu must be one of H100, H200, B200, got 1"),
        ({"gpu": "H100", "tokens": 0}, ValueError, "explain: tokens must be at least 1, got 0"),
        ({"gpu": "H100", "tokens": 1.5}, TypeError, "explain: tokens must be an int, got 1.5"),
        ({"tokens": 4}, ValueError, "where torch finds no GPU, got None"),
    ],
)
def test_what_explain_refuses(options, error, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=re.escape(message)):
        fusedmlp.explain(layers.SwiGLUMLP(64), **options)


def test_a_gpu_needs_a_layer():
    with pytest.raises(ValueError, match="explain: layer must be given with gpu or tokens, got No"):
        fusedmlp.explain(gpu="H100")


ROOF = Roof("made up", 1, bytes_per_s=1e12, flops={"bfloat16": 1e15})
TWO = (("one_fwd", None), ("two_fwd", "a tile"))
# Functions, kernels, FLOPs and bytes of a phase, and its words without a GPU's figures and by them.
PHASES = [
    ((), (), 0, 0, "PyTorch alone", ""),
    ((), (), 0, 10**9, "PyTorch alone", ""),
    ((), (), 2 * 10**9, 3 * 10**6, "PyTorch alone; 2 GFLOP, 3 MB", "0.003 ms by memory"),
    (("a", "b"), (), 0, 10**6, "PyTorch alone; 0 GFLOP, 1 MB", "0.001 ms by memory"),
    ((), TWO, 0, 10**6, "one_fwd, two_fwd (a tile); 0 GFLOP, 1 MB", "0.001 ms by memory"),
    (("a", "b"), TWO, 5 * 10**12, 10**6,
     "a, b by triton: one_fwd, two_fwd (a tile); 5e+03 GFLOP, 1 MB", "5 ms by compute"),
]  # fmt: skip


@pytest.mark.parametrize("ops, kernels, flops, moved, words, bound", PHASES)
def test_the_words_of_a_phase(ops, kernels, flops, moved, words, bound):
    phase = Expected("forward", ops, kernels, flops, moved)
    assert _phase(phase, None, "bfloat16") == words
    assert _phase(phase, ROOF, "float64") == words
    assert _phase(phase, ROOF, "bfloat16") == words + (bound and f", at best {bound}")


# What is picked, what was asked for, and the words of a device's line.
PICKED = [
    ("cpu", "reference", "auto", "reference (no GPU kernel runs on CPU tensors)"),
    ("cpu", "reference", "reference", "reference (asked for)"),
    ("cpu", "triton", "auto", "triton, in Triton's interpreter (TRITON_INTERPRET=1)"),
    ("meta", "reference", "reference", "reference (asked for)"),
    ("meta", "cuda", "cuda", "cuda (asked for)"),
    ("meta", "cuda", "auto", "cuda where it takes them, else triton"),
    ("meta", "cutlass", "cutlass", "cutlass (asked for)"),
    ("meta", "triton", "auto", "triton, tiles of sm_90"),
    ("meta", RuntimeError("not here"), "auto", "none: not here"),
    ("meta", loader.Unfit("nor here"), "cuda", "none: nor here"),
]


@pytest.mark.parametrize("kind, picked, asked, words", PICKED)
def test_the_words_of_a_device(kind, picked, asked, words, monkeypatch):
    def pick(op, x):
        assert (op, x.device.type, x.dtype, x.numel()) == (
            "gated_linear", kind, torch.bfloat16, 0,
        )  # fmt: skip
        if isinstance(picked, Exception):
            raise picked
        return picked

    monkeypatch.setattr(explaining.choice, "pick", pick)
    monkeypatch.setattr(explaining.choice, "chosen", lambda: asked)
    monkeypatch.setattr(explaining, "arch_of", lambda device: ARCH_OF["H100"])
    assert explaining._device_line(torch.device(kind)) == f"{kind} tensors: {words}"


# Who served a kernel's last launch, its tile, and what is said of both.
SERVED = [
    (None, "a tile", "tile a tile"),
    ("triton, since it is odd", "a tile", "tile a tile, since it is odd"),
    ("triton", None, "tile none, it was empty"),
    ("cuda", None, "cuda"),
    ("cutlass", "a tile", "cutlass"),
]


@pytest.mark.parametrize("served, tile, words", SERVED)
def test_the_words_of_a_last_launch(served, tile, words, monkeypatch):
    monkeypatch.setattr(explaining, "LAST", {} if tile is None else {"name": tile})
    monkeypatch.setattr(explaining.choice, "SERVED", {} if served is None else {"name": served})
    assert explaining._last_launch("name") == f"last launch of name: {words}"
    assert f"last launch of name: {words}" in fusedmlp.explain().splitlines()
