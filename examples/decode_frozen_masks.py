"""Train masked gated layers, freeze their masks into bits, and decode step by step.

Shows `FeedForward(glu_variant="mswiglu", mask_mode="element")`, whose gate and value share one
weight and differ by a binary mask; `freeze_masks()`; and how many bytes of weights a step reads.

    python examples/decode_frozen_masks.py                  # a GPU if there is one, else the CPU
    python examples/decode_frozen_masks.py --device cpu --steps 40 --masks 2

The model sees the last 8 characters and says the next one of a text that this script makes.
"""

import argparse

import torch
from torch import Tensor, nn

from fusedmlp.layers import FeedForward

TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen jugs. " * 8
CONTEXT = 8
LETTERS = sorted(set(TEXT))


class Model(nn.Module):
    def __init__(self, dim: int, masks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(LETTERS), dim // CONTEXT)
        self.blocks = nn.ModuleList(
            FeedForward(
                dim,
                glu_variant="mswiglu",
                mask_mode="element",
                num_masks=masks,
                pre_norm=True,
            )
            for _ in range(2)
        )
        self.head = nn.Linear(dim, len(LETTERS))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, CONTEXT) -> logits (B, letters)."""
        x = self.embed(ids).flatten(1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def freeze(model: Model) -> None:
    for block in model.blocks:
        block.net[0].freeze_masks()


def size(model: Model) -> int:
    """Bytes of the first projections' weights and masks."""
    layers = [block.net[0] for block in model.blocks]
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def decode(model: Model, length: int, device: str) -> str:
    """The text that the model finds likeliest, one character a step."""
    ids = [LETTERS.index(c) for c in TEXT[:CONTEXT]]
    for _ in range(length):
        logits = model(torch.tensor([ids[-CONTEXT:]], device=device))
        ids.append(int(logits.argmax()))
    return "".join(LETTERS[i] for i in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=64, help="examples in a batch")
    parser.add_argument("--dim", type=int, default=128, help="model width, a multiple of 64")
    parser.add_argument("--masks", type=int, default=1, help="masks a weight, 1 to 16")
    parser.add_argument("--length", type=int, default=48, help="characters to decode")
    args = parser.parse_args()
    torch.manual_seed(0)

    ids = torch.tensor([LETTERS.index(c) for c in TEXT], device=args.device)
    windows = ids.unfold(0, CONTEXT + 1, 1)
    model = Model(args.dim, args.masks).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(args.steps):
        rows = windows[torch.randint(len(windows), (args.rows,), device=args.device)]
        loss = nn.functional.cross_entropy(model(rows[:, :-1]), rows[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")

    model.eval().bfloat16()
    trained = decode(model, args.length, args.device)
    logits = size(model)
    freeze(model)
    print(f"decoded: {decode(model, args.length, args.device)}")
    print(f"same text with masks as logits: {trained == decode(model, args.length, args.device)}")

    weights = sum(block.net[0].proj.weight.numel() for block in model.blocks)
    print(f"first projections, masks as bfloat16 logits: {logits} bytes")
    print(f"first projections, masks frozen: {size(model)} bytes")
    print(f"a GLU's two bfloat16 weights of this width: {4 * weights} bytes")


if __name__ == "__main__":
    main()
