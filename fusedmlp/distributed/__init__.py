"""Experts over the ranks of torch.distributed, and plans for patched models."""

from .experts import parallel_moe_mlp, shard_experts
from .plans import ExpertParallelMLP, TensorParallelMLP, expert_parallel_plan, tensor_parallel_plan

__all__ = [
    "ExpertParallelMLP",
    "TensorParallelMLP",
    "expert_parallel_plan",
    "parallel_moe_mlp",
    "shard_experts",
    "tensor_parallel_plan",
]
