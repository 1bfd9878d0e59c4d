"""patch(model): the MLPs of a loaded model run through fusedmlp; nothing else about it changes.

A patched module stays the object it was; only its class is replaced, by a subclass of its own class
whose forward is one fused call (`swap.py`). So parameters, state_dict keys, hooks, device and dtype
are untouched, `isinstance` and class names still hold for whatever wraps modules by their type, and
pickle and deepcopy work. The other ways were not taken: a new module in its place would lose
identity and hooks of the module; a `forward` on the instance is lost to whoever replaces it there
too, and cannot be pickled.

| file | says |
|---|---|
| `patch.py` | patch, unpatch, patched, register_patch: which module, and why not |
| `find.py` | a dense MLP in a module's forward: all of it, or a run of its statements |
| `match.py`, `flow.py` | one by the data flow of a traced method, whatever its names are |
| `spelling.py`, `activation.py` | what stands between its projections, by its values |
| `trace.py` | a method as a graph, the module left as it was |
| `names.py`, `compiled.py` | runs of statements, and a method with one cut out |
| `projection.py`, `around.py` | which projections are read, and which are called |
| `lora.py` | PEFT's LoRA layers as adapters of a fused call |
| `routed.py` | which of a router's tensors a block of experts uses for what |
| `steps.py` | dropout, norms and sums that a plan takes before, in and behind the fused call |
| `kept.py` | what a fused call passes by, and whether it is still there |
| `dense.py`, `moe.py` | the fused forward of a dense MLP, of a mixture of experts |
| `experts.py` | experts of transformers, by its table of implementations and by patch() |
| `form.py` | how experts lie and what they compute |
| `router.py`, `route.py` | a router beside experts as topk_route, and by which arguments |
| `gate.py` | which gate a function of gate and up is, by its values |
| `report.py` | what was patched, and what was left and why |
| `quantize.py`, `one_bit.py` | quantize_model, and which MLPs it takes |
| `lora_experts.py` | PEFT's adapters of stacked experts, without its merged weights |
| `one_bit_lora.py` | PEFT's LoRA around one-bit layers |
| `pretrained.py` | one-bit models by save_pretrained and from_pretrained |
"""

from .experts import experts_forward, register_experts
from .patch import patch, patched, register_patch, unpatch
from .plan import Plan
from .report import Entry, Report

__all__ = [
    "Entry",
    "Plan",
    "Report",
    "experts_forward",
    "patch",
    "patched",
    "register_experts",
    "register_patch",
    "unpatch",
]
