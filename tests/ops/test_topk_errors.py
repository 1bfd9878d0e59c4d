"""Bad input to topk_route, to what takes k choices a token, and to update_router_bias: one clear
error each."""

import pytest
import torch

from fusedmlp import moe_linear, moe_mlp, route_to, topk_route, update_router_bias

NAN = float("nan")
Z, BIAS = torch.zeros(3, 8), torch.zeros(8)
INT = torch.zeros(4, 2, dtype=torch.int64)
TWO = route_to(INT, torch.ones(4, 2), 3)
STACK, X = torch.ones(3, 5, 6), torch.ones(4, 6)
DOWN = torch.ones(3, 6, 5)
EIGHT = "1 to 8, the number of experts"
BAD = [
    (lambda: topk_route([1.0], 1), TypeError, "topk_route: logits must be a Tensor, got list"),
    (lambda: topk_route(INT, 1), TypeError, "topk_route: logits must have a floating dtype, got torch.int64"),
    (lambda: topk_route(torch.zeros(()), 1), ValueError, r"topk_route: logits must be \(\.\.\., E\), E at least 1, got \(\)"),
    (lambda: topk_route(Z, 9), ValueError, f"topk_route: k must be from {EIGHT}, got 9"),
    (lambda: topk_route(Z, 0), ValueError, f"topk_route: k must be from {EIGHT}, got 0"),
    (lambda: topk_route(Z, 2.0), TypeError, "topk_route: k must be an int, got 2.0"),
    (lambda: topk_route(Z, True), TypeError, "topk_route: k must be an int, got True"),
    (lambda: topk_route(Z, 2, score="relu"), ValueError, "topk_route: score must be one of 'softmax', 'sigmoid', 'sqrtsoftplus', got 'relu'"),
    (lambda: topk_route(Z, 2, compared="prob"), ValueError, "topk_route: compared must be one of 'score', 'logits', got 'prob'"),
    (lambda: topk_route(Z, 2, group_score="mean"), ValueError, "topk_route: group_score must be one of 'top2', 'max', got 'mean'"),
    (lambda: topk_route(Z, 2, norm="sum"), TypeError, "topk_route: norm must be True or False, got 'sum'"),
    (lambda: topk_route(Z, 2, eps=-1.0), ValueError, r"topk_route: eps must be at least 0, got -1\.0"),
    (lambda: topk_route(Z, 2, least=NAN), ValueError, "topk_route: least must be finite, got nan"),
    (lambda: topk_route(Z, 2, scale="2"), TypeError, "topk_route: scale must be a number, got '2'"),
    (lambda: topk_route(Z, 2, capacity=0), ValueError, "topk_route: capacity must be None or at least 1, got 0"),
    (lambda: topk_route(Z, 2, bias=1.0), TypeError, "topk_route: bias must be None or a Tensor, got float"),
    (lambda: topk_route(Z, 2, bias=torch.zeros(7)), ValueError, r"topk_route: bias must have shape \(8,\), got \(7,\)"),
    (lambda: topk_route(Z, 2, bias=BIAS.long()), TypeError, "topk_route: bias must have a floating dtype, got torch.int64"),
    (lambda: topk_route(Z, 2, bias=BIAS.to("meta")), ValueError, "topk_route: bias must be on logits' device cpu, got meta"),
    (lambda: topk_route(Z, 2, bias=BIAS.clone().requires_grad_()), ValueError, r"topk_route: bias must not require a gradient.*; pass bias.detach\(\)"),
    (lambda: topk_route(Z, 2, groups=4), ValueError, "topk_route: groups and topk_group must be both given or both None, got groups=4 and topk_group=None"),
    (lambda: topk_route(Z, 2, groups=3, topk_group=1), ValueError, "topk_route: groups must divide the 8 experts, got 3"),
    (lambda: topk_route(Z, 2, groups=9, topk_group=1), ValueError, f"topk_route: groups must be from {EIGHT}, got 9"),
    (lambda: topk_route(Z, 2, groups=4, topk_group=5), ValueError, "topk_route: topk_group must be from 1 to 4, the number of groups, got 5"),
    (lambda: topk_route(Z, 3, groups=4, topk_group=1), ValueError, "topk_route: topk_group must leave at least k = 3 experts, got 1 groups of 2"),
    (lambda: topk_route(Z, 2, groups=8, topk_group=4), ValueError, "topk_route: groups must hold at least 2 experts each for group_score 'top2', got 8 groups of 8 experts"),
    (lambda: route_to(INT.view(2, 2, 2), torch.ones(2, 2, 2), 3), ValueError, r"route_to: expert must be \(T,\) or \(T, k\), k at least 1, got \(2, 2, 2\); flatten"),
    (lambda: route_to(INT[:, :0], torch.ones(4, 0), 3), ValueError, r"route_to: expert must be \(T,\) or \(T, k\), k at least 1, got \(4, 0\)"),
    (lambda: route_to(INT, torch.ones(4, 3), 3), ValueError, r"route_to: prob must have shape \(4, 2\), got \(4, 3\)"),
    (lambda: moe_mlp(X, TWO._replace(prob=torch.ones(4, 3)), STACK, STACK, DOWN), ValueError, r"moe_mlp: routing.prob must have shape \(4, 2\) for x's 4 tokens .*, got \(4, 3\)"),
    (lambda: moe_mlp(X, TWO._replace(prob=torch.ones(4)), STACK, STACK, DOWN), ValueError, r"moe_mlp: routing.prob must have shape \(4, 2\) .*, got \(4,\)"),
    (lambda: moe_mlp(X.repeat(2, 1), TWO, STACK, STACK, DOWN), ValueError, r"moe_mlp: routing.expert must have shape \(8, 2\) for x's 8 tokens .*, got \(4, 2\)"),
    (lambda: moe_mlp(X, TWO._replace(tokens=TWO.tokens[:4]), STACK, STACK, DOWN), ValueError, r"moe_mlp: routing.tokens must have shape \(8,\) .*, got \(4,\)"),
    (lambda: moe_linear(X, TWO, STACK[:0]), ValueError, r"moe_linear: w must be \(E, N, K\), E at least 1, got \(0, 5, 6\)"),
    (lambda: moe_linear(X, TWO, STACK), ValueError, "moe_linear: routing must give each token one expert, k = 1, got k = 2"),
    (lambda: update_router_bias(1.0, BIAS), TypeError, "update_router_bias: bias must be a Tensor, got float"),
    (lambda: update_router_bias(Z, BIAS), ValueError, r"update_router_bias: bias must be \(E,\) with a floating dtype, got \(3, 8\)"),
    (lambda: update_router_bias(BIAS.long(), BIAS), TypeError, r"update_router_bias: bias must be \(E,\) with a floating dtype, got \(8,\) torch.int64"),
    (lambda: update_router_bias(BIAS, torch.zeros(7)), ValueError, r"update_router_bias: counts must have shape \(8,\), got \(7,\)"),
    (lambda: update_router_bias(BIAS, BIAS.to("meta")), ValueError, "update_router_bias: counts must be on bias's device cpu, got meta"),
    (lambda: update_router_bias(BIAS, BIAS, rate=NAN), ValueError, "update_router_bias: rate must be finite, got nan"),
    (lambda: update_router_bias(BIAS, BIAS, rate=-1.0), ValueError, r"update_router_bias: rate must be at least 0, got -1\.0"),
]  # fmt: skip


def test_what_is_small_but_not_refused(each_backend):
    """Groups of one expert where the largest counts, and no columns of a result."""
    assert topk_route(Z, 2, groups=8, topk_group=4, group_score="max").expert.shape == (3, 2)
    one = route_to(INT[:, 0], torch.ones(4), 3)
    assert moe_linear(X, one, STACK[:, :0]).shape == (4, 0)


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_one_clear_error(call, error, message, each_backend):
    with pytest.raises(error, match=f"^{message}"):
        call()
