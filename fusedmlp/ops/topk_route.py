"""Each token to k experts, with weights made of its router's scores; choices grouped by expert.

| tensor | shape | dtype | |
|---|---|---|---|
| logits z | (..., E) | floating | flattened to (T, E) |
| bias | (E,) | floating | added to what is compared, without gradient |
| Routing | | | fields in `fusedmlp.Routing` |

| step | |
|---|---|
| scores | s = softmax(z), sigmoid(z) or sqrt(softplus(z)) |
| compared | v = s + bias, or z + bias |
| groups | the experts in so many groups, in their order; the topk_group best by the sum of their two largest v, or by their largest, take part |
| choice | the k largest v, by falling v |
| weights | w = scale s of those, with norm over max(sum s, least) + eps of those |
| mean_prob | the mean of s / sum s over all experts |

Computed in float32 (float64 for float64 logits); prob has the dtype of the logits. A tie goes to the
lowest index. Without a bias the logits themselves are compared, whose order is that of the scores.
NaN counts as the largest. With capacity, as in top1_route: an expert takes the first c of its
choices, in the order of tokens. Two launches, no sort, no synchronisation with the host.

Saved for backward: logits, bias and expert; one launch makes dlogits from the gradients of prob,
mean_prob and log_sum_exp.

Sources: the routers of transformers 5.24, by family in docs/moe.md; groups and bias: DeepSeek-V2,
arXiv 2405.04434, and DeepSeek-V3, arXiv 2412.19437; the bias's update: arXiv 2408.15664.
"""  # noqa: E501

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.derivatives import differentiable, save
from ..backends.flops import no_products
from ..backends.op import Op, kernel, register
from ..check.numbers import finite
from ..kernels.launches import moe as launches
from ..kernels.moe import topk_route as _triton
from ..kernels.moe.topk_route import Choice, Form
from ..packing import rows
from ..reference import Routing
from ..reference.moe import Compared, GroupScore, Score
from .top1_route import check_capacity, check_logits

OP = "topk_route"


def _fwd_fake(
    logits: Tensor, bias: Tensor | None, k: int, capacity: int | None, *options: Any
) -> tuple[Tensor, ...]:
    return _triton.empty_routing(logits, k)


def _bwd_fake(
    logits: Tensor,
    expert: Tensor,
    dprob: Tensor | None,
    dmean: Tensor | None,
    dlse: Tensor | None,
    *form: Any,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _fwd(
    logits: Tensor, bias: Tensor | None, k: int, capacity: int | None, *options: Any
) -> tuple[Tensor, ...]:
    form, chosen = Form(*options[: len(Form._fields)]), Choice(*options[len(Form._fields) :])
    return _triton.topk_route_fwd(logits, bias, k, capacity, form, chosen)


def _bwd(
    logits: Tensor,
    expert: Tensor,
    dprob: Tensor | None,
    dmean: Tensor | None,
    dlse: Tensor | None,
    *form: Any,
) -> Tensor:
    return _triton.topk_route_bwd(logits, expert, dprob, dmean, dlse, Form(*form))


_FORM = "str score, bool norm, float eps, float least, float scale"
# logits (T, E) -> expert, prob (T, k), tokens, rows, offsets, counts, mean_prob, log_sum_exp
fwd = library.define(
    "topk_route_fwd(Tensor logits, Tensor? bias, SymInt k, SymInt? capacity, "
    f"{_FORM}, str compared, int groups, int topk_group, str group_score) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    flops=no_products,
    launches=(launches.TOPK,),
)
bwd = library.define(
    "topk_route_bwd(Tensor logits, Tensor expert, Tensor? dprob, Tensor? dmean, Tensor? dlse, "
    f"{_FORM}) -> Tensor",
    _bwd,
    _bwd_fake,
    flops=no_products,
    launches=(launches.TOPK_BWD,),
)


def _formula(
    logits: Tensor, bias: Tensor | None, k: int, capacity: int | None, form: Form, chosen: Choice
) -> Routing:
    return reference.topk_route(
        logits, k, **form._asdict(), **chosen._asdict(), bias=bias, capacity=capacity
    )


class TopKRouteFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        k: int,
        capacity: int | None,
        form: Form,
        chosen: Choice,
    ) -> tuple[Tensor, ...]:
        expert, prob, *groups, mean, lse = fwd(logits, bias, k, capacity, *form, *chosen)
        save(ctx, (logits, bias), (k, capacity, form, chosen), expert)
        ctx.set_materialize_grads(False)
        return expert, prob, *groups, mean, lse

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, _, expert = ctx.saved_tensors
        form = ctx.options[2]
        dlogits = bwd(logits, expert, grads[1], grads[6], grads[7], *form)
        return dlogits, None, None, None, None, None


