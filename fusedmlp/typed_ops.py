"""The public ops for type checkers, which cannot read the rows; never imported when code runs. A
test compares it with the rows."""

from .ops.binary_gated_linear import binary_gated_linear as binary_gated_linear
from .ops.binary_gated_mlp import binary_gated_mlp as binary_gated_mlp
from .ops.binary_linear import binary_linear as binary_linear
from .ops.gated_act import gated_act as gated_act
from .ops.gated_linear import gated_linear as gated_linear
from .ops.gated_mlp import gated_mlp as gated_mlp
from .ops.hyper_attention import hyper_attention as hyper_attention
from .ops.hyper_attention_step import hyper_attention_step as hyper_attention_step
from .ops.linear_act import linear_act as linear_act
from .ops.masked_gated_linear import masked_gated_linear as masked_gated_linear
from .ops.masked_gated_mlp import masked_gated_mlp as masked_gated_mlp
from .ops.mlp import mlp as mlp
from .ops.moe_linear import moe_linear as moe_linear
from .ops.moe_mlp import moe_mlp as moe_mlp
from .ops.top1_route import route_to as route_to, top1_route as top1_route
from .ops.topk_route import topk_route as topk_route
from .weights.masks import pack_masks as pack_masks
