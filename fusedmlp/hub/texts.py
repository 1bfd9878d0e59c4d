"""The files of a Hub kernel's project that are none of our package: $name and the like are filled
in by __main__.py. Their layout is that of `kernel-builder init` (huggingface/kernels, 2026-08)."""

from string import Template

BUILD_TOML = Template("""\
[general]
name = "$name"
version = $version
edition = 5
license = "$license"
backends = ["cpu", "cuda"]

[general.hub]
repo-id = "$repo_id"

[torch-noarch]
cuda_capabilities = [$capabilities]
""")

FLAKE = """\
{
  description = "fusedmlp as a kernel of Hugging Face's Hub";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = Template("""\
---
library_name: kernels
license: $license_tag
---

# $name

Fused kernels in Triton for the MLP side of a transformer, forward and backward, each with a PyTorch
reference: version $package_version of the package of this name. It needs Triton. On CPU tensors the
reference runs.

## Layers

$layers

```python
from kernels import LayerRepository, Mode, kernelize
from kernels import replace_kernel_forward_from_hub, use_kernel_mapping
from transformers.models.llama.modeling_llama import LlamaMLP

repository = LayerRepository(
    "$repo_id", layer_name="FusedMLP", version=$version, trust_remote_code=True
)
replace_kernel_forward_from_hub(LlamaMLP, "FusedMLP")
with use_kernel_mapping({"FusedMLP": {"cuda": repository}}):
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cuda")
```

A layer computes what the forward of the class that adopts it computes, and raises ValueError where
no kernel does.

## Functions and modules

```python
from kernels import get_kernel

$name = get_kernel("$repo_id", version=$version, trust_remote_code=True)
y = $name.gated_mlp(x, w_gate, w_up, w_down, activation="silu")
```

$functions
""")

TESTS = Template('''\
"""The kernel as it will be used; kernel-builder's shells set LOCAL_KERNELS to this folder."""

import kernels
import pytest
import torch
from torch import nn

$name = kernels.get_kernel("$repo_id", version=$version, trust_remote_code=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@kernels.use_kernel_forward_from_hub("FusedMLP")
class GatedMLP(nn.Module):
    def __init__(self, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down_proj, self.act_fn = nn.Linear(96, 64), act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer:
    """A repository of one layer of the kernel that is loaded already."""

    def load(self):
        return $name.layers.FusedMLP


@pytest.mark.kernels_ci
@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()], ids=str)
def test_a_layer_computes_what_the_model_does(act_fn):
    torch.manual_seed(0)
    model = GatedMLP(act_fn).to(DEVICE)
    x = torch.randn(5, 64, device=DEVICE, requires_grad=True)
    expected = model(x)
    expected_dx = torch.autograd.grad(expected.square().sum(), x)[0]
    with kernels.use_kernel_mapping({"FusedMLP": {DEVICE.type: Layer()}}):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device=DEVICE.type)
    assert "forward" in vars(model)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    dx = torch.autograd.grad(y.square().sum(), x)[0]
    torch.testing.assert_close(dx, expected_dx, rtol=1e-3, atol=1e-3)


@pytest.mark.kernels_ci
def test_an_activation_without_a_kernel_is_refused():
    model = GatedMLP(nn.RReLU(0.1, 0.2)).to(DEVICE)
    with kernels.use_kernel_mapping({"FusedMLP": {DEVICE.type: Layer()}}):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device=DEVICE.type)
    with pytest.raises(ValueError, match="GatedMLP must compute"):
        model(torch.randn(5, 64, device=DEVICE))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_function(dtype):
    torch.manual_seed(0)
    x, g, u = (torch.randn(37, 64, device=DEVICE, dtype=dtype) for _ in range(3))
    y = $name.gated_act(g, u, activation="silu")
    expected = torch.nn.functional.silu(g.float()) * u.float()
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    w = torch.randn(96, 64, device=DEVICE, dtype=dtype)
    y = $name.linear_act(x, w, activation="gelu")
    expected = torch.nn.functional.gelu(x.float() @ w.float().T)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=5e-2)
''')
