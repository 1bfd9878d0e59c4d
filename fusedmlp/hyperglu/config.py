"""Every option of HyperGLU, with its default and its check."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_type_hints

from ..reference.hyper import Aligner, Kind, Norm

Impl = Literal["dense", "chunked", "fused"]

_POSITIVE = ("n_embd", "n_head", "block_size", "n_layer", "op1_rank", "op2_rank", "chunk_T",
             "conv_kernel_size")  # fmt: skip


@dataclass(frozen=True)
class HyperGLUConfig:
    """Options of `HyperGLU`; D = n_embd, H = n_head, L = block_size.

    attn_kind: "glu" has Q = 2H sub-heads, routing and magnitude, and A = softplus(P2) relu(P1);
        "relu" has Q = H and A = relu(P1).
    attn_norm: "out_scale" divides the result's row by |P1|, "l2" P1 itself: equal but for rounding.
    qk_rank, vo_rank: width of queries and keys together (None becomes D // 4) and of values (None
        becomes D). The attributes say what they became.
    do_masking, aligner_kind: see fusedmlp/reference/hyper.py. "offset" is causal in any case.
    use_kv_conv: depthwise causal convolutions of x in front of keys and values.
    use_rope: turn q and k by position. rope_kind "official" is what published checkpoints were
        trained with: the two members of a pair turn by different angles, so it is no rotation;
        "rotary" is one.
    gate_act: of both gates and both controls.
    use_qk_gate, use_vo_gate: multiply queries, and the result, by gates made from x.
    opN_*: the mixings before and after the nonlinearity. opN_per_head must be True.
    impl_default: "dense", "chunked" (query blocks of chunk_T rows, recomputed for backward; on a
        GPU the fused kernels where they serve the options) or "fused" (those kernels or an error:
        ValueError here where they do not serve the options, RuntimeError of a call on CPU tensors).
    norm_eps: least |P1| that is divided by, in float32.
    n_layer, aligner_impl_train, aligner_impl_eval: kept for published configurations, unused.

    Raises TypeError or ValueError naming the field.

    Examples:
        >>> from fusedmlp import HyperGLUConfig
        >>> HyperGLUConfig(n_embd=64, n_head=2, block_size=128).sub_heads
        4
    """

    n_embd: int
    n_head: int
    block_size: int = 2048
    bias: bool = False
    attn_kind: Kind = "glu"
    attn_norm: Norm = "out_scale"
    qk_rank: int | None = None
    vo_rank: int | None = None
    do_masking: bool = True
    aligner_kind: Aligner = "offset"
    use_kv_conv: bool = True
    conv_kernel_size: int = 4
    use_rope: bool = False
    rope_base: float = 10000.0
    rope_kind: Literal["official", "rotary"] = "official"
    gate_act: Literal["sigmoid", "none"] = "sigmoid"
    use_qk_gate: bool = True
    use_vo_gate: bool = True
    use_op1: bool = True
    op1_rank: int = 16
    op1_per_head: bool = True
    op1_use_diag: bool = True
    op1_shortcut: bool = True
    op1_do_masking: bool = True
    op1_init_std: float = 0.02
    use_op2: bool = True
    op2_rank: int = 16
    op2_per_head: bool = True
    op2_use_diag: bool = True
    op2_shortcut: bool = True
    op2_do_masking: bool = True
    op2_init_std: float = 0.02
    impl_default: Impl = "chunked"
    chunk_T: int = 1024
    norm_eps: float = 1e-12
    n_layer: int = 24
    aligner_impl_train: Literal["padview"] = "padview"
    aligner_impl_eval: Literal["padview"] = "padview"

    @property
    def sub_heads(self) -> int:
        """Q."""
        return 2 * self.n_head if self.attn_kind == "glu" else self.n_head

    @property
    def qk_width(self) -> int:
        return cast(int, self.qk_rank)

    @property
    def vo_width(self) -> int:
        return cast(int, self.vo_rank)

    def __post_init__(self) -> None:
        self._check_types()
        # As published configurations do, so that what is shown and saved is what was made.
        derived = {}
        for name, formula, width in (
            ("qk_rank", "n_embd // 4", self.n_embd // 4), ("vo_rank", "n_embd", self.n_embd),
        ):  # fmt: skip
            if getattr(self, name) is None:
                object.__setattr__(self, name, width)
                derived[name] = f"{formula} = "
        for name in _POSITIVE:
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("norm_eps", "rope_base"):
            self._require(0 < getattr(self, name) < math.inf, name, "above 0 and finite")
        for name in ("op1_init_std", "op2_init_std"):
            self._require(0 <= getattr(self, name) < math.inf, name, "at least 0 and finite")
        for name in ("op1_per_head", "op2_per_head"):
            self._require(getattr(self, name), name, "True: there is no other mixing")
        heads, what = (self.sub_heads, "2 n_head" if self.attn_kind == "glu" else "n_head")
        for name, width, parts, of in (
            ("qk_rank", self.qk_width, heads, what),
            ("vo_rank", self.vo_width, self.n_head, "n_head"),
        ):
            if width < 1 or width % parts:
                raise ValueError(
                    f"HyperGLUConfig: {name} must be a positive multiple of {of} = {parts}, "
                    f"got {derived.get(name, '')}{width}"
                    + (f": give {name}" if name in derived else "")
                )
        if self.use_rope:
            dq = self.qk_width // heads
            self._require(dq % 2 == 0, "qk_rank", f"an even multiple of {heads} with use_rope")
        if not self.do_masking and self.aligner_kind == "offset":
            warnings.warn(
                "HyperGLUConfig: do_masking=False with aligner_kind='offset' is causal all the "
                "same, and depends on the length; for a bidirectional layer use 'identity'",
                stacklevel=3,
            )
        if self.do_masking and self.aligner_kind == "identity" and (last := self._unmasked_last()):
            warnings.warn(
                f"HyperGLUConfig: {last}=False with aligner_kind='identity' lets results see later "
                "tokens, do_masking=True all the same; for a causal layer use True, or 'offset'",
                stacklevel=3,
            )
        self._check_impl("HyperGLUConfig: impl_default", self.impl_default)

    def _unmasked_last(self) -> str | None:
        """The switch that unmasks the last mixing, behind which nothing masks values again."""
        for use, masked, name in (
            (self.use_op2, self.op2_do_masking, "op2_do_masking"),
            (self.use_op1, self.op1_do_masking, "op1_do_masking"),
        ):
            if use:
                return None if masked else name
        return None

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if choices := [c for c in get_args(hint) if isinstance(c, str)]:
                self._require(value in choices, field.name, f"one of {', '.join(choices)}")
                continue
            wanted = get_args(hint) or ((int, float) if hint is float else (hint,))
            good = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
            if not good:
                names = " or ".join("None" if w is type(None) else w.__name__ for w in wanted)
                raise TypeError(f"HyperGLUConfig: {field.name} must be {names}, got {value!r}")

    def _require(self, good: Any, name: str, what: str) -> None:
        if not good:
            raise ValueError(f"HyperGLUConfig: {name} must be {what}, got {getattr(self, name)!r}")

    def _check_impl(self, name: str, impl: object) -> None:
        if impl not in get_args(Impl):
            raise ValueError(f"{name} must be one of {', '.join(get_args(Impl))}, got {impl!r}")
        if impl == "fused" and (reason := self.not_fused()):
            raise ValueError(f"{name} must not be 'fused' with {reason}")

    def for_call(self, impl: Impl | None = None, chunk_T: int | None = None) -> tuple[Impl, int]:
        """impl_default and chunk_T, or what a call to the layer gives in their place. Raises
        TypeError or ValueError naming the argument."""
        if impl is not None:
            self._check_impl("HyperGLU: impl", impl)
        if chunk_T is not None:
            if not isinstance(chunk_T, int) or isinstance(chunk_T, bool):
                raise TypeError(f"HyperGLU: chunk_T must be int or None, got {chunk_T!r}")
            if chunk_T < 1:
                raise ValueError(f"HyperGLU: chunk_T must be at least 1, got {chunk_T}")
        return impl or self.impl_default, chunk_T or self.chunk_T

    def not_fused(self) -> str | None:
        """Which option the fused kernels do not serve; None if they serve all."""
        if self.aligner_kind != "offset":
            return "aligner_kind='identity'"
        if not self.prefix_consistent:
            name = "op1_do_masking" if self.do_masking else "do_masking"
            return f"{name}=False and use_op1=True"
        return None

    @property
    def prefix_consistent(self) -> bool:
        """Whether a longer input leaves earlier results as they were, as decoding needs."""
        if self.aligner_kind == "offset":
            return not self.use_op1 or (self.do_masking and self.op1_do_masking)
        return self.do_masking and not (self.use_op1 or self.use_op2)
