"""Train a mixture of experts under FSDP2, one process a rank.

Shows `Top1MoE` with its load-balancing loss, and `torch.distributed.fsdp.fully_shard` around it:
parameters, gradients and optimizer state are sharded, and the layer needs nothing else.

    python examples/moe_fsdp2.py                            # a rank on each GPU, over NCCL
    python examples/moe_fsdp2.py --device cpu --ranks 2     # two CPU processes, over gloo

The task is to say the next token of a walk: token t is followed by (5 t + 3) mod 64, but for one
step in eight, which goes anywhere. The least loss that a model can reach is printed first.
"""

import argparse
import math
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fusedmlp import load_balancing_loss
from fusedmlp.layers import Top1MoE

TOKENS = 64
NOISE = 1 / 8


class Block(nn.Module):
    """x + MoE(norm(x)), and the load-balancing loss of its router."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.moe = Top1MoE(dim, hidden, experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, routing = self.moe(self.norm(x), return_routing=True)
        return x + y, load_balancing_loss(routing)


class Model(nn.Module):
    def __init__(self, dim: int, hidden: int, experts: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, dim)
        self.blocks = nn.ModuleList(Block(dim, hidden, experts) for _ in range(depth))
        self.head = nn.Linear(dim, TOKENS, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, balance = self.embed(ids), torch.zeros((), device=ids.device)
        for block in self.blocks:
            x, loss = block(x)
            balance = balance + loss / len(self.blocks)
        return self.head(x), balance


def batch(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    now = torch.randint(TOKENS, (rows,), device=device)
    anywhere = torch.randint(TOKENS, (rows,), device=device)
    noisy = torch.rand(rows, device=device) < NOISE
    return now, torch.where(noisy, anywhere, (5 * now + 3) % TOKENS)


def train(rank: int, store: str, args: argparse.Namespace) -> None:
    on_gpu = args.device == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=args.ranks,
    )
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks))
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")

    torch.manual_seed(0)  # the same initial values on every rank
    model = Model(args.dim, 2 * args.dim, args.experts, depth=2).to(device)
    mesh = dist.init_device_mesh(args.device, (args.ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    torch.manual_seed(1 + rank)  # other data on every rank
    for step in range(args.steps):
        now, following = batch(args.rows, device)
        logits, balance = model(now)
        loss = nn.functional.cross_entropy(logits, following)
        (loss + 0.01 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            mean = torch.stack((loss.detach(), balance.detach()))
            dist.all_reduce(mean)
            mean /= args.ranks
            if rank == 0:
                print(f"step {step:4d}  loss {mean[0]:.4f}  balance {mean[1]:.2f}", flush=True)
    if rank == 0:
        weight = model.blocks[0].moe.w_gate
        local = tuple(weight.to_local().shape)
        print(f"w_gate {tuple(weight.shape)}: rank 0 of {args.ranks} holds {local}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu")
    parser.add_argument("--ranks", type=int, help="processes: all GPUs, or 2 on a CPU")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=512, help="tokens a rank sees in a step")
    parser.add_argument("--dim", type=int, default=64, help="model width")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()
    args.ranks = args.ranks or (gpus if args.device == "cuda" else 2)

    right = 1 - NOISE + NOISE / TOKENS
    least = -right * math.log(right) - (TOKENS - 1) * NOISE / TOKENS * math.log(NOISE / TOKENS)
    print(f"least loss {least:.4f}, of guessing {math.log(TOKENS):.4f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (os.path.join(folder, "store"), args), nprocs=args.ranks)


if __name__ == "__main__":
    main()
