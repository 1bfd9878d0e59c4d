"""Patched blocks among what trainers shard a model by: wrap policies that go by class names, FSDP2
by such a policy, transformers' own tensor parallelism."""

import functools
import os

import pytest
import torch
import transformers as hf
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from patch_models import batch, build
from ranks import spawn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import fusedmlp
from fusedmlp.patching.swap import Patched

# model -> a class of which each block is patched, and how many there are
NAMES = {"llama": "LlamaMLP", "bert": "BertLayer", "gpt_neox": "GPTNeoXMLP"}


def patched_in_part(name, which):
    """One of the two blocks alone; its class by the name, as accelerate looks for it."""
    model = build(name)
    blocks = [n for n, m in model.named_modules() if type(m).__name__ == NAMES[name]]
    assert len(fusedmlp.patch(model, only=[blocks[which]]).patched) == 1
    return model, [model.get_submodule(n) for n in blocks]


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("name", NAMES)
def test_wrap_policies_take_every_block_of_a_name(name, which):
    model, blocks = patched_in_part(name, which)
    found = get_module_class_from_name(model, NAMES[name])
    assert issubclass(found, Patched) == (which == 0)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[NAMES[name]],
    )
    policies = {
        "torch's": functools.partial(
            transformer_auto_wrap_policy, recurse=False, nonwrapped_numel=0,
            transformer_layer_cls={found},
        ),
        "torch's by modules": functools.partial(
            ModuleWrapPolicy({found}), recurse=False, nonwrapped_numel=0
        ),
        "accelerate's": fsdp2_prepare_auto_wrap_policy(plugin, model),
    }  # fmt: skip
    for policy in policies.values():
        assert [m for m in model.modules() if policy(m)] == blocks
    assert not isinstance(torch.nn.Linear(1, 1), found)
    fusedmlp.unpatch(model)
    assert all(isinstance(block, found) for block in blocks)


def test_a_patched_class_is_no_class_of_another_block():
    """Only instances of the model's own class pass for one."""
    llama, gemma = (build(name).model.layers[0].mlp for name in ("llama", "gemma"))
    fusedmlp.patch(llama)
    assert not isinstance(gemma, type(llama)) and not issubclass(type(gemma), type(llama))

    class Wrapped(type(llama)):
        """As FSDP2 makes one."""

    assert not isinstance(llama, Wrapped)


def expected(inputs):
    model = build("llama")
    out = model(**inputs)
    out.loss.backward()
    return out.logits.detach(), {k: p.grad for k, p in model.named_parameters()}


def assert_trains(model, inputs, logits, grads):
    out = model(**inputs)
    torch.testing.assert_close(out.logits, logits)
    out.loss.backward()
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, grads[name.removeprefix("module.")], msg=name)


def _data_parallel(rank, ranks):
    """Each rank has the same rows, so that mean gradients are those of one."""
    inputs = batch("llama")
    whole = expected(inputs)
    model, blocks = patched_in_part("llama", 0)
    found = get_module_class_from_name(model, "LlamaMLP")
    for module in [m for m in model.modules() if isinstance(m, found)]:
        fully_shard(module)
    fully_shard(model)
    assert all(isinstance(block, FSDPModule) for block in blocks)
    assert isinstance(blocks[0], Patched) and not isinstance(blocks[1], Patched)
    assert_trains(model, inputs, *whole)
    assert_trains(DistributedDataParallel(patched_in_part("llama", 1)[0]), inputs, *whole)


def _tensor_parallel(rank, ranks, folder):
    """By transformers' plan, which it applies as it loads: projections are called."""
    from transformers.distributed.configuration_utils import DistributedConfig

    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    inputs = batch("llama")
    whole = expected(inputs)
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=ranks)
    )
    report = fusedmlp.patch(model)
    assert [entry.op for entry in report.partly] == ["gated_act"] * 2
    assert "gate_proj has a forward of its own" in report.partly[0].detail
    assert_trains(model, inputs, *whole)


def _all(rank, ranks, folder):
    _data_parallel(rank, ranks)
    _tensor_parallel(rank, ranks, folder)


def test_every_way(tmp_path):
    build("llama").save_pretrained(tmp_path)
    spawn(2, functools.partial(_all, folder=tmp_path), timeout=120)