def _check_count(op: str, name: str, value: object, most: int, of: str) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if not 1 <= value <= most:
        raise ValueError(f"{op}: {name} must be from 1 to {most}, {of}, got {value}")


def _check_form(op: str, form: Form, chosen: Choice) -> None:
    named = (
        ("score", form.score, Score),
        ("compared", chosen.compared, Compared),
        ("group_score", chosen.group_score, GroupScore),
    )
    for name, value, known in named:
        if value not in get_args(known):
            names = ", ".join(map(repr, get_args(known)))
            raise ValueError(f"{op}: {name} must be one of {names}, got {value!r}")
    if not isinstance(form.norm, bool):
        raise TypeError(f"{op}: norm must be True or False, got {form.norm!r}")
    for name in ("eps", "least", "scale"):
        finite(op, name, getattr(form, name))
    for name in ("eps", "least"):
        if getattr(form, name) < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {getattr(form, name)}")


def _check_bias(bias: Tensor | None, logits: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{OP}: bias must be None or a Tensor, got {type(bias).__name__}")
    if not bias.dtype.is_floating_point:
        raise TypeError(f"{OP}: bias must have a floating dtype, got {bias.dtype}")
    check.shape(OP, "bias", bias, logits.shape[-1])
    if bias.device != logits.device:
        raise ValueError(f"{OP}: bias must be on logits' device {logits.device}, got {bias.device}")
    if check.wants_grad(bias):
        raise ValueError(
            f"{OP}: bias must not require a gradient, which a choice does not give, got one that "
            "does; pass bias.detach()"
        )


def _check_groups(
    op: str, E: int, k: int, groups: int | None, topk_group: int | None, how: str
) -> None:
    if (groups is None) != (topk_group is None):
        raise ValueError(
            f"{op}: groups and topk_group must be both given or both None, got groups={groups} "
            f"and topk_group={topk_group}"
        )
    if groups is None:
        return
    _check_count(op, "groups", groups, E, "the number of experts")
    _check_count(op, "topk_group", topk_group, groups, "the number of groups")
    assert topk_group is not None
    if E % groups:
        raise ValueError(f"{op}: groups must divide the {E} experts, got {groups}")
    size = E // groups
    if size == 1 and how == "top2":
        raise ValueError(
            f"{op}: groups must hold at least 2 experts each for group_score 'top2', got {groups} "
            f"groups of {E} experts"
        )
    if topk_group * size < k:
        raise ValueError(
            f"{op}: topk_group must leave at least k = {k} experts, got {topk_group} groups of "
            f"{size}"
        )


def check_options(
    op: str,
    E: int,
    k: int,
    *,
    score: Score,
    norm: bool,
    eps: float,
    least: float,
    scale: float,
    compared: Compared,
    groups: int | None,
    topk_group: int | None,
    group_score: GroupScore,
) -> tuple[Form, Choice]:
    """The options of topk_route for E experts. A layer asks when it is made."""
    _check_count(op, "k", k, E, "the number of experts")
    form = Form(score, norm, eps, least, scale)
    _check_form(op, form, Choice(compared, group_score=group_score))
    _check_groups(op, E, k, groups, topk_group, group_score)
    return form, Choice(compared, groups or 1, topk_group or 1, group_score)


def topk_route(
    logits: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    norm: bool = True,
    eps: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
    capacity: int | None = None,
    bias: Tensor | None = None,
    compared: Compared = "score",
    groups: int | None = None,
    topk_group: int | None = None,
    group_score: GroupScore = "top2",
) -> Routing:
    """Each token to the k experts that its router scores highest.

    Args:
        logits: (..., E), any strides; E at least 1.
        k: experts a token, from 1 to E.
        score: of an expert: "softmax" over all, "sigmoid", or "sqrtsoftplus", the root of softplus.
        norm: divide the chosen scores by their sum, to which eps is added and which is least at
            least. Of a softmax that is the softmax of the chosen logits.
        scale: what the weights are multiplied by at last.
        capacity: the most choices that an expert takes, or None for no limit. Later ones are
            dropped: they add nothing in moe_mlp.
        bias: (E,), added to the scores for the choice but not in the weights; None for none. It has
            no gradient; see `update_router_bias`.
        compared: what the choice compares, with the bias added: "score" or "logits".
        groups, topk_group: choose among the experts of the best topk_group of so many groups of
            neighbours; None for no groups.
        group_score: of a group: the sum of its two largest, "top2", or the largest, "max".

    Returns a `Routing` over the flattened tokens whose expert and prob are (T, k), the best choice
    first; prob, mean_prob and log_sum_exp carry gradients.

    Raises ValueError (shape, a number out of range, a name, groups that do not fit) or TypeError
    (dtype, kind), naming the argument.

    logits have any floating dtype; scores are float32. Sources: DeepSeek-V2, arXiv 2405.04434;
    DeepSeek-V3, arXiv 2412.19437. The arguments that make a model's router: docs/moe.md.

    Examples:
        >>> import torch
        >>> from fusedmlp import topk_route
        >>> logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 3.0]])  # 2 tokens, 3 experts
        >>> routing = topk_route(logits, 2)
        >>> routing.expert.tolist(), routing.counts.tolist()
        ([[1, 2], [2, 0]], [1, 1, 2])
        >>> torch.allclose(routing.prob.sum(1), torch.ones(2))
        True
        >>> bias = torch.tensor([9.0, 0.0, 0.0])  # expert 0 is chosen, whatever its score
        >>> topk_route(logits, 2, score="sigmoid", bias=bias).expert.tolist()
        [[0, 1], [0, 2]]
    """
    check_logits(OP, logits)
    form, chosen = check_options(
        OP, logits.shape[-1], k, score=score, norm=norm, eps=eps, least=least, scale=scale,
        compared=compared, groups=groups, topk_group=topk_group, group_score=group_score,
    )  # fmt: skip
    _check_bias(bias, logits)
    check_capacity(OP, capacity)
    flat = rows(logits)
    if choice.pick(OP, logits, "logits") == "reference":
        return _formula(flat, bias, k, capacity, form, chosen)
    if check.wants_grad(logits):
        return Routing(*TopKRouteFunction.apply(flat, bias, k, capacity, form, chosen))
    return Routing(*fwd(flat, bias, k, capacity, *form, *chosen))


def update_router_bias(bias: Tensor, counts: Tensor, *, rate: float = 0.001) -> Tensor:
    """bias += rate * sign(mean load - load), in place: balance without a loss.

    Args:
        bias: (E,) floating, what topk_route adds to the scores.
        counts: (E,), each expert's load since the last update: `Routing.counts`, summed over
            micro-batches and ranks where there are several.
        rate: how far an expert's bias moves.

    Returns bias. Experts with fewer choices than the mean are chosen more often from then on.

    Raises ValueError (shape, device, rate) or TypeError (dtype, kind), naming the argument.

    Source: Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv
    2408.15664, whose rate the default is.

    Examples:
        >>> import torch
        >>> from fusedmlp import update_router_bias
        >>> update_router_bias(torch.zeros(3), torch.tensor([4, 1, 1]), rate=0.5)
        tensor([-0.5000,  0.5000,  0.5000])
    """
    op = "update_router_bias"
    for name, t in (("bias", bias), ("counts", counts)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if not bias.dtype.is_floating_point or bias.dim() != 1:
        raise (ValueError if bias.dtype.is_floating_point else TypeError)(
            f"{op}: bias must be (E,) with a floating dtype, got {tuple(bias.shape)} {bias.dtype}"
        )
    check.shape(op, "counts", counts, *bias.shape)
    if counts.device != bias.device:
        raise ValueError(
            f"{op}: counts must be on bias's device {bias.device}, got {counts.device}"
        )
    finite(op, "rate", rate)
    if rate < 0:
        raise ValueError(f"{op}: rate must be at least 0, got {rate}")
    load = counts.double()
    with torch.no_grad():
        return bias.add_((load.mean() - load).sign().to(bias.dtype), alpha=rate)


register(
    Op(
        OP,
        topk_route,
        reference.topk_route,
        forward=(kernel(fwd),),
        backward=(kernel(bwd),),
        flops=lambda shapes: 5 * math.prod(shapes["logits"]),
        counted=no_products,
    )
)
