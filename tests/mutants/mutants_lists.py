"""Faults that somebody thought of, and mutants that change nothing.

A fault of FAULTS once went by the tests, or is of such a kind. `old` stands in the file exactly
once. A row of EQUIVALENT is a line of a mutant before and after, without its margin, and the reason
why no test can tell the two apart; where a file has the line twice, lines above it come first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Fault(NamedTuple):
    path: str
    old: str
    new: str
    what: str


class Equivalent(NamedTuple):
    path: str
    before: str
    after: str
    reason: str


FAULTS: tuple[Fault, ...] = (
    # ---- silently wrong results
    Fault(
        "fusedmlp/layers/parts/experts.py",
        "idle = not self.training or passes_through(dropout)",
        "idle = True",
        "experts lose their dropout in training",
    ),
    Fault(
        "fusedmlp/layers/parts/experts.py",
        "self._template[0].train(self.training)\n",
        "self._template[0].train(True)\n",
        "dropout acts in eval where experts are not fused",
    ),
    Fault(
        "fusedmlp/layers/switch.py",
        "aux = aux + self.z_loss_coef * router_z_loss(routing)",
        "aux = aux + self.loss_coef * self.z_loss_coef * router_z_loss(routing)",
        "the z-loss has the other loss's weight too",
    ),
    Fault(
        "fusedmlp/layers/parts/capacity.py",
        "torch.sym_int(tokens / experts * factor)",
        "round(tokens / experts * factor)",
        "the capacity is rounded to nearest",
    ),
    Fault(
        "fusedmlp/layers/fff.py",
        "p = right.clamp(_CLAMP, 1 - _CLAMP)",
        "p = right",
        "the hardening loss of a saturated router is NaN",
    ),
    Fault(
        "fusedmlp/layers/moe.py",
        "nn.init.uniform_(t, -(w.shape[-1] ** -0.5), w.shape[-1] ** -0.5)",
        "nn.init.uniform_(t, -(self.w_gate.shape[1] ** -0.5), w.shape[-1] ** -0.5)",
        "the lower bound is from the hidden width",
    ),
    Fault(
        "fusedmlp/patching/gate.py",
        "near = 1e-9 * expected.abs()",
        "near = 1e-1 * expected.abs()",
        "a gate is taken for one whose limit is a little larger",
    ),
    Fault(
        "fusedmlp/patching/gate.py",
        "if (reads := tensor_read(module, graph.nodes)) is not None:",
        "if (reads := None) is not None:",
        "a gate that learns is taken for what it is today",
    ),
    Fault(
        "fusedmlp/patching/form.py",
        "return form if _agrees(experts, form) else",
        "return form if True else",
        "experts with another forward are run as the table's",
    ),
    Fault(
        "fusedmlp/patching/experts.py",
        "routed.expert is index and routed.prob is weights",
        "routed.expert is index",
        "weights that the block has scaled are not the experts'",
    ),
    Fault(
        "fusedmlp/patching/route.py",
        "alike = torch.allclose(mine, theirs, rtol=1e-6, atol=1e-12)",
        "alike = True",
        "a router whose weights are detached gets their gradient",
    ),
    Fault(
        "fusedmlp/patching/form.py",
        "if self.transposed:",
        "if False:",
        "transposed experts are read as others are",
    ),
    Fault(
        "fusedmlp/layers/parts/around.py",
        '    if "forward" in of:\n        return "has a forward',
        '    if False:\n        return "has a forward',
        "a forward set on the instance is passed by",
    ),
    Fault(
        "fusedmlp/layers/parts/around.py",
        '"_backward_hooks", "_backward_pre_hooks")',
        '"_backward_pre_hooks")',
        "a full backward hook is passed by",
    ),
    Fault(
        "kernels/dense/gated_linear.py",
        "for t in (h, g, b_gate, b_up))",
        "for t in (h, g, b_gate, b_gate))",
        "b_up is read with b_gate's stride",
    ),
    Fault(
        "kernels/moe/moe_mlp.py",
        "*((0, 0) if b_up is None else b_up.stride()),",
        "*((0, 0) if b_up is None else b_gate.stride()),",
        "b_up is read with b_gate's strides",
    ),
    Fault(
        "kernels/tiles.py",
        "mask = mask & (offs_c[None, :] < C)",
        "mask = mask & (offs_c[None, :] <= C)",
        "one element past the row is read",
    ),
    Fault(
        "kernels/masked/masks.py",
        "planes_ptr, first // PER + i, n0, k, H, D, N_M, PER, BLOCK_N, BLOCK_K, MASK_K",
        "planes_ptr, first + i, n0, k, H, D, N_M, PER, BLOCK_N, BLOCK_K, MASK_K",
        "another mask's words",
    ),
    Fault(
        "fusedmlp/reference/moe.py",
        "run = lambda rows, e: linear(rows, ws[e], None if bs is None else bs[e])",
        "run = lambda rows, e: linear(rows, ws[e], None if bs is None else bs[0])",
        "every expert has the first one's bias",
    ),
    Fault(
        "csrc/activations.cuh",
        "x > 0 ? 1.f : 0.f",
        "x >= 0 ? 1.f : 0.f",
        "relu'(0) is 1",
    ),
    Fault(
        "csrc/moe_route.cu",
        "nan = e < nan ? e : nan;",
        "nan = e;",
        "a lane's last NaN is chosen, not its first",
    ),
    Fault(
        "fusedmlp/patching/form.py",
        'index = torch.randint(E, (T, k), generator=generator, device="cpu")',
        'index = torch.randint(E, (T, k), device="cpu")',
        "patch() draws from the program's own random numbers",
    ),
    Fault(
        "fusedmlp/patching/experts.py",
        'for name in ("_router", "_adapters"):',
        'for name in ("_adapters",):',
        "unpatch() leaves an attribute behind",
    ),
    Fault(
        "fusedmlp/patching/one_bit.py",
        "and not patched:",
        "and patched:",
        "blocks that are in one bit already are reported as left",
    ),
    Fault(
        "fusedmlp/ops/topk_route.py",
        "ctx.set_materialize_grads(False)",
        "ctx.set_materialize_grads(True)",
        "an output that nobody uses makes a gradient NaN",
    ),
    Fault(
        "fusedmlp/ops/moe_mlp.py",
        "*arguments, recompute=recompute and wants_grad)",
        "*arguments)",
        "recompute on the reference saves all the same",
    ),
    Fault(
        "kernels/hyper/gradients.py",
        "(need[2] or any(need[8:]))",
        "(need[2] or any(need[4:]))",
        "gradients that nobody wants are computed",
    ),
    # ---- what only a GPU would show
    Fault(
        "kernels/tiles.py",
        "and outer * t.element_size() % 16 == 0",
        "and outer * t.element_size() % 8 == 0",
        "TMA is given rows that are 8 bytes apart",
    ),
    Fault(
        "csrc/binary_gemv.cu",
        "    __syncthreads();\n  }\n  const int lane",
        "  }\n  const int lane",
        "a warp stages x that another still reads",
    ),
    Fault(
        "csrc/gated_linear_sm90.cu",
        "if (self.leads()) tma_store_wait_read<0>();  // shared",
        "if (self.leads()) tma_store_wait_read<1>();  // shared",
        "a block ends while its last store reads its shared memory",
    ),
    Fault(
        "csrc/tensor_map.cpp",
        "if (error != cudaSuccess) cudaGetLastError();",
        "",
        "the next caller takes the driver's error for its own",
    ),
    Fault(
        "kernels/hyper/slots.py",
        "lag < low, BLOCK",
        "low > 0, BLOCK",
        "a chunk's own lags are added to what memory held",
    ),
    Fault(
        "kernels/moe/moe_mlp.py",
        "A_TMA: tl.constexpr = TMA and not GATHER",
        "A_TMA: tl.constexpr = TMA",
        "gathered rows are read as if they lay together",
    ),
    Fault(
        "kernels/moe/moe_mlp.py",
        "num_warps=4, enable_fp_fusion=True,",
        "num_warps=4, enable_fp_fusion=False,",
        "a launch without fusion",
    ),
    Fault(
        "csrc/moe_route.h",
        "kMaxChunk = 1024",
        "kMaxChunk = 1025",
        "a chunk that is no whole number of warps",
    ),
    # ---- refusals and small things
    Fault(
        "fusedmlp/distributed/plans.py",
        "if not isinstance(module, Patched) or not isinstance(module._plan, kinds):",
        "if False:",
        "a plan of an unpatched block is taken",
    ),
    Fault(
        "fusedmlp/ops/masked_gated_linear.py",
        "if size != [H, D]:",
        "if size[1] != D:",
        "another H of the masks is taken",
    ),
    Fault(
        "fusedmlp/weights/masks.py",
        "if logits.dim() != 3 or not 1 <= logits.shape[0] <= MAX_MASKS:",
        "if logits.dim() != 3 or not 1 <= logits.shape[0] <= MAX_MASKS + 1:",
        "17 masks are taken",
    ),
    Fault(
        "fusedmlp/weights/binary.py",
        '_refuse("from_q1_0_bytes", "scales must be finite", ~scales.isfinite())',
        '_refuse("from_q1_0_bytes", "scales must be finite", scales.isnan())',
        "infinite scales are taken",
    ),
    Fault(
        "fusedmlp/check/__init__.py",
        "t.dtype.is_floating_point and t.dtype != torch.float64",
        "t.dtype.is_floating_point",
        "autocast rounds float64",
    ),
    Fault(
        "fusedmlp/weights/gguf.py",
        "odd = [name for name, shape in binary.items() if len(shape) != 2]",
        "odd = [name for name, shape in binary.items() if len(shape) > 2]",
        "a vector counts as a matrix",
    ),
    Fault(
        "fusedmlp/patching/moe.py",
        "if not all(idle(e.dropout) for e in experts):",
        "if not any(idle(e.dropout) for e in experts):",
        "the dropout of some experts is lost",
    ),
    Fault(
        "fusedmlp/hyperglu/layer.py",
        "T * T if sees_all else T * (T + 1) // 2",
        "T * T if sees_all else T * T // 2",
        "half of the diagonal is not counted",
    ),
    Fault(
        "fusedmlp/hyperglu/config.py",
        '"op2_init_std"):\n            self._require(',
        '"op2_init_std"):\n            self._require(getattr(self, name) != 0 and ',
        "initial values of 0 are refused",
    ),
    Fault(
        "fusedmlp/distributed/experts.py",
        "packed=packed, recompute=recompute, lora=lora,\n        )  # fmt: skip\n        back",
        "packed=packed, lora=lora,\n        )  # fmt: skip\n        back",
        "what was to be computed again is saved",
    ),
)

NEAR = "twice as near is as near: between rounding and another function lies more"
FOUR = "scores have four dimensions"
TRIED = "values to try functions on; others tell them apart as well"


def _off_by_one(path: str, line: str) -> Iterator[Equivalent]:
    """For each whole number of a line of values to try functions on."""
    for found in re.finditer(r"(?<![\w.])\d+(?![\w.])", line):
        for n in (int(found[0]) - 1, int(found[0]) + 1):
            yield Equivalent(path, line, f"{line[: found.start()]}{n}{line[found.end() :]}", TRIED)


EQUIVALENT: tuple[Equivalent, ...] = (
    *_off_by_one(
        "fusedmlp/patching/activation.py",
        "return torch.cat((torch.linspace(-30, 30, 481, **options), decades, -decades))",
    ),
    *_off_by_one(
        "fusedmlp/patching/activation.py", "decades = torch.logspace(-6, 5, 111, **options)"
    ),
    *_off_by_one("fusedmlp/patching/gate.py", "far = torch.logspace(-6, 5, 45, **grid)"),
    *_off_by_one(
        "fusedmlp/patching/gate.py",
        "g = torch.cat((torch.linspace(-30, 30, 121, **grid), far, -far))",
    ),
    *_off_by_one(
        "fusedmlp/patching/gate.py",
        "u = torch.cat((torch.linspace(-30, 30, 25, **grid), far[::3], -far[::3]))",
    ),
    *_off_by_one("fusedmlp/patching/gate.py", "few = slice(None, None, 17)"),
    *(
        Equivalent(
            "fusedmlp/patching/gate.py",
            "near = 1e-9 * expected.abs() + 1e-12 * (1 + g.abs()) * (1 + u.abs())",
            f"near = {share} * expected.abs() + {rest} * (1 + g.abs()) * (1 + u.abs())",
            NEAR,
        )
        for share, rest in (("2e-09", "1e-12"), ("1e-9", "2e-12"))
    ),
    *(
        Equivalent(
            "fusedmlp/patching/gate.py",
            "near = 1e-9 * expected.abs() + 1e-12 * (1 + g.abs()) * (1 + u.abs())",
            f"near = 1e-9 * expected.abs() + 1e-12 * ({g} + g.abs()) * ({u} + u.abs())",
            NEAR,
        )
        for g, u in ((2, 1), (1, 2))
    ),
    *_off_by_one(
        "fusedmlp/patching/form.py",
        "draw = lambda *size: 3 * torch.randn(size, generator=generator, **like)  # noqa: E731",
    ),
    Equivalent(
        "fusedmlp/patching/form.py",
        "generator = torch.Generator().manual_seed(0)",
        "generator = torch.Generator().manual_seed(1)",
        TRIED,
    ),
    *(
        Equivalent(
            "fusedmlp/patching/form.py",
            "E, D, H, T, k = getattr(experts, form.first).shape[0], 4, 3, 5, 2",
            f"E, D, H, T, k = getattr(experts, form.first).shape[0], {sizes}",
            TRIED,
        )
        for sizes in (
            "3, 3, 5, 2",
            "5, 3, 5, 2",
            "4, 2, 5, 2",
            "4, 4, 5, 2",
            "4, 3, 4, 2",
            "4, 3, 6, 2",
            "4, 3, 5, 3",
        )  # fmt: skip
    ),
    Equivalent(
        "fusedmlp/patching/find.py",
        "if len(list(projections(module))) < 2:",
        "if len(list(projections(module))) < 1:",
        "the short way of most modules: in one projection alone no run is found",
    ),
    Equivalent(
        "fusedmlp/dry/warm.py",
        "end += -(-max(span, 1) * _dtype(t).itemsize // _APART) * _APART",
        "end += -(-max(span, 2) * _dtype(t).itemsize // _APART) * _APART",
        "one element and two take as much, since none is as large as half of _APART",
    ),
    Equivalent(
        "fusedmlp/dry/lines.py",
        "return any(p.kernels for p in expected(block, 1, next(iter(ARCHES.values())), 1))",
        "return any(p.kernels for p in expected(block, 1, next(iter(ARCHES.values())), 2))",
        "which kernels are called goes by no number of multiprocessors, their tiles do",
    ),
    Equivalent(
        "fusedmlp/patching/spelling.py",
        "return bool(((h - expected).abs() < 1e-9 * near).all())",
        "return bool(((h - expected).abs() < 2e-09 * near).all())",
        NEAR,
    ),
    *(
        Equivalent(
            "fusedmlp/patching/route.py",
            "rtol = 2e-2 if weights.dtype.itemsize == 2 else 1e-5",
            f"rtol = {narrow} if weights.dtype.itemsize == 2 else {wide}",
            NEAR,
        )
        for narrow, wide in (("0.04", "1e-5"), ("2e-2", "2e-05"))
    ),
    *(
        Equivalent("fusedmlp/patching/route.py", before, after, TRIED)
        for before, after in (
            ("TOKENS = 256", "TOKENS = 257"),
            ("TOKENS = 256", "TOKENS = 255"),
            ("TOKENS = 256", "TOKENS = 128"),
            ("logits[::8] -= 46", "logits[::8] -= 45"),
            ("logits[::8] -= 46", "logits[::8] -= 47"),
            ("logits = 1.5 * draw(TOKENS, E)", "logits = 3.0 * draw(TOKENS, E)"),
            (
                "spread = 1.5 / t.shape[-1] ** 0.5 if is_matrix(t) else 0.3",
                "spread = 1.5 / t.shape[-1] ** 0.5 if is_matrix(t) else 0.6",
            ),
        )
    ),
    *(
        Equivalent(
            "fusedmlp/patching/projection.py",
            "if kind is not nn.Parameter and kind is not Tensor:",
            f"if kind is not nn.Parameter{after}:",
            "the short way of most calls: what lies here whole is its own part",
        )
        for after in ("", " or kind is not Tensor")
    ),
    Equivalent(
        "fusedmlp/patching/match.py",
        "if any(plan != plans[0] for plan in plans):",
        "if any(plan != plans[1] for plan in plans):",
        "there are two at least, and any of them may be what the others are compared with",
    ),
    Equivalent(
        "kernels/stacked.py",
        "low = w1 if step > 0 else w2",
        "low = w1 if step >= 0 else w2",
        "a step of 0 has returned None before",
    ),
    Equivalent(
        "kernels/activations.py",
        "return tl.where(x > 0, x, alpha * t * (e + 1)), tl.where(x > 0, 1.0, alpha * e)",
        "return tl.where(x >= 0, x, alpha * t * (e + 1)), tl.where(x > 0, 1.0, alpha * e)",
        "at 0 both are 0",
    ),
    Equivalent(
        "kernels/moe/topk_route.py",
        "bias = tl.load(bias_ptr + offs_e * stride_b, mask=mask_e, other=0.0)",
        "bias = tl.load(bias_ptr + offs_e * stride_b, mask=mask_e)",
        "what is added where mask_e is not has the least key whatever it is",
    ),
    Equivalent(
        "kernels/moe/topk_route.py",
        "if bias_ptr is None and not BY_LOGITS:",
        "if bias_ptr is None:",
        "by logits the key is theirs already",
    ),
    Equivalent(
        "csrc/schedule.cuh",
        "int rows = 0, columns = 0;  // cluster rows, columns of tiles",
        "int rows = 1, columns = 0;  // cluster rows, columns of tiles",
        "a default-constructed schedule is assigned before it is read",
    ),
    Equivalent(
        "fusedmlp/reference/hyper.py",
        "if c is None or u is None or vt is None:",
        "if c is None or vt is None:",
        "c, u and vt come together",
    ),
    Equivalent(
        "fusedmlp/reference/hyper.py",
        "if c is None or u is None or vt is None:",
        "if c is None and u is None or vt is None:",
        "c, u and vt come together",
    ),
    Equivalent(
        "csrc/epilogue.cuh",
        "return {dh * y.slope, 0, y.value};",
        "return {dh * y.slope, 1, y.value};",
        "without u nobody reads its gradient",
    ),
    Equivalent(
        "fusedmlp/patching/route.py",
        "logits = 1.5 * draw(TOKENS, E)",
        "logits = 1.5 + draw(TOKENS, E)",
        "values to try a router on; others tell routers apart as well",
    ),
    Equivalent(
        "fusedmlp/reference/activations.py",
        "_cached = functools.lru_cache(1024)(_parsed)",
        "_cached = functools.lru_cache(512)(_parsed)",
        "how many spellings are kept decides time alone",
    ),
    Equivalent(
        "csrc/moe_route.cu",
        "if (earlier == 0) s.histogram[expert] = before + __popc(same);\n}\n__syncwarp();",
        ";",
        "on the host runner the next round's __match_any_sync orders memory too",
    ),
    Equivalent(
        "fusedmlp/reference/masked.py",
        "weights = 1 << torch.arange(8, dtype=torch.uint8, device=masks.device)",
        "weights = 1 << torch.arange(8, device=masks.device)",
        "the sum is taken in uint8 all the same",
    ),
    Equivalent(
        "fusedmlp/testing/moe.py",
        "ones = torch.ones(expert.shape, dtype=torch.float32, device=expert.device)",
        "ones = torch.zeros(expert.shape, dtype=torch.float32, device=expert.device)",
        "moe_linear does not use the probability",
    ),
    Equivalent(
        "fusedmlp/distributed/plans.py",
        "sharded = distribute_tensor(p.detach(), mesh, [placement])",
        "sharded = distribute_tensor(p, mesh, [placement])",
        "nn.Parameter detaches what it is given",
    ),
    Equivalent(
        "fusedmlp/weights/gguf_file.py",
        "elif version < min(VERSIONS):",
        "elif version < max(VERSIONS):",
        "versions 2 and 3 are neighbours: what is neither and below 3 is below 2",
    ),
    Equivalent(
        "fusedmlp/distributed/experts.py",
        "return number.index_select(0, key.argsort(stable=True)), kept[:-1]",
        "return number.index_select(0, key.argsort(stable=False)), kept[:-1]",
        "on a CPU every sort is stable",
    ),
    Equivalent(
        "fusedmlp/testing/masked.py",
        "planes = torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)",
        "planes = torch.randint(256, shape, generator=generator, dtype=torch.uint8)",
        "without a GPU every generator is the CPU's",
    ),
    Equivalent(
        "bench/saved.py",
        'with FakeTensorMode(), pretend(arch, 1), backend("triton"):',
        'with FakeTensorMode(), pretend(arch, 2), backend("triton"):',
        "no saved tensor goes by the number of multiprocessors",
    ),
    Equivalent(
        "fusedmlp/patching/one_bit.py",
        "super().__init__(model, None, dtype_check=False)",
        "super().__init__(model, None, dtype_check=True)",
        "its own dtypes(), which alone would ask, does not",
    ),
    Equivalent(
        "fusedmlp/layers/fff.py",
        "ones = x.new_ones(x.shape[0], dtype=torch.float32)",
        "ones = x.new_ones(x.shape[0])",
        "ones are ones in every dtype, and x's is one that a routing may have",
    ),
    Equivalent(
        "fusedmlp/hyperglu/chunked.py",
        "return torch.zeros_like(v)",
        "return torch.ones_like(v)",
        "it has no elements",
    ),
    Equivalent(
        "fusedmlp/weights/gguf_file.py",
        "self.at, self.end = 0, len(data)",
        "self.at, self.end = 1, len(data)",
        "counts() sets it before anything reads it",
    ),
    Equivalent(
        "fusedmlp/weights/binary.py",
        "blocks = data.view(H, groups, BLOCK_BYTES)",
        "blocks = data.view(groups, H, BLOCK_BYTES)",
        "a view of contiguous blocks, which are taken in their order",
    ),
    Equivalent(
        "fusedmlp/backends/choice.py",
        '_F = TypeVar("_F", bound=Callable[..., Any])',
        '_F = TypeVar("_F")',
        "for the type checker",
    ),
    Equivalent(
        "fusedmlp/check/__init__.py",
        "hint = transposed(name, t.shape, expected)",
        "hint = transposed(name, expected, t.shape)",
        "either is the other transposed, or neither is",
    ),
    Equivalent(
        "fusedmlp/check/__init__.py",
        "hint = transposed(name, got, expected)",
        "hint = transposed(name, expected, got)",
        "either is the other transposed, or neither is",
    ),
    Equivalent(
        "fusedmlp/check/__init__.py",
        "if row is not None and (gated or row.up is None):",
        "if row is not None and (gated):",
        "the short way of most calls; what goes on finds the name as good",
    ),
    Equivalent(
        "fusedmlp/check/__init__.py",
        "if row is not None and (gated or row.up is None):",
        "if row is not None and (gated and row.up is None):",
        "the short way of most calls; what goes on finds the name as good",
    ),
    Equivalent(
        "fusedmlp/dry/driver.py",
        "nothing = _running(lambda *_, **__: None, JITFunction, InterpretedFunction)",
        "nothing = _running(lambda *_, **__: None, InterpretedFunction, JITFunction)",
        "each of the kinds has its own attribute replaced, in any order",
    ),
    Equivalent(
        "fusedmlp/patching/gate.py",
        "return g, u",
        "return u, g",
        "pairs to try a gate on; those with g and u exchanged tell gates apart as well",
    ),
    Equivalent(
        "fusedmlp/layers/parts/sequential.py",
        "if left > 2 and passes_through(children[start + 2]) and bare(children[start + 2]):",
        "if left > 3 and passes_through(children[start + 2]) and bare(children[start + 2]):",
        "behind a dropout that is the last there is no second linear",
    ),
    Equivalent(
        "fusedmlp/layers/init_weights.py",
        "for name, parameter in module.named_parameters(recurse=False):",
        "for name, parameter in module.named_parameters():",
        "a GRU and an LSTM hold no modules",
    ),
    Equivalent(
        "fusedmlp/layers/ngpt.py",
        "weight = weight * rows().unsqueeze(-1)",
        "weight = weight * rows().unsqueeze(1)",
        "rows() is a vector",
    ),
    Equivalent(
        "fusedmlp/check/lora.py",
        "return Lora(*(None if a is None or b is None else Adapter(a, b, s) for a, b, s in pairs))",
        "return Lora(*(None if a is None else Adapter(a, b, s) for a, b, s in pairs))",
        "a and b come together",
    ),
    Equivalent(
        "fusedmlp/ops/_experts.py",
        "return Routing(expert, prob, tokens, rows, offsets, offsets[:-1].diff())",
        "return Routing(expert, prob, tokens, rows, offsets, offsets[:1].diff())",
        "for formulas, which read no counts",
    ),
    Equivalent(
        "fusedmlp/backends/cuda/route.py",
        "*((0, 0) if logits is None else logits.stride()), call.chunk, call.capacity,",
        "*((0, 1) if logits is None else logits.stride()), call.chunk, call.capacity,",
        "without logits nobody reads their strides",
    ),
    Equivalent(
        "fusedmlp/testing/moe.py",
        'return {**arguments, "k": min(4, arguments["logits"].shape[-1])}',
        'return {**arguments, "k": min(4, arguments["logits"].shape[1])}',
        "the logits of a case are a matrix",
    ),
    Equivalent(
        "fusedmlp/testing/moe.py",
        'yield route_case("topk_route-sigmoid", score="sigmoid", eps=1e-20, scale=2.5)',
        'yield route_case("topk_route-sigmoid", score="sigmoid", eps=1e-20, scale=5.0)',
        "a value to try; another is scaled as well",
    ),
    Equivalent(
        "fusedmlp/testing/dense.py",
        '("up_gate", {"gate": (33, 1.0), "down": (1, 1.0)}),',
        '("up_gate", {"gate": (33, 1.0), "down": (2, 1.0)}),',
        "a rank to try; another case has 1",
    ),
    Equivalent(
        "fusedmlp/testing/binary.py",
        "return (t / (128 * max(shape[1], 1)) ** 0.5).to(torch.float16)",
        "return (t / (64 * max(shape[1], 1)) ** 0.5).to(torch.float16)",
        "scales to try; products of twice the variance are as good",
    ),
    Equivalent(
        "kernels/maps.py",
        "small = [t for t in tensors if t is not None and t.numel() < _SMALL]",
        "small = [t for t in tensors if t is not None]",
        "the short way of most calls; small_with_gaps() asks for the size as well",
    ),
    Equivalent(
        "kernels/hyper/hyper_attention_step.py",
        "MOST_PARTS = 128",
        "MOST_PARTS = 64",
        "into how many parts a step is cut at most decides its speed",
    ),
    Equivalent(
        "fusedmlp/ops/hyper_attention.py",
        "return {name: t for name, t in zip(NAMES, arguments, strict=False) if t is not None}",
        "return {name: t for name, t in zip(NAMES, arguments, strict=False) if True}",
        "formulas read what is None as what is missing",
    ),
    Equivalent(
        "fusedmlp/layers/switch.py",
        'if self.dropped == "identity" and capacity is not None:',
        'if self.dropped == "identity":',
        "without a capacity all tokens are kept",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/traced.py",
        "if not readable(routing.offsets) or routing.offsets[-2] != routing.tokens.shape[0]:",
        "if not readable(routing.offsets) or routing.offsets[-3] != routing.tokens.shape[0]:",
        "where the last expert has rows, the general way gives the same",
    ),
    Equivalent(
        "fusedmlp/layers/init_weights.py",
        "for name, parameter in module.named_parameters(recurse=False):",
        "for name, parameter in module.named_parameters(recurse=True):",
        "a GRU and an LSTM hold no modules",
    ),
    Equivalent(
        "fusedmlp/testing/dense.py",
        '(biased, {"gate": (16, 0.5), "up": (5, 2.0), "down": (16, 1.0)}),',
        '(biased, {"gate": (16, 0.5), "up": (5, 2.0), "down": (16, 2.0)}),',
        "a scale to try; others differ from 1 as well",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/binary.py",
        'places = torch.arange(G * _BYTES, dtype=torch.int32, device="cpu")',
        'places = torch.arange(G * _BYTES, device="cpu")',
        "an index of 64 bits is as good, and slower",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/binary.py",
        'first = torch.arange(0, H * G * _BYTES, G * _BYTES, dtype=torch.int32, device="cpu")',
        'first = torch.arange(0, H * G * _BYTES, G * _BYTES, device="cpu")',
        "an index of 64 bits is as good, and slower",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/binary.py",
        'picked, sums.t().contiguous(), first, mode="sum", per_sample_weights=factors',
        'picked, sums.t(), first, mode="sum", per_sample_weights=factors',
        "a table of any strides holds the same values",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/remade.py",
        "pre = [t.detach().requires_grad_(n) for t, n in zip(pre, need_pre, strict=True)]",
        "pre = [t.requires_grad_(n) for t, n in zip(pre, need_pre, strict=True)]",
        "what was saved wants a gradient where the argument did",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/remade.py",
        "low, high, scale = down or (None, None, 1.0)",
        "low, high, scale = down or (None, None, 2.0)",
        "without an adapter nobody reads its scale",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/remade.py",
        "adapter = None if low is None or high is None else Adapter(low, high, scale)",
        "adapter = None if low is None else Adapter(low, high, scale)",
        "a and b come together",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/remade.py",
        "if low is not None and high is not None:",
        "if low is not None:",
        "a and b come together",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/remade.py",
        "return sum(each, start=torch.zeros_like(total))",
        "return sum(each)",
        "a sum that begins with 0 is the same, and there is a mask",
    ),
    Equivalent(
        "fusedmlp/backends/library.py",
        'torch.library.register_fake(f"{NAMESPACE}::{name}", row.fake, lib=_LIBRARY)',
        'torch.library.register_fake(f"{NAMESPACE}::{name}", row.fake)',
        "PyTorch keeps a library of its own for it, as long as it runs",
    ),
    Equivalent(
        "fusedmlp/backends/library.py",
        'torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)',
        'torch.library.register_fake(f"{NAMESPACE}::{name}", fake)',
        "PyTorch keeps a library of its own for it, as long as it runs",
    ),
    Equivalent(
        "fusedmlp/backends/library.py",
        'torch.library.register_vmap(f"{NAMESPACE}::{name}", _one_by_one(name), lib=_LIBRARY)',
        'torch.library.register_vmap(f"{NAMESPACE}::{name}", _one_by_one(name))',
        "PyTorch keeps a library of its own for it, as long as it runs",
    ),
    Equivalent(
        "kernels/moe/topk_route.py",
        "ELEMENTS = 2048  # of a (tokens, experts) tile: 16 a thread",
        "ELEMENTS = 1024  # of a (tokens, experts) tile: 16 a thread",
        "how many tokens a block takes decides time, and the order of sums",
    ),
    Equivalent(
        "kernels/moe/topk_route.py",
        "ELEMENTS = 2048  # of a (tokens, experts) tile: 16 a thread",
        "ELEMENTS = 2049  # of a (tokens, experts) tile: 16 a thread",
        "divided by a power of two, and rounded down",
    ),
    Equivalent(
        "kernels/moe/top1_route.py",
        "ELEMENTS = 4096  # of a (tokens, experts) tile: 32 a thread",
        "ELEMENTS = 2048  # of a (tokens, experts) tile: 32 a thread",
        "how many tokens a block takes decides time, and the order of sums",
    ),
    Equivalent(
        "kernels/moe/top1_route.py",
        "ELEMENTS = 4096  # of a (tokens, experts) tile: 32 a thread",
        "ELEMENTS = 4097  # of a (tokens, experts) tile: 32 a thread",
        "divided by a power of two, and rounded down",
    ),
    Equivalent(
        "fusedmlp/reference/moe.py",
        "p = load / load.sum().clamp_min(1e-30)",
        "p = load / load.sum().clamp_min(2e-30)",
        "a sum is 0, or one choice's share at least",
    ),
    Equivalent(
        "csrc/moe_route.h",
        "static constexpr int kMaxExperts = 4096, kMaxChunk = 1024;  "
        "// of the shared memory that they need",
        "static constexpr int kMaxExperts = 4096, kMaxChunk = 512;  "
        "// of the shared memory that they need",
        "how many tokens a block takes decides time, and the order of sums",
    ),
    Equivalent(
        "csrc/schedule.cuh",
        "int rows = 0, columns = 0;  // cluster rows, columns of tiles",
        "int rows = 0, columns = 1;  // cluster rows, columns of tiles",
        "no rows are no tiles in any columns",
    ),
    Equivalent(
        "bench/predict.py",
        "print(f\"compiling for {', '.join(names)}: minutes\", file=sys.stderr, flush=True)",
        "print(f\"compiling for {', '.join(names)}: minutes\", file=sys.stderr)",
        "stderr is written line by line",
    ),
    Equivalent(
        "bench/predict.py",
        "print(f\"compiling for {', '.join(names)}: minutes\", file=sys.stderr, flush=True)",
        "print(f\"compiling for {', '.join(names)}: minutes\", file=sys.stderr, flush=False)",
        "stderr is written line by line",
    ),
    Equivalent(
        "bench/predict.py",
        "shapes = work.case.shapes(1, 8, 8)",
        "shapes = work.case.shapes(1, 4, 8)",
        "names of arguments and the number of masks are all that is read",
    ),
    Equivalent(
        "bench/predict.py",
        "shapes = work.case.shapes(1, 8, 8)",
        "shapes = work.case.shapes(1, 8, 4)",
        "names of arguments and the number of masks are all that is read",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/experts.py",
        "leaf = t.detach().requires_grad_()",
        "leaf = t.requires_grad_()",
        "what forward made is nobody else's, and has no graph",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/experts.py",
        "torch.mul(dh, phi, out=du)",
        "torch.mul(phi, dh, out=du)",
        "a product has no order",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/memory.py",
        "pages.madvise(mmap.MADV_HUGEPAGE)",
        "pass",
        "how large pages are decides time alone",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/memory.py",
        "with contextlib.suppress(OSError, AttributeError):  # a kernel without large pages",
        "with contextlib.suppress(AttributeError, OSError):  # a kernel without large pages",
        "in any order",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/memory.py",
        "pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)",
        "pages = mmap.mmap(1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)",
        "anonymous memory is of no file",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/grouped.py",
        "if _by_groups(w.shape[0], kept, a, w.mT):",
        "if _by_groups(w.shape[1], kept, a, w.mT):",
        "which of two ways makes a product decides time alone",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/grouped.py",
        "if E * one < _LENT:",
        "if E * one <= _LENT:",
        "whose memory holds a gradient decides time alone",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/trees.py",
        "x, w = x.detach(), w.detach()",
        "x, w = x.detach(), w",
        "a path has no gradient; without it autograd notes what nobody asks for",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/trees.py",
        "path = tree_path(logits.detach(), depth)",
        "path = tree_path(logits, depth)",
        "a path has no gradient",
    ),
    Equivalent(
        "fusedmlp/ops/tree_path.py",
        "flat = rows(logits.detach())",
        "flat = rows(logits)",
        "a path has no gradient",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/hyper.py",
        "seen = min(max(int(position) + 1, 0), k.shape[-2])",
        "seen = min(max(int(position) + 1, 1), k.shape[-2])",
        "a position is at least 0",
    ),
    Equivalent(
        "fusedmlp/backends/cutlass/loader.py",
        "if capability and find(kernels[0], capability)[0] is None:",
        "if capability and find(kernels[1], capability)[0] is None:",
        "both kernels are built for the same GPUs",
    ),
    Equivalent(
        "fusedmlp/check/lora.py",
        "return tuple(1.0 if p is None else float(p.scale) for p in given)",
        "return tuple(2.0 if p is None else float(p.scale) for p in given)",
        "without an adapter nobody reads its scale",
    ),
    Equivalent(
        "fusedmlp/ops/_moe_lora.py",
        "t = _experts.down(a, None, order.offsets, w, None, None, None, None, False)",
        "t = _experts.down(a, None, order.offsets, w, None, None, None, None, True)",
        "without tokens there is nothing to gather by",
    ),
    Equivalent(
        "fusedmlp/ops/_moe_lora.py",
        "False, want_dprob, want_db, False,",
        "False, want_dprob, want_db, True,",
        "one more result, which nobody reads",
    ),
    Equivalent(
        "fusedmlp/weights/masks.py",
        "logits = logits.detach()",
        "logits = logits",
        "bits have no gradient",
    ),
    Equivalent(
        "fusedmlp/check/hyper.py",
        "if leading == 1:",
        "if leading == 2:",
        "the short way of most calls; what goes on makes views of the same shape",
    ),
    Equivalent(
        "fusedmlp/hyperglu/layer.py",
        "c, q, options = self.config, tensors[0], self._options()",
        "c, q, options = self.config, tensors[1], self._options()",
        "k has q's dtype and device, which is all that is asked",
    ),
    Equivalent(
        "fusedmlp/ops/_adapted.py",
        "h = sum(each, start=next(each))",
        "h = sum(each)",
        "a sum that begins with 0 is the same",
    ),
    Equivalent(
        "fusedmlp/backends/cpu/routing.py",
        "return Routing(expert, prob, tokens, rows, offsets, counts, p, lse)",
        "return Routing(expert, prob, rows, tokens, offsets, counts, p, lse)",
        "of one token both are 0",
    ),
    Equivalent(
        "fusedmlp/hyperglu/chunked.py",
        "padded = F.pad(S, (width - 1 - (columns - rows), 0)).contiguous()",
        "padded = F.pad(S, (width - 1 - (columns - rows), 0))",
        "scores of a product are contiguous, and so is what F.pad makes of them",
    ),
    Equivalent(
        "fusedmlp/hyperglu/chunked.py",
        "padded = F.pad(Y, (0, rows - 1)).contiguous()",
        "padded = F.pad(Y, (0, rows - 1))",
        "scores of a product are contiguous, and so is what F.pad makes of them",
    ),
    Equivalent(
        "fusedmlp/weights/binary.py",
        "H, groups = scales.shape if scales.dim() == 2 else (-1, -1)",
        "H, groups = scales.shape if scales.dim() == 2 else (1, -1)",
        "no tensor has the other, negative size",
    ),
    Equivalent(
        "fusedmlp/weights/binary.py",
        "H, groups = scales.shape if scales.dim() == 2 else (-1, -1)",
        "H, groups = scales.shape if scales.dim() == 2 else (-1, 1)",
        "no tensor has the other, negative size",
    ),
    *(
        Equivalent("fusedmlp/testing/rounding.py", before, after, reason)
        for before, after, reason in (
            (
                "if any(result.alias_info for result in func._schema.returns):",
                "if all(result.alias_info for result in func._schema.returns):",
                "the results of an operation of a formula are all new or none is",
            ),
            (
                "return t + self.scale * 0.6 * draw * size",
                "return t - self.scale * 0.6 * draw * size",
                "a move is as likely the other way, and sizes alone are taken",
            ),
            (
                "return {k: pair if bent[k] <= CURVED * pair[1] else (0, 0) "
                "for k, pair in largest.items()}",
                "return {k: pair if bent[k] < CURVED * pair[1] else (0, 0) "
                "for k, pair in largest.items()}",
                "the two are equal where nothing moves, which is (0, 0) either way",
            ),
            ("MOVE = 2.0**-36", "MOVE = 2.0**-35", "a move is as small as it takes"),
            ("MOVE = 2.0**-36", "MOVE = 2.0**-37", "a move is as small as it takes"),
            (
                "def moves(seed: int, sign: int = 1) -> dict[str, Tensor]:",
                "def moves(seed: int, sign: int = 2) -> dict[str, Tensor]:",
                "a move is as small as it takes, and what came of it is divided by its size",
            ),
            ("super().__init__()", "pass", "a mode that is entered sets what it lacks"),
            ("kwargs = kwargs or {}", "kwargs = kwargs", "PyTorch gives a dict, if an empty one"),
        )
    ),
    Equivalent(
        "fusedmlp/testing/rule.py",
        "ours, eagers = _distance(out, exact), _distance(eager, exact)",
        "ours, eagers = _distance(exact, out), _distance(eager, exact)",
        "a distance is the same from either end",
    ),
    Equivalent(
        "fusedmlp/testing/case.py",
        "return 2.0 ** -round(math.log2(max(columns, 1)) / 2)",
        "return 2.0 ** -round(math.log2(max(columns, 2)) / 2)",
        "of 1 column and of 2 the step is 1",
    ),
    *(
        Equivalent(
            "fusedmlp/testing/case.py",
            f"return {before}self.shapes(1, 1, 1){after}",
            f"return {before}self.shapes({size}){after}",
            "a case has the same arguments at every size",
        )
        for before, after in (
            ('"packed" in self.options or not _UP.isdisjoint(', ")"),
            ('any(name.endswith("_a") for name in ', ")"),
        )
        for size in ("2, 1, 1", "1, 2, 1", "1, 1, 2")
    ),
    Equivalent(
        "fusedmlp/testing/case.py",
        'dy = _uniform("dy", tuple(out.shape), 0, generator).to(out)',
        'dy = _uniform("dy", tuple(out.shape), 1, generator).to(out)',
        "uniform numbers do not go by the width",
    ),
    Equivalent(
        "fusedmlp/testing/case.py",
        "columns = torch.arange(shape[0], device=t.device) % max(1, shape[1] - 1)",
        "columns = torch.arange(shape[0], device=t.device) % max(1, shape[1] - 2)",
        "any columns but the last will do",
    ),
    Equivalent(
        "fusedmlp/testing/binary.py",
        'width = rest["x"].shape[-1] if source == "x" else rest["w_gate"].shape[0]',
        'width = rest["x"].shape[1] if source == "x" else rest["w_gate"].shape[0]',
        "x of a case is a matrix",
    ),
    Equivalent(
        "fusedmlp/distributed/experts.py",
        "return number.index_select(0, key.argsort(stable=True)), kept[:-1]",
        "return number.index_select(0, key.argsort()), kept[:-1]",
        "on a CPU every sort is stable",
    ),
    Equivalent(
        "fusedmlp/distributed/experts.py",
        "rows = rows.contiguous()",
        "rows = rows",
        "rows that are taken, and results and gradients of products, are contiguous already",
    ),
    Equivalent(
        "fusedmlp/distributed/plans.py",
        "super().__init__()",
        "pass",
        "ParallelStyle has no __init__ of its own",
    ),
    *(
        Equivalent("fusedmlp/hyperglu/chunked.py", before, after, reason)
        for before, after, reason in (
            ("rows, columns = S.shape[-2:]", "rows, columns = S.shape[2:]", FOUR),
            ("rows, width = Y.shape[-2:]", "rows, width = Y.shape[2:]", FOUR),
            (
                "padded = F.pad(Y, (0, rows - 1)).contiguous()",
                "padded = F.pad(Y, (0, rows + 1)).contiguous()",
                "more zeros, which nobody reads",
            ),
            (
                "block = functools.partial(checkpoint, block, use_reentrant=False, "
                "preserve_rng_state=False)",
                "block = functools.partial(checkpoint, block, use_reentrant=False)",
                "a block draws no random numbers",
            ),
            (
                "again = chunk is not None and not transformed() "
                "and wants_grad(q, k, v, c1, c2, *first, *second)",
                "again = chunk is not None and not transformed()",
                "without a gradient a checkpoint is a call",
            ),
        )
    ),
    Equivalent(
        "fusedmlp/hyperglu/layer.py",
        "cache = self.init_cache(x.shape[0], device=x.device, dtype=working_dtype(x))",
        "cache = self.init_cache(x.shape[0], device=x.device)",
        "x has the parameters' dtype",
    ),
    *(
        Equivalent("fusedmlp/patching/compiled.py", before, after, "a run without a call has a y")
        for before, after in (
            (
                'result: ast.expr = ast.Name(cut.y or "", ast.Load())',
                "result: ast.expr = ast.Name(cut.y, ast.Load())",
            ),
            (
                'last = ast.Assign([ast.Name(cut.y or "", ast.Store())], call)',
                "last = ast.Assign([ast.Name(cut.y, ast.Store())], call)",
            ),
        )
    ),
)
