"""The MLPs of a nanochat-style train.py: equations, widths, initial values, meta device."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from layer_checks import (
    DTYPES,
    assert_cheap,
    assert_initialises_from_meta,
    assert_matches,
    assert_round_trips,
    draw,
    randomise_,
)

from fusedmlp.layers import GELUMLP, ReluSquaredMLP, SiLUMLP, SwiGLUMLP
from fusedmlp.layers.transformer import swiglu_hidden

ACTS = {
    ReluSquaredMLP: lambda z: F.relu(z).square(),
    GELUMLP: F.gelu,
    SiLUMLP: F.silu,
}
CLASSES = (SwiGLUMLP, *ACTS)


def config(n_embd):
    return SimpleNamespace(n_embd=n_embd, n_layer=3)


def formula(cls):
    def gated(p, x):
        gate, up = F.linear(x, p["c_gate.weight"]), F.linear(x, p["c_up.weight"])
        return F.linear(F.silu(gate) * up, p["c_proj.weight"])

    def plain(p, x):
        return F.linear(ACTS[cls](F.linear(x, p["c_fc.weight"])), p["c_proj.weight"])

    return gated if cls is SwiGLUMLP else plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_matches_formula(cls, dtype):
    layer = randomise_(cls(config(20))).to(dtype)
    assert_matches(layer, formula(cls), draw(2, 7, 20, dtype=dtype))


@pytest.mark.parametrize("cls", CLASSES)
def test_runs_on_each_backend(cls, each_backend, device):
    layer = randomise_(cls(8)).to(device)
    assert_matches(layer, formula(cls), draw(5, 8, device=device))


def test_comparison_tells_gate_from_up():
    layer = randomise_(SwiGLUMLP(20))
    swapped = {"c_gate.weight": "c_up.weight", "c_up.weight": "c_gate.weight"}
    with pytest.raises(AssertionError, match="out: max error"):
        assert_matches(
            layer,
            lambda p, x: formula(SwiGLUMLP)({swapped.get(k, k): v for k, v in p.items()}, x),
            draw(14, 20),
        )


@pytest.mark.parametrize(
    ("n_embd", "hidden", "weights"),
    [
        (512, 1408, 2_162_688),
        (640, 1728, 3_317_760),
        (768, 2048, 4_718_592),
        (1024, 2752, 8_454_144),
        (1280, 3456, 13_271_040),
        (1536, 4096, 18_874_368),
    ],
)
def test_swiglu_widths(n_embd, hidden, weights):
    assert swiglu_hidden(n_embd) == hidden
    with torch.device("meta"):
        layer = SwiGLUMLP(config(n_embd))
    assert layer.c_gate.weight.shape == (hidden, n_embd)
    assert sum(p.numel() for p in layer.parameters()) == weights


@pytest.mark.parametrize("cls", ACTS)
def test_two_matrix_widths(cls):
    with torch.device("meta"):
        layer = cls(config(512))
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "c_fc.weight": (2048, 512),
        "c_proj.weight": (512, 2048),
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_is_a_matrix(cls):
    """Muon takes matrices only; c_gate and c_up must share its group, so their shape."""
    layer = cls(64)
    assert all(p.dim() == 2 for p in layer.parameters())
    assert not list(layer.buffers())
    if cls is SwiGLUMLP:
        assert list(layer.state_dict()) == ["c_gate.weight", "c_up.weight", "c_proj.weight"]
        assert layer.c_gate.weight.shape == layer.c_up.weight.shape


@pytest.mark.parametrize("cls", CLASSES)
def test_initial_values(cls):
    torch.manual_seed(0)
    layer = cls(config(96))
    bound = (3 / 96) ** 0.5
    inputs = [m for name, m in layer.named_children() if name != "c_proj"]
    assert len(inputs) == (2 if cls is SwiGLUMLP else 1)
    for linear in inputs:
        top = linear.weight.abs().max().item()
        assert 0.99 * bound < top <= bound
        assert linear.weight.std().item() == pytest.approx(96**-0.5, rel=0.03)
    assert not layer.c_proj.weight.any()
    if cls is SwiGLUMLP:
        assert not torch.equal(layer.c_gate.weight, layer.c_up.weight)


@pytest.mark.parametrize("cls", CLASSES)
def test_fresh_block_returns_zero_and_teaches_c_proj_alone(cls):
    layer = cls(32)
    y = layer(draw(5, 32))
    assert not y.any()
    y.sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.any().item() is (name == "c_proj.weight"), name


@pytest.mark.parametrize("cls", CLASSES)
def test_initialises_from_meta(cls):
    assert_initialises_from_meta(lambda: cls(config(64)))


@pytest.mark.parametrize("cls", CLASSES)
def test_init_weights_repeats(cls):
    layer = randomise_(cls(32))
    torch.manual_seed(9)
    layer.init_weights_()
    torch.manual_seed(9)
    again = cls(32)
    # The constructor draws nn.Linear's values first, so only the distribution can be compared.
    for (name, p), q in zip(layer.named_parameters(), again.parameters(), strict=True):
        assert p.abs().max().item() == pytest.approx(q.abs().max().item(), rel=0.02), name


@pytest.mark.parametrize("cls", CLASSES)
def test_config_or_width(cls):
    assert [p.shape for p in cls(config(40)).parameters()] == [
        p.shape for p in cls(40).parameters()
    ]


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (0, ValueError, "SwiGLUMLP: n_embd must be at least 1, got 0"),
        (config(-4), ValueError, "SwiGLUMLP: n_embd must be at least 1, got -4"),
        (config(64.0), TypeError, "SwiGLUMLP: n_embd must be an int, got 64.0"),
        (SimpleNamespace(dim=4), TypeError, "SwiGLUMLP: config must be an int or have an attri"),
        ("64", TypeError, "SwiGLUMLP: config must be an int .* got '64'"),
    ],
)
def test_bad_configs(argument, error, message):
    with pytest.raises(error, match=message):
        SwiGLUMLP(argument)


@pytest.mark.parametrize("cls", CLASSES)
def test_autocast_trains_master_weights(cls):
    """bfloat16 products, float32 weights and gradients, as train.py runs it."""
    layer = randomise_(cls(32))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(draw(2, 5, 32))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


def test_wrong_width_and_replaced_projection():
    layer = SwiGLUMLP(32)
    with pytest.raises(ValueError, match=r"gated_mlp: x must be \(\.\.\., 32\)"):
        layer(draw(5, 31))
    layer.c_up = nn.Sequential(layer.c_up)
    with pytest.raises(
        TypeError, match="SwiGLUMLP: every projection .* got torch.nn.modules.container.Sequential"
    ):
        layer(draw(5, 32))


@pytest.mark.parametrize("cls", CLASSES)
def test_round_trips(cls):
    layer, other = randomise_(cls(16)), cls(16)
    assert_round_trips(layer, other, draw(5, 16))
    assert layer(x=draw(2, 3, 16)).shape == (2, 3, 16)


def test_is_cheap():
    swiglu, gelu = randomise_(SwiGLUMLP(64)), randomise_(GELUMLP(64))
    assert_cheap(swiglu, lambda x: swiglu.c_proj(F.silu(swiglu.c_gate(x)) * swiglu.c_up(x)))
    assert_cheap(gelu, lambda x: gelu.c_proj(F.gelu(gelu.c_fc(x))))


class OriginalMLP(nn.Module):
    """The module that SwiGLUMLP replaces, as it was proposed for train.py."""

    def __init__(self, config):
        super().__init__()
        hidden_dim = int(config.n_embd * 8 / 3)
        hidden_dim = ((hidden_dim + 63) // 64) * 64
        self.c_gate = nn.Linear(config.n_embd, hidden_dim, bias=False)
        self.c_up = nn.Linear(config.n_embd, hidden_dim, bias=False)
        self.c_proj = nn.Linear(hidden_dim, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_up(x))


@pytest.mark.parametrize("n_embd", (24, 64, 100))
def test_replaces_the_original(n_embd):
    from fusedmlp.layers.transformer import SwiGLUMLP as MLP

    original, ours = OriginalMLP(config(n_embd)), MLP(config(n_embd))
    ours.load_state_dict(original.state_dict())
    x = draw(2, 5, n_embd)
    torch.testing.assert_close(ours(x), original(x))


class Model(nn.Module):
    """A residual stream as train.py builds it: on meta, then emptied, then initialised."""

    def __init__(self, mlp, n_embd):
        super().__init__()
        self.blocks = nn.ModuleList(mlp(config(n_embd)) for _ in range(2))
        self.head = nn.Linear(n_embd, 11, bias=False)

    @torch.no_grad()
    def init_weights(self):
        nn.init.normal_(self.head.weight, std=0.001)
        for block in self.blocks:
            block.init_weights_()

    def forward(self, x):
        for block in self.blocks:
            x = x + block(F.rms_norm(x, (x.shape[-1],)))
        return self.head(F.rms_norm(x, (x.shape[-1],)))


@pytest.mark.parametrize("cls", CLASSES)
def test_trains_from_the_meta_device(cls):
    with torch.device("meta"):
        model = Model(cls, 32)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    x, labels = draw(64, 32), torch.arange(64) % 11
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.log(torch.tensor(11.0)).item(), abs=0.02)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_config_asks_for_in_vain_is_said(cls, recwarn):
    cls(SimpleNamespace(n_embd=8, bias=False, dropout=0.0))
    assert not recwarn
    with pytest.warns(UserWarning) as said:
        cls(SimpleNamespace(n_embd=8, bias=True, dropout=0.2))
    assert [str(w.message).partition(", and")[0] for w in said] == [
        f"{cls.__name__}: config.bias is True", f"{cls.__name__}: config.dropout is 0.2"
    ]  # fmt: skip
    assert all(w.filename == __file__ for w in said)
