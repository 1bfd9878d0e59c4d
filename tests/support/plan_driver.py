"""A stand-in for Triton's compiler and driver that notes launches, to compare those by plans with
those without; for the process that compiles."""

import contextlib
import gc
import itertools
import random
import sys
import threading
import weakref
from dataclasses import dataclass
from types import FunctionType
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedmlp import backend
from fusedmlp.backends.library import BY_PLANS, serve_cpu
from fusedmlp.backends.op import KERNELS, NAMESPACE
from fusedmlp.bench.gate.ptx import emulate
from fusedmlp.kernels import plans
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.kernels.device import pretend
from fusedmlp.kernels.pick import LAST
from fusedmlp.testing import CASES, evaluate

DEVICES = itertools.count(1000)  # Triton caches kernels by device


def _is(t):
    return isinstance(t, torch.Tensor)


class Memory(TorchDispatchMode):
    """The storages that were made, in order, by launchers too."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            with self:
                return BY_PLANS[func._schema.name.partition("::")[2]](*args)
        out = func(*args, **(kwargs or {}))
        known = {storage.data_ptr() for storage in self.made}
        known |= {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is(t)}
        for t in tree_leaves(out):
            if _is(t) and t.numel() and t.untyped_storage().data_ptr() not in known:
                self.made.append(t.untyped_storage())
        return out

    def place(self, address):
        """(which storage, how far into it), or None of memory that was there before."""
        for i, storage in enumerate(self.made):
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return i, address - storage.data_ptr()
        return None


class Compiled:
    """What Triton takes for a compiled kernel."""

    packed_metadata = (4, 1, 0)

    def __init__(self, machine, source):
        self.machine, self.source, self.function = machine, source, id(source)

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        if enter is not None and enter.calls:
            enter(metadata)
        self.machine.launches.append((self, (x, y, z), stream, arguments))


class Machine:
    """As much of a driver as launching needs."""

    def __init__(self):
        self.device, self.launches = next(DEVICES), []

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def _compile(source, compile_=compiler.compile, **options):
    """Nothing for a machine. A kernel keeps what compiled it, so that for other drivers it must
    still be Triton."""
    now = driver.active
    return Compiled(now, source) if isinstance(now, Machine) else compile_(source, **options)


@contextlib.contextmanager
def machine():
    """Inside, ops on CPU tensors launch what is not compiled on a GPU that is not there."""
    made, previous = Machine(), driver._active
    driver.set_active(made)
    try:
        with (
            mock.patch.object(compiler, "compile", _compile),
            mock.patch.object(plans, "pretended", lambda: False),
            mock.patch.object(plans, "RECORDED", 2),
            pretend(ARCHES["sm_90"], 132),
            backend("triton"),
        ):
            yield made
    finally:
        driver._active = previous


@dataclass(frozen=True)
class Address:
    at: int


def plain(value):
    """An argument of a launch, or a result, with addresses in place of what has one."""
    if isinstance(value, (torch.Tensor, plans._At)):
        return Address(value.data_ptr())
    if isinstance(value, TensorDescriptor):
        fields = {k: v for k, v in vars(value).items() if k != "base"}
        return tuple((k, tuple(v)) for k, v in sorted(fields.items())), plain(value.base)
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return Address(value) if type(value) is int and value > 1 << 32 else value


def launches_of(made, call):
    """(what `call` launches, what it returns, the memory that was made)"""
    made.launches.clear()
    with Memory() as memory:
        results = call()
    launches = tuple(
        (id(compiled), grid, stream, plain(tuple(arguments)))
        for compiled, grid, stream, arguments in made.launches
    )
    results = results.values() if isinstance(results, dict) else results
    returned = tuple(
        (t.dtype, t.shape, t.stride(), plain(t)) if t.numel() else (t.dtype, t.shape)
        for t in results
    )
    return launches, returned, memory


def leaves(value):
    return [x for v in value for x in leaves(v)] if isinstance(value, tuple) else [value]


def differ(by_plans, without):
    """Is a launch or a result another? Memory that is made may be made elsewhere, each piece in a
    place of its own."""
    bases = {}
    ours, theirs = leaves(by_plans[:2]), leaves(without[:2])
    if len(ours) != len(theirs):
        return True
    for one, other in zip(ours, theirs, strict=True):
        found = without[2].place(other.at) if isinstance(other, Address) else None
        if found is None:
            if type(one) is not type(other) or one != other:
                return True
        elif one.at % 16 != other.at % 16:
            return True
        else:
            bases.setdefault(found[0], set()).add(one.at - found[1])
    if any(len(places) != 1 for places in bases.values()):
        return True
    taken = sorted((place, without[2].made[i].nbytes()) for i, (place,) in bases.items())
    apart = all(a + size <= b for (a, size), (b, _) in itertools.pairwise(taken))
    return not apart or any(by_plans[2].place(place) is None for place, _ in taken)


def laid_out(t, draw):
    """`t` as it may also lie in memory."""
    how = draw.choice(("as it is", "as it is", "off", "padded", "transposed"))
    if how == "off":
        off = draw.choice((1, 4, 8))
        return torch.empty(t.numel() + off, dtype=t.dtype)[off:].view(t.shape)
    if how == "padded" and t.dim() > 1:
        wider = draw.choice((1, 8))
        return torch.empty(*t.shape[:-1], t.shape[-1] + wider, dtype=t.dtype)[..., : t.shape[-1]]
    if how == "transposed" and t.dim() > 1:
        return torch.empty(*t.shape[:-2], t.shape[-1], t.shape[-2], dtype=t.dtype).mT
    return t


def moved(t, shift=0, dtype=None):
    """Memory elsewhere in which a tensor lies as `t` does, but for so many elements."""
    off = t.data_ptr() % 16 // t.dtype.itemsize + shift
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    memory = torch.empty(max(off + last + 1, 0), dtype=dtype or t.dtype)
    return memory.as_strided(t.shape, t.stride(), off)


def again(inputs, dy, draw, case):
    """`inputs` and `dy`, of which some lie elsewhere, one on another boundary or otherwise, or all
    are of the other type of two bytes."""
    free = [k for k, t in inputs.items() if t.is_floating_point() and k not in case.draws]
    share = draw.choice((0, 0.2, 1))
    made = inputs | {k: moved(inputs[k]) for k in free if draw.random() < share}
    if free and draw.random() < 0.2:
        k = draw.choice(free)
        made[k] = moved(inputs[k], draw.choice((1, 8)))
    if free and draw.random() < 0.2:
        k = draw.choice(free)
        made[k] = laid_out(torch.empty(inputs[k].shape, dtype=inputs[k].dtype), draw)
    if dy is not None and draw.random() < 0.5:
        dy = moved(dy)
    if draw.random() < 0.1 and (dy is None or dy.dtype != torch.float32):
        other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
        made |= {k: moved(made[k], 0, other.get(made[k].dtype)) for k in free}
        dy = None if dy is None else moved(dy, 0, other[dy.dtype])
    return made, dy


def compared(names, rounds, seed):
    """(calls of `names` whose launches or results differ by plans, kernels that had a plan, kernels
    that had none) after so many calls of each, in layouts that are drawn and drawn again, of memory
    that is the same or another."""
    draw, differing, used = random.Random(seed), [], set()
    for launcher in BY_PLANS.values():
        launcher.plans.clear()
    with machine() as made:
        for name, case in ((name, CASES[name]) for name in names):
            pool = []
            for _ in range(rounds):
                if len(pool) > 5 or (pool and draw.random() < 0.7):
                    inputs, dy = again(*draw.choice(pool), draw, case)
                else:
                    inputs, dy = _drawn(case, draw)
                    pool.append((inputs, dy))
                call = lambda i=inputs, d=dy, c=case: evaluate(c.run, i, d)  # noqa: E731
                by_plans = launches_of(made, call)
                with plans.unplanned():
                    without = launches_of(made, call)
                if differ(by_plans, without):
                    layouts = {k: (tuple(t.shape), t.stride()) for k, t in inputs.items()}
                    differing.append((name, layouts))
            for kernel, launcher in BY_PLANS.items():
                if any(isinstance(plan, FunctionType) for plan in launcher.plans.values()):
                    used.add(kernel)
    return differing, sorted(used), sorted(BY_PLANS.keys() - used)


def _drawn(case, draw):
    M, D, H = draw.choice((1, 3, 40, 300)), draw.choice((16, 24, 128)), draw.choice((16, 40, 256))
    dtype = draw.choice((torch.bfloat16, torch.float16, torch.float32))
    inputs = case.inputs(M, D, H, dtype)
    inputs = {
        k: laid_out(t, draw) if t.is_floating_point() and k not in case.draws else t
        for k, t in inputs.items()
    }
    for pair in (("g", "u"), ("w_gate", "w_up")):
        if draw.random() < 0.3 and inputs.keys() >= set(pair):
            turns = torch.empty(*inputs[pair[0]].shape, 2, dtype=dtype)
            inputs |= zip(pair, turns.unbind(-1), strict=True)
    alike = [k for k, t in inputs.items() if k not in case.draws and k[0] != "w"]
    if draw.random() < 0.2:  # one tensor as two arguments
        first, second = draw.choice(alike), draw.choice(alike)
        if inputs[first].shape == inputs[second].shape:
            inputs[second] = inputs[first]
    out = case.fake_output(M, D, H)
    if case.forward_only:
        return inputs, None
    same = [inputs[k] for k in alike if inputs[k].shape == out.shape]
    if same and draw.random() < 0.3:
        return inputs, draw.choice(same)
    return inputs, laid_out(torch.empty(out.shape, dtype=dtype), draw)


@contextlib.contextmanager
def served():
    """`machine`, for calls that are not inside `Memory`."""
    serve_cpu()
    with machine() as made:
        yield made


def with_key(template, old, new, names, rounds):
    """Kernels of `names` that are launched wrongly where keys hold `new` in place of `old`."""
    text = getattr(plans, template)
    assert old in text
    plans._key_of.cache_clear()
    with mock.patch.object(plans, template, text.replace(old, new)):
        differing, _, _ = compared(names, rounds, 1)
    plans._key_of.cache_clear()
    return sorted({name for name, _ in differing})


def in_turn(kernel, *calls):
    """Which of these calls of one kernel launch something else by plans."""
    BY_PLANS[kernel].plans.clear()
    found = []
    with machine() as made:
        for i, arguments in enumerate(calls):
            results = []
            for launcher in (BY_PLANS[kernel], KERNELS[kernel].triton):
                call = lambda f=launcher, a=arguments: _tuple(f(*a))  # noqa: E731
                results.append(launches_of(made, call))
            if differ(*results):
                found.append(i)
    return found


def _tuple(results):
    return results if isinstance(results, tuple) else (results,)


def turns():
    """Gate and up in turn, then as far apart as any two, then in turn again."""
    both, other = torch.empty(40, 64, 2, dtype=torch.bfloat16), torch.empty(40, 64, 2)
    g, u = both.unbind(-1)
    apart = other.bfloat16().unbind(-1)[1]
    assert apart.stride() == u.stride()
    calls = [(g, u, "silu")] * 3 + [(g, moved(u), "silu")] * 3 + [(g, u, "silu")]
    return in_turn("gated_act_fwd", *calls)


def one_tensor_twice():
    """dh and u are one tensor, and then two."""
    dh, g, u = torch.empty(3, 40, 64, dtype=torch.bfloat16)
    return in_turn("gated_act_bwd", *[(u, g, u, "silu", None)] * 3, (dh, g, u, "silu", None))


def alone():
    """What launches otherwise by plans, of the kernels that no case reaches with its gradients."""
    z = torch.empty(40, 64, dtype=torch.bfloat16)
    logits = torch.empty(40, 7)
    return in_turn("linear_act_h", *[(z, "gelu")] * 4) + in_turn(
        "tree_path_fwd", *[(logits, 3)] * 4
    )


def watched():
    """(launches of 5 calls, how many a hook saw; how many of 2 more a hook of the kernel saw)"""
    seen = []
    hook = seen.append
    hooks = triton.knobs.runtime.launch_enter_hook
    g, u = torch.empty(2, 40, 64, dtype=torch.bfloat16)
    launcher = BY_PLANS["gated_act_fwd"]
    with machine() as made:
        for _ in range(3):
            launcher(g, u, "silu")
        hooks.add(hook)
        try:
            launcher(g, u, "silu")
            launcher(g, u, "silu")
        finally:
            hooks.remove(hook)
        before = len(made.launches)
        kernel = made.launches[0][0].source.fn
        ran = []
        kernel.add_pre_run_hook(lambda *args, **kwargs: ran.append(kernel))
        launcher(g, u, "silu")
        kernel.pre_run_hooks.clear()
        launcher(g, u, "silu")
        return before, len(seen), len(ran)


def under_settings():
    """(plans of one call after each of three drivers, of which the second debugs; plans and kernels
    of another by two ways to multiply float32)"""
    launcher = BY_PLANS["gated_act_fwd"]
    launcher.plans.clear()
    g, u = torch.empty(2, 40, 64, dtype=torch.bfloat16)
    counts = []
    for debug in (False, True, False):
        with machine(), mock.patch.object(triton.knobs.runtime, "debug", debug):
            for _ in range(3):
                launcher(g, u, "silu")
        counts.append(len(launcher.plans))
    x, w = torch.empty(40, 64), torch.empty(48, 64)
    launcher = BY_PLANS["linear_act_fwd"]
    launcher.plans.clear()
    before = torch.backends.cuda.matmul.fp32_precision
    with machine() as made:
        for how in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = how
            for _ in range(3):
                launcher(x, w, None, "gelu", True, False)
        kernels = {id(launch[0]) for launch in made.launches}
        torch.backends.cuda.matmul.fp32_precision = before
    return counts, len(launcher.plans), len(kernels)


def of_the_machine_for_ptx():
    """How many of 5 calls a machine sees that is no GPU, before a launch on the stand-in and, of
    another layout, after it."""
    seen = []
    for dtype in (torch.bfloat16, torch.float16):
        calls = []
        g, u = torch.empty(2, 40, 64, dtype=dtype)
        with emulate(ARCHES["sm_80"], calls=calls), backend("triton"):
            for _ in range(5):
                BY_PLANS["gated_act_fwd"](g, u, "silu")
        seen.append(len(calls))
        with machine():
            BY_PLANS["gated_act_fwd"](g, u, "silu")
    return seen


def on_other_boundaries():
    """Grids of launches where new memory is no longer on 16 bytes."""
    g, u = torch.empty(2, 40, 64, dtype=torch.bfloat16)
    launcher = BY_PLANS["gated_act_fwd"]
    launcher.plans.clear()
    with machine() as made:
        for _ in range(3):
            launcher(g, u, "silu")
        (plan,) = launcher.plans.values()
        (new,) = (k for k, v in plan.__globals__.items() if v is torch.Tensor.new_empty)
        off = lambda like, shape: like.new_empty(40 * 64 + 1)[1:].view(shape)  # noqa: E731
        plan.__globals__[new] = off
        made.launches.clear()
        h = launcher(g, u, "silu")
        ((_, _, _, arguments),) = made.launches
        return h.data_ptr() % 16, arguments[2] is h


def in_threads(threads, calls):
    """(launches, kernels launched without threads and with, errors) of a few layouts."""
    layouts = [torch.empty(2, rows, 64, dtype=torch.bfloat16).unbind() for rows in (1, 3, 40, 41)]
    launcher, errors = BY_PLANS["gated_act_fwd"], []
    launcher.plans.clear()

    def work(seed):
        draw = random.Random(seed)
        for _ in range(calls):
            g, u = draw.choice(layouts)
            h = launcher(g, u, "silu")
            if h.shape != g.shape:
                errors.append(h.shape)

    with machine() as made, mock.patch.object(plans, "MOST", 3):
        for g, u in layouts:
            launcher(g, u, "silu")
        alone = {(id(k), grid) for k, grid, _, _ in made.launches}
        made.launches.clear()
        pool = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        found = {(id(k), grid) for k, grid, _, _ in made.launches}
        return len(made.launches), found == alone, errors, len(launcher.plans)


def kept_alive():
    """Whether a tensor outlives its last use but for a plan."""
    x = torch.empty(40, 64, dtype=torch.bfloat16)
    w = torch.empty(48, 64, dtype=torch.bfloat16)
    with machine() as made:
        for _ in range(4):
            BY_PLANS["linear_act_fwd"](x, w, None, "gelu", True, False)
    made.launches.clear()
    found = [weakref.ref(x), weakref.ref(w)]
    del x, w
    gc.collect()
    return [ref() is not None for ref in found]


def tile_after_a_plan():
    """What explain() would say after a launch by a plan: the tile of the plan."""
    tiles, w = [], torch.empty(4096, 128, dtype=torch.bfloat16)
    with machine():
        for rows in (300, 300, 300, 3, 300):
            x = torch.empty(rows, 128, dtype=torch.bfloat16)
            BY_PLANS["linear_act_fwd"](x, w, None, "gelu", True, False)
            tiles.append(LAST["linear_act_fwd"])
    return tiles[-1] == tiles[2] != tiles[3]


class _Kernel:
    """As much of a kernel as `noted` asks for."""

    arg_names, pre_run_hooks = ("x", "n"), ()

    def __init__(self, made):
        self.made = made
        self.fn = lambda x, n: None

    def __getitem__(self, grid):
        def launch(x, n):
            compiled = Compiled(self.made, self)
            compiled.run(*grid, 1, 1, 7, id(self), Compiled.packed_metadata, None, None, None, x, n)
            return compiled

        return launch


ELSEWHERE = torch.empty(16)


def _reads(kernel):
    def launcher(x: Tensor) -> Tensor:
        plans.noted(kernel)[(1,)](x, int(x.sum().item()))
        return x.new_empty(3)

    return launcher


def _uses_another(kernel):
    def launcher(x: Tensor) -> Tensor:
        plans.noted(kernel)[(1,)](ELSEWHERE, 3)
        return x.new_empty(3)

    return launcher


def _changes_another(kernel):
    def launcher(x: Tensor) -> Tensor:
        ELSEWHERE.zero_()
        plans.noted(kernel)[(1,)](x, 3)
        return x.new_empty(3)

    return launcher


def _runs_out_of_memory(kernel):
    """Where a record keeps what a call would have given back."""

    def launcher(x: Tensor) -> Tensor:
        if plans.recording():
            raise torch.OutOfMemoryError("full")
        plans.noted(kernel)[(1,)](x, 3)
        return x.new_empty(3)

    return launcher


def _asks_for_its_place(kernel):
    def launcher(x: Tensor) -> Tensor:
        plans.noted(kernel)[(1,)](x, x.storage_offset())
        return x.new_empty(3)

    return launcher


def _well(kernel):
    def launcher(x: Tensor) -> Tensor:
        made = x.new_empty(16, 2)
        made[:, 0] += x[:16]
        made[:, 1] = 3
        plans.noted(kernel)[(1,)](made[1:], 3)
        return made.t()

    return launcher


def planned_or_not():
    """launcher -> whether its calls have a plan"""
    found = {}
    with machine() as made:
        makers = (_reads, _uses_another, _changes_another, _runs_out_of_memory,
                  _asks_for_its_place, _well)  # fmt: skip
        for maker in makers:
            launcher = plans.planned(maker(_Kernel(made)))
            for _ in range(4):
                launcher(torch.zeros(64))
            found[maker.__name__] = [isinstance(p, FunctionType) for p in launcher.plans.values()]
    return found


def of_another_triton():
    with mock.patch.object(triton, "__version__", "9.0.0"):
        launcher = KERNELS["gated_act_fwd"].triton
        return plans.planned(launcher) is launcher


def given_back():
    """The tensors that a plan still holds when it launches, of three that functions make one of
    another."""

    def launcher(x: Tensor) -> Tensor:
        twice = x * 2
        more = twice + 1
        plans.noted(kernel)[(1,)](more, 3)
        return x.new_empty(3)

    with machine() as made:
        kernel = _Kernel(made)
        planned = plans.planned(launcher)
        for _ in range(4):
            planned(torch.zeros(64))
        (plan,) = planned.plans.values()
        held = []
        launch = plan.__globals__
        (run,) = (k for k, v in launch.items() if getattr(v, "__name__", "") == "run")
        own = launch[run]

        def look(*args):
            frame = sys._getframe(1)
            held.extend(n for n, v in frame.f_locals.items() if isinstance(v, Tensor))
            return own(*args)

        launch[run] = look
        planned(torch.zeros(64))
    return held
