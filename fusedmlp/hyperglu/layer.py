"""HyperGLU: attention without softmax, whose scores are mixed along the sequence by low-rank,
input-conditioned matrices before and after a gated relu.

| step | computes |
|---|---|
| controls, gates | c1, c2, gq, gv = phi(x W' + b), of the raw x |
| projections | q = (x Wq') gq; k = conv1(x) Wk'; v = conv2(x) Wv' |
| core | fusedmlp/reference/hyper.py |
| result | (core gv) Wc' |

| tensor | shape | |
|---|---|---|
| x, y | (B, T, D), T <= L | |
| attention_mask | (B, T), 1 keeps | multiplies k and v, nothing else |

Parameters have the names, shapes and initial values of the published code, so its checkpoints load.
Source: Lu and Yang, HyperMLP, arXiv 2602.12601, and its published code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import check
from ..backends import choice
from ..ops.hyper_attention import OP, hyper_attention
from ..ops.hyper_attention_step import OP as STEP, hyper_attention_step
from .cache import HyperGLUCache, empty_cache
from .checks import check_prompt, check_token, no_kernel, where, working_dtype
from .chunked import chunked_attention
from .config import HyperGLUConfig, Impl
from .parts import CausalConv, Mix, Mixing, parameters_of
from .rope import rope


class HyperGLU(nn.Module):
    """Causal sequence mixing without softmax: its scores are mixed along the sequence, too.

    With q, k, v and controls c1, c2 projected from x, gates gq and gv, and P1, P2 the two sub-heads
    of a head:

        P = mix1((q gq) k'),  A = softplus(P2) relu(P1),  y = ((mix2(A) v / |P1|) gv) Wc'

    A mixing adds a low-rank term whose parameters go by lag, p = L-1-(t-s):

        h[t, k] = sum_s X[t, s] u[p, k]
        mix(X)[t, s] = (1 + d[p]) X[t, s] + sum_k c[t, k] h[t, k] vt[k, p]

    | tensor | shape | |
    |---|---|---|
    | x, y | (B, T, D), T <= L | D = n_embd, L = block_size; one floating dtype, kept |
    | cache | `HyperGLUCache` | of L tokens, for `prefill` and `step` |

    Args:
        config: a `HyperGLUConfig`, which lists the options.

    `init_cache`, `prefill` and `step` decode one token at a time with the results of `forward`.
    Parameters have the names and shapes of the published code.

    Raises TypeError for another config; in a call ValueError or TypeError for an x of another shape
    or dtype, and RuntimeError for impl="fused" where no kernel runs. Source: Lu and Yang, HyperMLP,
    arXiv 2602.12601.

    Examples:
        >>> import torch
        >>> from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig
        >>> layer = HyperGLU(HyperGLUConfig(n_embd=64, n_head=2, block_size=32)).eval()
        >>> x = torch.randn(2, 8, 64)
        >>> y = layer(x)
        >>> prompt, cache = layer.prefill(x[:, :7])
        >>> token, cache = layer.step(x[:, 7], cache)
        >>> torch.allclose(token, y[:, 7], rtol=1e-3, atol=1e-4)
        True
    """

    def __init__(self, config: HyperGLUConfig) -> None:
        super().__init__()
        if not isinstance(config, HyperGLUConfig):
            raise TypeError(f"HyperGLU: config must be a HyperGLUConfig, got {config!r}")
        self.config = config
        D, H, L, Q = config.n_embd, config.n_head, config.block_size, config.sub_heads
        Rq, Rv, r1, r2 = config.qk_width, config.vo_width, config.op1_rank, config.op2_rank
        self.q = nn.Linear(D, Rq, config.bias)
        self.k = nn.Linear(D, Rq, config.bias)
        self.v = nn.Linear(D, Rv, config.bias)
        self.c_proj = nn.Linear(Rv, D, config.bias)
        self.left_gate = nn.Linear(D, Rq) if config.use_qk_gate else None
        self.right_gate = nn.Linear(D, Rv) if config.use_vo_gate else None
        self.control1 = nn.Linear(D, Q * r1) if config.use_op1 else None
        self.control2 = nn.Linear(D, H * r2) if config.use_op2 else None
        kernel = config.conv_kernel_size
        self.conv1 = CausalConv(D, kernel) if config.use_kv_conv else None
        self.conv2 = CausalConv(D, kernel) if config.use_kv_conv else None
        diag1, diag2 = config.op1_use_diag, config.op2_use_diag
        self.op = Mixing(Q, L, r1, diag1, config.op1_init_std) if config.use_op1 else None
        self.op2 = Mixing(H, L, r2, diag2, config.op2_init_std) if config.use_op2 else None

    def init_weights_(self) -> None:
        """Give every parameter its initial value again, or at last on a layer built on meta."""
        for module in reversed(list(self.modules())):  # what holds a Conv1d after the Conv1d
            if isinstance(module, nn.Linear | nn.Conv1d | Mix | CausalConv):
                module.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw U and Vt of both mixings again and nothing else, as the published layer's does; see
        `init_weights_` for all parameters."""
        for op in (self.op, self.op2):
            if op is not None:
                op.mix.reset_low_rank()

    @property
    def cfg(self) -> HyperGLUConfig:
        """`config` by its published name."""
        return self.config

    def path(self) -> str:
        """For explain(): which path `forward` and `prefill` take where the parameters are now."""
        impl, weight = self.config.impl_default, self.q.weight
        if impl == "dense":
            return "dense, in PyTorch: impl_default='dense'"
        if reason := self.config.not_fused():
            return f"chunked, in PyTorch: no kernel has {reason}"
        try:
            backend = choice.pick(OP, weight, "q")
        except (RuntimeError, TypeError) as error:
            return f"none: {error}"
        if backend != "reference":
            return f"fused, {OP} by {backend}"
        if impl == "fused":
            return f"none: {no_kernel(weight)}"
        return f"chunked, in PyTorch: no kernel runs {where(weight)}"

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.attn_kind}, n_embd={c.n_embd}, n_head={c.n_head}, block_size={c.block_size}"

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        impl: Impl | None = None,
        chunk_T: int | None = None,
    ) -> Tensor:
        """x (B, T, D) -> y (B, T, D). impl, chunk_T: in this call in place of the config's
        impl_default and chunk_T.

        Raises ValueError (shape, T > block_size, device, impl, chunk_T) or TypeError (type,
        dtype) naming the argument; RuntimeError for "fused" where no kernel runs.
        """
        check_prompt(self.config, self.q.weight.dtype, x, attention_mask)
        y, _, _ = self._forward(x, attention_mask, *self.config.for_call(impl, chunk_T))
        return y

    def init_cache(
        self,
        batch: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> HyperGLUCache:
        """An empty cache of block_size tokens for `step`; device and dtype default to the
        parameters', dtype to autocast's under it. ValueError where earlier results depend on later
        tokens."""
        if not self.config.prefix_consistent:
            raise ValueError(
                "HyperGLU: decoding needs results that later tokens leave alone: aligner_kind="
                "'offset' with do_masking and op1_do_masking (or without use_op1), got "
                f"{self.config}"
            )
        weight = self.q.weight
        return empty_cache(
            self.config, batch, dtype or working_dtype(weight), device or weight.device
        )

    def prefill(
        self, x: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, HyperGLUCache]:
        """y of a prompt x (B, T, D), and a cache that holds it. Raises as `forward` and
        `init_cache` do."""
        check_prompt(self.config, self.q.weight.dtype, x, attention_mask)
        cache = self.init_cache(x.shape[0], device=x.device, dtype=working_dtype(x))
        y, k, v = self._forward(x, attention_mask, *self.config.for_call())
        T = x.shape[1]
        with torch.no_grad():
            cache.k[:, :, :T], cache.v[:, :, :T] = k, v
            if keep := min(T, cache.x.shape[1]):
                cache.x[:, -keep:] = x[:, T - keep :]
            cache.length.fill_(T)
        return y, cache

    @torch.no_grad()
    def step(self, x: Tensor, cache: HyperGLUCache) -> tuple[Tensor, HyperGLUCache]:
        """y of the next token x, (B, D) or (B, 1, D), as the full forward would give it; the cache
        is written in place and returned. The host waits for nothing, so a CUDA graph of one step
        serves all. Its path is hyper_attention_step's; of impl_default only "fused" matters.

        Raises ValueError (shape, device) or TypeError (no tensor, no cache, dtype) and leaves the
        cache as it was; RuntimeError once it holds block_size tokens (on a GPU an assertion there),
        and for "fused" where no kernel runs."""
        c = self.config
        check_token(c, self.q.weight.dtype, x, cache)
        token = x[:, None] if x.dim() == 2 else x
        window = torch.cat((cache.x, token), 1)
        q, k, v, c1, c2 = self._project(token, window, cache.length)
        if c.impl_default == "fused" and choice.pick(STEP, q, "q") == "reference":
            raise RuntimeError(no_kernel(q))
        cache.append(window[:, 1:], k, v)
        c1, c2 = (None if c is None else c[:, :, 0] for c in (c1, c2))
        core = hyper_attention_step(
            q[:, :, 0], cache.k, cache.v, cache.length,
            c1, *parameters_of(self.op), c2, *parameters_of(self.op2), **self._options(),
        )  # fmt: skip
        cache.length += 1
        y = self._out(token, core[:, :, None])
        return y.view(x.shape), cache

    def flops(self, batch: int, T: int) -> int:
        """FLOPs of one forward: 2 for each multiply-add, scores and values of visible pairs only;
        training takes three times that."""
        c = self.config
        D, Rq, Rv = c.n_embd, c.qk_width, c.vo_width
        rank1, rank2 = (c.sub_heads * c.op1_rank * c.use_op1, c.n_head * c.op2_rank * c.use_op2)
        weights = D * (2 * Rq + Rv) + Rv * D + D * (rank1 + rank2)
        weights += D * (Rq * c.use_qk_gate + Rv * c.use_vo_gate)
        weights += 2 * c.conv_kernel_size * D * c.use_kv_conv
        sees_all = c.aligner_kind == "identity" and not c.do_masking
        pairs = T * T if sees_all else T * (T + 1) // 2
        return 2 * batch * (T * weights + pairs * (Rq + 2 * rank1 + 2 * rank2 + Rv))

    def _forward(
        self, x: Tensor, mask: Tensor | None, impl: Impl, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(y, k, v)."""
        padded = F.pad(x, (0, 0, self.config.conv_kernel_size - 1, 0))
        q, k, v, c1, c2 = self._project(x, padded, 0)
        if mask is not None:
            keep = mask.to(k.dtype)[:, None, :, None]
            k, v = k * keep, v * keep
        tensors = (q, k, v, c1, *parameters_of(self.op), c2, *parameters_of(self.op2))
        core = self._core(impl, chunk, *tensors)
        return self._out(x, core), k, v

    def _phi(self, layer: nn.Linear, x: Tensor) -> Tensor:
        z: Tensor = layer(x)
        return z.sigmoid() if self.config.gate_act == "sigmoid" else z

    def _project(self, x: Tensor, padded: Tensor, start: int | Tensor) -> tuple[Any, ...]:
        """q, k, v, c1, c2 as (B, heads, T, width). `padded` is x behind its K - 1 predecessors;
        `start` is x's first position."""
        c = self.config
        xk, xv = x, x
        if self.conv1 is not None and self.conv2 is not None:
            xk, xv = self.conv1(padded), self.conv2(padded)
        q, k = _heads(self.q(x), c.sub_heads), _heads(self.k(xk), c.sub_heads)
        if c.use_rope:
            q, k = (rope(t, c.rope_base, c.rope_kind, start) for t in (q, k))
        if self.left_gate is not None:
            q = q * _heads(self._phi(self.left_gate, x), c.sub_heads)
        c1 = None if self.control1 is None else _heads(self._phi(self.control1, x), c.sub_heads)
        c2 = None if self.control2 is None else _heads(self._phi(self.control2, x), c.n_head)
        return q, k, _heads(self.v(xv), c.n_head), c1, c2

    def _out(self, x: Tensor, core: Tensor) -> Tensor:
        merged = core.transpose(1, 2).flatten(2)
        if self.right_gate is not None:
            merged = merged * self._phi(self.right_gate, x)
        return self.c_proj(merged)

    def _options(self) -> dict[str, Any]:
        c = self.config
        return {
            "kind": c.attn_kind, "norm": c.attn_norm, "shortcut1": c.op1_shortcut,
            "shortcut2": c.op2_shortcut, "eps": c.norm_eps,
        }  # fmt: skip

    def _core(self, impl: Impl, chunk: int, *tensors: Tensor | None) -> Tensor:
        c, q, options = self.config, tensors[0], self._options()
        assert q is not None
        served = impl != "dense" and not c.not_fused()
        if served and choice.pick(OP, q, "q") != "reference":
            return hyper_attention(*tensors, **options)  # type: ignore[arg-type]
        if impl == "fused":
            raise RuntimeError(no_kernel(q))
        if dtype := check.autocast_dtype("HyperGLU", q):
            tensors = check.cast(dtype, *tensors)
        return chunked_attention(
            *tensors,  # type: ignore[arg-type]
            chunk=None if impl == "dense" else chunk,
            aligner=c.aligner_kind, causal=c.do_masking,
            mask1=c.op1_do_masking, mask2=c.op2_do_masking, **options,
        )  # fmt: skip


class HyperMLP(HyperGLU):
    """HyperGLU of the "relu" kind, A = relu(P1), with the settings of its paper: two heads, ranks
    of 16, queries and keys of D // 4, values of D.

    x and y are (B, T, n_embd), T <= block_size, of one floating dtype. Methods and errors are those
    of `HyperGLU`.

    Args:
        n_embd, n_head, block_size: as in `HyperGLUConfig`.
        options: further fields of it.

    Examples:
        >>> import torch
        >>> from fusedmlp.hyperglu import HyperMLP
        >>> HyperMLP(64, block_size=32)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    def __init__(
        self, n_embd: int, n_head: int = 2, block_size: int = 2048, **options: Any
    ) -> None:
        super().__init__(HyperGLUConfig(n_embd, n_head, block_size, attn_kind="relu", **options))


def _heads(t: Tensor, heads: int) -> Tensor:
    """(B, T, heads * width) as (B, heads, T, width), a view."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)
