"""MLPs of a user's own, for the tests of patch()."""

from torch import nn


class GatedMLP(nn.Module):
    """An MLP of the user's own, under names of its own."""

    def __init__(self, act=None, bias=True):
        super().__init__()
        self.w1, self.w3 = nn.Linear(8, 12, bias), nn.Linear(8, 12, bias)
        self.w2, self.act = nn.Linear(12, 8, bias), act or nn.SiLU()

    def forward(self, t):
        return self.w2(self.w3(t) * self.act(self.w1(t)))


class LlamaLike(nn.Module):
    """By the names of Llama's, wide enough for one-bit weights."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(128, 256, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(256, 128, bias=False), nn.SiLU()

    def forward(self, t):
        return self.down_proj(self.act_fn(self.gate_proj(t)) * self.up_proj(t))


class MLP(nn.Sequential):
    def __init__(self, *between):
        super().__init__(nn.Linear(8, 12), *(between or (nn.GELU(),)), nn.Linear(12, 8))


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, t):
        gate, up = self.gate_up(t).chunk(2, dim=-1)
        return self.down(up * nn.functional.silu(gate))


class Residual(nn.Module):
    """Spread over submodules, with a tail, as BERT's."""

    def __init__(self):
        super().__init__()
        self.intermediate, self.output = nn.Linear(8, 12), nn.Linear(12, 8)
        self.act, self.norm = nn.GELU(), nn.LayerNorm(8)

    def feed_forward_chunk(self, t):
        return self.norm(self.output(self.act(self.intermediate(t))) + t)

    def forward(self, t):
        return self.feed_forward_chunk(t)
