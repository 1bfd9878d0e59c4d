"""Fine-tune a model with PEFT's LoRA, patched and unpatched: the same losses.

Shows that `fusedmlp.patch(peft_model)` takes PEFT's layers as they are, adapters inside one fused
call, and how many bytes a forward pass keeps for backward on either side (on a GPU; on a CPU the
reference runs). The saved adapter is an ordinary one of PEFT.

    python examples/lora_patched.py                     # a GPU if there is one, else the CPU
    python examples/lora_patched.py --device cpu --steps 20
    python examples/lora_patched.py --model FOLDER      # a checkpoint on disk, of your own

Without --model a small Llama is built from its configuration, so nothing is downloaded. The task is
to copy: the second half of each sequence repeats the first.
Needs `pip install "fusedmlp[hf]" peft`.
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import fusedmlp

HALF = 8  # tokens to copy
TOKENS = 32  # different ones
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"])


def build(folder: str | None) -> PreTrainedModel:
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2 * HALF,
    )
    return AutoModelForCausalLM.from_config(config)


def batch(rows: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids, and labels that leave the first half out of the loss."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(TOKENS, (rows, HALF), generator=generator).to(device)
    ids = torch.cat((first, first), 1)
    labels = ids.clone()
    labels[:, :HALF] = -100
    return ids, labels


def saved(model: torch.nn.Module, ids: Tensor) -> int:
    """Bytes that a forward pass keeps for backward, parameters apart, each memory once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = model(input_ids=ids)  # alive until its tensors are counted
    del kept
    return sum(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=32, help="sequences in a batch")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint of transformers")
    args = parser.parse_args()

    models, curves, bytes_saved = [], [], []
    for patched in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(build(args.model), LORA).to(args.device)
        if patched:
            print(fusedmlp.patch(model))  # behind get_peft_model, or before it
        bytes_saved.append(saved(model, batch(args.rows, args.device, 0)[0]))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, lr=args.lr), []
        for step in range(args.steps):
            ids, labels = batch(args.rows, args.device, step)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if patched and (step % 10 == 0 or step == args.steps - 1):
                print(f"step {step:4d}  loss {losses[-1]:.4f}  unpatched {curves[0][step]:.4f}")
        models.append(model.eval())
        curves.append(losses)
    difference = max(abs(a - b) for a, b in zip(*curves, strict=True))
    print(f"losses differ by {difference:.1e} at most")
    print(f"saved for backward: unpatched {bytes_saved[0]:,} bytes, patched {bytes_saved[1]:,}")

    ids, _ = batch(4, args.device, 0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        models[1].save_pretrained(folder)
        torch.manual_seed(0)
        plain = PeftModel.from_pretrained(build(args.model), folder).to(args.device).eval()
        logits = (plain(input_ids=ids).logits - models[1](input_ids=ids).logits).abs().max()
    print(f"adapter saved, loaded without patch(): logits differ by {logits.item():.1e} at most")


if __name__ == "__main__":
    main()
