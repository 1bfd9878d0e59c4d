"""topk_route against the routers of transformers, each family's by its own class, with the
arguments that the table of docs/moe.md gives: indices, weights, and the gradient of the logits."""

import importlib
import inspect
import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedmlp import topk_route

pytest.importorskip("transformers")
T, E, K = 23, 12, 3
PAGE = (Path(__file__).parents[2] / "docs/moe.md").read_text()
TABLE = PAGE.partition("| families | arguments |")[2].partition("\n\n")[0]
# family -> the arguments, as the page has them
FAMILIES = {
    family: arguments.strip("`")
    for line in TABLE.splitlines()[2:]
    for families, arguments in [[cell.strip() for cell in line.strip("| ").split(" | ")]]
    for family in families.split(", ")
}
# What the page calls a model's own numbers, as CONFIG has them.
OWN = {"s": 2.5, "k": K, "n_group": 4, "topk_group": 2}
# What routers read: width E, so that with a weight of ones on the diagonal x is the logits.
CONFIG = types.SimpleNamespace(
    **dict.fromkeys(
        ("hidden_size", "hidden_dim", "num_experts", "num_local_experts", "n_routed_experts",
         "moe_num_experts"), E,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "top_k", "moe_topk", "top_k_experts", "moe_k"), K
    ),
    **dict.fromkeys(
        ("routed_scaling_factor", "router_scaling_factor", "route_scale", "moe_scale"), 2.5
    ),
    n_group=4, topk_group=2, topk_method="group_limited_greedy", norm_topk_prob=True,
    scoring_func="sigmoid", expert_selection_fn="sigmoid", use_expert_bias=True,
    moe_norm_min=1e-12, router_bias=False, zero_expert_num=0, rms_norm_eps=1e-6,
    moe_router_logit_softcapping=0.0, output_multiplier=1.0, moe_num_shared_experts=0,
)  # fmt: skip
CHANGED = {
    "deepseek_v4": {"scoring_func": "sqrtsoftplus"},
    **dict.fromkeys(("flex_olmo", "olmoe", "qwen2_moe", "qwen3_moe"), {"norm_topk_prob": False}),
}


def router_of(family):
    """Its router, with random weights, and the correction bias that it adds, if any."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = [
        kind
        for name, kind in vars(module).items()
        if re.search(r"(TopK|Topk|Choice|Text|4)Router$|MoEV1Gate$", name)
        and "topk(" in inspect.getsource(kind)
    ]
    config = types.SimpleNamespace(**{**vars(CONFIG), **CHANGED.get(family, {})})
    torch.manual_seed(0)
    router = found[-1](config)
    for name, p in (*router.named_parameters(), *router.named_buffers()):
        if p.shape == (E, E):
            p.data.copy_(torch.eye(E))
        elif "bias" in name and p.shape[-1] == E and name != "bias":
            p.data.normal_(std=0.2)
    return router


def own_bias(router):
    for name, p in (*router.named_parameters(), *router.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            return p.detach().flatten()
    return torch.linspace(-0.3, 0.3, E)


def logits_of(router, call):
    """What the router's product gave, and what it returned."""
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, i, out: seen.append(out))
        for m in router.modules()
        if isinstance(m, nn.Linear) and m is not router
    ]
    returned = call()
    for hook in hooks:
        hook.remove()
    return seen, returned


def in_order(expert, *others):
    order = expert.argsort(1)
    return [t.gather(1, order) for t in (expert, *others)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_router(family, device, each_backend):
    router = router_of(family).to(device)
    bias = own_bias(router).to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, E, generator=generator).to(device).requires_grad_()
    takes = list(inspect.signature(router.forward).parameters)
    given = [x[None] if family == "afmoe" else x, *([bias] if len(takes) > 1 else ())]
    seen, returned = logits_of(router, lambda: router(*given))
    logits = seen[0] if seen else x
    options = eval(f"dict({FAMILIES[family]})", {**OWN, "bias_of_the_model": bias})
    ours = topk_route(logits, K, **options)
    if family == "llama4":
        weight = returned[0].gather(1, ours.expert)
        assert returned[0].count_nonzero() == T * K
        expert = ours.expert
    else:
        (expert,) = [t for t in returned if t.dtype == torch.int64]
        weight = next(t for t in returned if t.shape == (T, K) and t.is_floating_point())
    expert, weight = in_order(expert, weight)
    mine, prob = in_order(ours.expert, ours.prob)
    assert torch.equal(mine, expert)
    torch.testing.assert_close(prob, weight, rtol=2e-6, atol=2e-7)
    dy = torch.randn(T, K, generator=generator).to(device)
    grads = [torch.autograd.grad(w, logits, dy, retain_graph=True)[0] for w in (prob, weight)]
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-6)
