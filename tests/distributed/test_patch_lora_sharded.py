"""Patched LoRA layers of PEFT under FSDP2, two ranks over gloo, against one process."""

import torch
from patch_lora import adapted
from patch_models import batch
from ranks import spawn
from torch.distributed.fsdp import fully_shard

ROWS = 4


def trained(model, rows):
    """Logits, and the gradients of A and B."""
    inputs = {key: t[rows] for key, t in batch("llama", rows=ROWS).items()}
    out = model(**inputs)
    out.logits.square().mean().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    return out.logits.detach(), grads


def _fsdp2(rank, ranks):
    """Base weights are frozen, and sharded as A and B are; adapters are switched off thereafter."""
    logits, grads = trained(adapted(dtype=torch.float64), slice(None))
    model = adapted(patched="after", dtype=torch.float64)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    out, own = trained(model, mine)
    torch.testing.assert_close(out, logits[mine])
    assert own.keys() == grads.keys()
    for key, grad in own.items():
        torch.testing.assert_close(grad.full_tensor(), grads[key], msg=key)
    plain = adapted(dtype=torch.float64)
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        inputs = batch("llama", rows=ROWS)
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


def test_fsdp2():
    spawn(2, _fsdp2, timeout=120)
