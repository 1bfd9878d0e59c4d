"""Train a language model whose sequence mixing is HyperGLU, then let it write.

Shows `HyperGLU` in the place of causal attention beside a SwiGLU `FeedForward`, a training loop,
and decoding: `prefill` reads the prompt, `step` adds one token at a time from a cache.

    python examples/hyperglu_lm.py                          # a GPU if there is one, else the CPU
    python examples/hyperglu_lm.py --device cpu --steps 40 --context 32

The text is made here, of sentences about who sees what; a byte is a token.
"""

import argparse
import math
import random

import torch
from torch import Tensor, nn

from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig
from fusedmlp.layers import FeedForward


def make_text(sentences: int) -> bytes:
    draw = random.Random(0)
    names = ("ann", "bob", "eve", "tom")
    things = ("cat", "dog", "owl", "fox")
    lines = (
        f"{draw.choice(names)} sees a {draw.choice(things)}, the {thing} sees {name}.\n"
        for thing, name in ((draw.choice(things), draw.choice(names)) for _ in range(sentences))
    )
    return "".join(lines).encode()


class Block(nn.Module):
    def __init__(self, dim: int, context: int) -> None:
        super().__init__()
        config = HyperGLUConfig(dim, n_head=2, block_size=context, op1_rank=4, op2_rank=4)
        self.mix_norm, self.mix = nn.RMSNorm(dim), HyperGLU(config)
        self.mlp = FeedForward(dim, mult=2, glu_variant="swiglu", pre_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.mix_norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, dim: int, depth: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim, context) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, 256)."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def write(self, prompt: Tensor, length: int) -> Tensor:
        """The likeliest continuation of prompt (1, T), prompt included."""
        x, caches = self.embed(prompt), []
        for block in self.blocks:
            y, cache = block.mix.prefill(block.mix_norm(x))
            caches.append(cache)
            x = x + y
            x = x + block.mlp(x)
        ids = [prompt, self.head(self.norm(x[:, -1:])).argmax(-1)]
        for _ in range(length - 1):
            x = self.embed(ids[-1])
            for block, cache in zip(self.blocks, caches, strict=True):
                x = x + block.mix.step(block.mix_norm(x), cache)[0]
                x = x + block.mlp(x)
            ids.append(self.head(self.norm(x)).argmax(-1))
        return torch.cat(ids, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--context", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--dim", type=int, default=64, help="model width, a multiple of 64")
    parser.add_argument("--depth", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)

    text = torch.tensor(list(make_text(2000)), device=args.device)
    windows = text.unfold(0, args.context + 1, 1)
    model = Model(args.dim, args.depth, args.context).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(args.steps):
        rows = windows[torch.randint(len(windows), (args.rows,), device=args.device)]
        # On a GPU the GEMMs run in bfloat16; parameters and optimizer stay in float32.
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            logits = model(rows[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item() / math.log(2):.4f} bits a byte")

    model.eval()
    prompt = torch.tensor([list(b"ann sees a ")], device=args.device)
    written = model.write(prompt, args.context - prompt.shape[1])
    print("written:", bytes(written[0].tolist()).decode(errors="replace"))

    # Every step gave what a forward over the whole text gives.
    again = model(written)[:, prompt.shape[1] - 1 : -1].argmax(-1)
    same = torch.equal(again, written[:, prompt.shape[1] :])
    print(f"decoded step by step as by one forward: {same}")


if __name__ == "__main__":
    main()
