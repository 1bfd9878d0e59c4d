"""Put the MLPs of a model into one bit a weight, write them to a GGUF file, and read them again.

Shows `quantize_model(model)` and its report of bytes, the blocks of llama.cpp's format Q1_0
(`to_q1_0_bytes`), `read_gguf`, and that what was read computes the same numbers to the bit.

    python examples/one_bit_gguf.py                         # a GPU if there is one, else the CPU
    python examples/one_bit_gguf.py --device cpu --out mlps.gguf

Rounding a trained model costs accuracy (docs/binary.md has numbers): one-bit models are trained
with one bit, by `fusedmlp.layers.BinaryGatedMLP`. Needs `pip install "fusedmlp[gguf]"`.
"""

import argparse
import os
import tempfile

import gguf
import numpy
import torch
from torch import Tensor, nn

from fusedmlp import BinaryWeight, binary_gated_mlp, quantize_model, read_gguf

# The modules of a Llama block, and what llama.cpp calls their weights.
NAMES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


class MLP(nn.Module):
    """The gated MLP of Llama, under its names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def weights(model: nn.Sequential) -> dict[str, BinaryWeight]:
    """The one-bit weights of a quantised model, under llama.cpp's names."""
    return {
        f"blk.{i}.{name}.weight": getattr(block, module).packed
        for i, block in enumerate(model)
        for module, name in NAMES.items()
    }


def write(path: str, tensors: dict[str, BinaryWeight]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for name, w in tensors.items():
        rows = numpy.frombuffer(w.to_q1_0_bytes(), numpy.uint8).reshape(w.shape[0], -1)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.Q1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=256, help="model width, a multiple of 128")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--out", metavar="FILE", help="keep the GGUF file here")
    args = parser.parse_args()
    torch.manual_seed(0)

    model = nn.Sequential(*(MLP(args.dim, 3 * args.dim) for _ in range(args.blocks))).bfloat16()
    print(quantize_model(model))
    model.to(args.device)

    with tempfile.TemporaryDirectory() as folder:
        path = args.out or os.path.join(folder, "mlps.gguf")
        write(path, weights(model))
        print(f"wrote {len(weights(model))} matrices, {os.path.getsize(path)} bytes")
        read = {name: w.to(args.device) for name, w in read_gguf(path).items()}

    x = torch.randn(4, args.dim, device=args.device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, y = model(x), x
        for i in range(args.blocks):
            y = binary_gated_mlp(y, *(read[f"blk.{i}.{name}.weight"] for name in NAMES.values()))
    print(f"the same numbers from the file: {torch.equal(y, expected)}")


if __name__ == "__main__":
    main()
