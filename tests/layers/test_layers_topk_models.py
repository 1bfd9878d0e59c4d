"""TopKMoE with the arguments of docs/moe.md is a model's block of transformers' own code, with its
weights: forward and every gradient."""

import pytest
import torch
from layer_checks import draw
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

from fusedmlp.layers import TopKMoE

D, H, E = 16, 12, 8
SHARED = {f"shared.{n}.weight": f"{{}}.{n}_proj.weight" for n in ("gate", "up", "down")}


def of_shared(name):
    return {ours: theirs.format(name) for ours, theirs in SHARED.items()}


PACKED = {"w_gate": "experts.gate_up_proj", "w_down": "experts.down_proj"}
# block, configuration, arguments of TopKMoE, our names of theirs
MODELS = {
    "Mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E),
        {"packed": "gate_up"},
        {**PACKED, "router.weight": "gate.weight"},
    ),
    "Qwen2-MoE": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(hidden_size=D, moe_intermediate_size=H, num_experts=E, num_experts_per_tok=2,
                       shared_expert_intermediate_size=10),
        {"packed": "gate_up", "norm": False, "shared_hidden": 10, "shared_score": True},
        {**PACKED, "router.weight": "gate.weight", **of_shared("shared_expert"),
         "shared.score.weight": "shared_expert_gate.weight"},
    ),
    "DeepSeek-V3": (
        DeepseekV3MoE,
        DeepseekV3Config(hidden_size=D, moe_intermediate_size=H, n_routed_experts=E, n_group=4,
                         topk_group=2, num_experts_per_tok=2, n_shared_experts=1),
        {"packed": "gate_up", "score": "sigmoid", "eps": 1e-20, "scale": 2.5, "groups": 4,
         "topk_group": 2, "correction": True, "shared_hidden": H},
        {**PACKED, "router.weight": "gate.weight", "correction": "gate.e_score_correction_bias",
         **of_shared("shared_experts")},
    ),
    "gpt-oss": (
        GptOssMLP,
        GptOssConfig(hidden_size=D, intermediate_size=H, num_local_experts=E,
                     num_experts_per_tok=2),
        {"activation": "swiglu_oai", "packed": "interleaved", "bias": True},
        {**PACKED, "router.weight": "router.weight", "router.bias": "router.bias",
         "b_gate": "experts.gate_up_proj_bias", "b_down": "experts.down_proj_bias"},
    ),
}  # fmt: skip


def ours_of(theirs, names):
    """Stacks of gpt-oss are transposed, (E, columns, rows)."""
    state = {ours: theirs[name] for ours, name in names.items()}
    if "router.bias" in state:
        state = {n: t.mT if n.startswith("w_") else t for n, t in state.items()}
    return state


def assert_near(ours, theirs):
    """Their routers compute in float32, whatever they are given."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_s_block(name):
    kind, config, options, names = MODELS[name]
    config._experts_implementation = "eager"
    block = kind(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in (*block.parameters(), *block.buffers()):
            t.copy_(torch.randn(t.shape, generator=generator, dtype=t.dtype))
    layer = TopKMoE(D, H, E, 2, **options).double()
    layer.load_state_dict(ours_of(block.state_dict(), names))
    x, dy = draw(2, 7, D, dtype=torch.float64), draw(7, 2, D, dtype=torch.float64).transpose(0, 1)
    results = []
    for module in (layer, block):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y = y[0] if isinstance(y, tuple) else y
        (y * dy).sum().backward()
        results.append((y, leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)
    grads = {n: p.grad for n, p in block.named_parameters()}
    learned = {ours: n for ours, n in names.items() if n in grads}
    for ours, grad in ours_of(grads, learned).items():
        assert_near(layer.get_parameter(ours).grad, grad)
    assert all(p.grad is not None for p in layer.parameters())
