"""Dense MLPs whose gates clamp, cap or scale, of the same models and of Falcon H1: patched, each
computes what its class does, forward and every gradient."""

import pytest
import torch
from families_build import SETTINGS, H, configured, kinds
from families_scan import modeling
from torch import nn

import fusedmlp
from fusedmlp.patching.gate import InFloat64

# family -> class, what its gate is, and settings and arguments of its own.
DENSE = {
    "deepseek_v4": ("DeepseekV4MLP", "clamped_swiglu(limit=3.0)", {}, {}),
    "glm5_next": ("Glm5NextTextMLP", "clamped_swiglu(limit=3.0)", {}, {}),
    "minimax_m3_vl": (
        "MiniMaxM3VLDenseMLP", "swiglu_oai(limit=3.0, alpha=1.5)",
        {"dense_intermediate_size": H}, {},
    ),
    "step3p7": (
        "Step3p7MLP", "swiglu_step(limit=3.0)",
        {"swiglu_limits_shared": [3.0], "share_expert_dim": H}, {"layer_idx": 0},
    ),
    "beam": ("BeamMLP", "silu", {}, {}),
    "falcon_h1": (
        "FalconH1MLP", "scaled_swiglu(gate_scale=0.3)", {"mlp_multipliers": [0.3, 0.7]}, {},
    ),
}  # fmt: skip


def made(family):
    name, _, settings, arguments = DENSE[family]
    for kind in kinds(family):
        if "Vision" not in kind.__name__ and hasattr(
            config := configured(kind, SETTINGS), "hidden_act"
        ):
            for key, value in settings.items():
                setattr(config, key, value)
            module = getattr(modeling(family), name)(config, **arguments)
            break
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=1.0, generator=generator)
    return module.double()


def results(module):
    module.zero_grad()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = module(x.requires_grad_())
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("family", DENSE)
def test_dense_mlps_of_these_models(family):
    module = made(family)
    with InFloat64():
        own = results(module)
        (entry,) = fusedmlp.patch(module, dtype_check=False).patched
        assert f"activation {DENSE[family][1]!r}" in entry.detail
        for mine, theirs in zip(results(module), own, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_another_limit_makes_the_next_call_raise():
    module = made("deepseek_v4")
    fusedmlp.patch(module, dtype_check=False)
    module.limit = 2.0
    with pytest.raises(TypeError, match=r"limit is 2.0, and was 3.0 at patch\(\)"):
        module(torch.randn(1, 16, dtype=torch.float64))
