"""Fine-tune a model of transformers whose MLPs run through fusedmlp.

Shows `fusedmlp.patch(model)` and its report, training with loss and optimizer, and that a saved
checkpoint is an ordinary one: it loads without fusedmlp and gives the same logits.

    python examples/finetune_patched.py                     # a GPU if there is one, else the CPU
    python examples/finetune_patched.py --device cpu --steps 40
    python examples/finetune_patched.py --model FOLDER      # a checkpoint on disk, of your own

Without --model a small Llama is built from its configuration, so nothing is downloaded. The task is
to copy: the second half of each sequence repeats the first. Needs `pip install "fusedmlp[hf]"`.
"""

import argparse
import tempfile

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import fusedmlp

HALF = 8  # tokens to copy
TOKENS = 32  # different ones


def build(folder: str | None) -> PreTrainedModel:
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2 * HALF,
    )
    return AutoModelForCausalLM.from_config(config)


def batch(rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Token ids, and labels that leave the first half out of the loss."""
    first = torch.randint(TOKENS, (rows, HALF), device=device)
    ids = torch.cat((first, first), 1)
    labels = ids.clone()
    labels[:, :HALF] = -100
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=64, help="sequences in a batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint of transformers")
    args = parser.parse_args()
    torch.manual_seed(0)

    model = build(args.model).to(args.device)
    print(fusedmlp.patch(model))  # before the optimizer, FSDP or torch.compile; the report

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        ids, labels = batch(args.rows, args.device)
        # On a GPU the GEMMs run in bfloat16; parameters and optimizer stay in float32.
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")

    model.eval()
    ids, _ = batch(4, args.device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        plain = AutoModelForCausalLM.from_pretrained(folder).to(args.device).eval()
        difference = (plain(ids).logits - model(ids).logits).abs().max().item()
    print(f"saved, loaded without patch(): logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
