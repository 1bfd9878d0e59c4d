"""PEFT's adapters of the stacked experts of every family: a patched module computes what it did."""

import copy

import families_build
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import fusedmlp
from fusedmlp.patching.form import form_of
from fusedmlp.patching.gate import InFloat64


@pytest.mark.parametrize("family, name", families_build.every())
def test_adapters_of_experts(family, name):
    """In float64, so that nothing but another formula could differ."""
    with InFloat64():
        experts = copy.deepcopy(families_build.experts(family, name)).double()
        experts.zero_grad()  # what another test has left: they are made once
        known = form_of(experts)
        if isinstance(known, str):
            return
        stacks = [f"experts.{key}" for key in (known.first, "down_proj")]
        config = LoraConfig(r=2, target_parameters=stacks, init_lora_weights=False)
        plain = inject_adapter_in_model(config, nn.ModuleDict({"experts": experts}))
        ours = copy.deepcopy(plain)
        (entry,) = fusedmlp.patch(ours, dtype_check=False).patched
        assert entry.detail.partition("; LoRA inside: ")[2].count("'default' of rank 2") == 2
        x, *routed = families_build.inputs(torch.float64)
        results = []
        for model in (ours, plain):
            own = x.clone().requires_grad_()
            y = model["experts"](own, *routed)
            y.square().sum().backward()
            grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            results.append({"y": y.detach(), "dx": own.grad, **grads})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 6
    for key, t in results[0].items():
        torch.testing.assert_close(t, results[1][key], msg=lambda m, k=key: f"{k}: {m}")
