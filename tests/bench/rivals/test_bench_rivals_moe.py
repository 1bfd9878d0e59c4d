"""Each adapter of moe_mlp against a plain loop over experts: torch's and transformers' own
functions, and stand-ins with SonicMoE's and Liger's call."""

import enum
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fusedmlp.bench.rivals import RIVALS
from fusedmlp.bench.timing.calls import calls_of
from fusedmlp.bench.work import Work
from fusedmlp.reference.activations import ACTIVATIONS, resolve
from fusedmlp.testing import CASES, Case, assert_close_to

E = 4
M, D, H = 24, 16, 32
REAL = ("grouped-mm", "hf-eager", "hf-grouped-mm", "hf-batched-mm")
FAKED = ("sonicmoe", "liger-moe")
ROUTINGS = {
    "spread": lambda M: torch.arange(M) * 5 % 7 % E,
    "one expert has no token": lambda M: torch.tensor([3, 0, 2])[torch.arange(M) * 5 % 7 % 3],
    "first and last have none": lambda M: torch.arange(M) * 5 % 7 % 2 + 1,
    "one expert has every token": lambda M: torch.full((M,), 2),
    "two experts a token": lambda M: (torch.arange(M)[:, None] * 5 % 7 + torch.arange(2)) % E,
}
FLOATS = ("x", "prob", "w_gate", "w_up", "w_down")


def moe_mlp(x, expert, prob, w_gate, w_up, w_down, activation="silu"):
    gate, y = resolve(activation), torch.zeros_like(x)
    for e in range(len(w_gate)):
        own = gate.phi(x @ w_gate[e].T) * gate.psi(x @ w_up[e].T) @ w_down[e].T
        y = y + torch.where(expert == e, prob, 0).view(len(x), -1).sum(1, keepdim=True) * own
    return y


def shapes(M, D, H):
    return {"x": (M, D), "expert": (M,), "prob": (M,), "w_gate": (E, H, D), "w_up": (E, H, D),
            "w_down": (E, D, H)}  # fmt: skip


def case(shapes=shapes, **options):
    return Case("moe_mlp", moe_mlp, moe_mlp, shapes, options)


def work(dtype="float32", activation="silu", M=M, D=D, H=H, of=None):
    return Work(of or case(), activation, dtype, M, D, H)


def draw(here, routing="spread"):
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for name, shape in shapes(here.M, here.D, here.H).items():
        t = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        scale = shape[-1] ** -0.5 if name.startswith("w_") else 1
        inputs[name] = (scale * t).to(here.torch_dtype)
    expert = ROUTINGS[routing](here.M)
    prob = torch.rand(expert.shape, generator=generator).to(here.torch_dtype)
    return {**inputs, "expert": expert, "prob": prob}


def in_dtype(inputs, dtype):
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}


def gradients(function, inputs, times=1):
    """name -> gradient of each floating argument, after `times` backwards over one forward."""
    leaves = {
        n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()
    }
    out = function(leaves)
    dy = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    for _ in range(times):
        found = torch.autograd.grad(out, list(wanted.values()), dy, retain_graph=True)
    return dict(zip(wanted, found, strict=True))


def module(monkeypatch, name, **members):
    """Put a module of that dotted name, with its packages, where import finds it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if i == len(parts) or path not in sys.modules:
            made = types.ModuleType(path)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"
    REGLU = "reglu"


GLU = {
    ActivationType.SWIGLU: F.silu,
    ActivationType.REGLU: F.relu,
    ActivationType.GEGLU: lambda x: F.gelu(x, approximate="tanh"),
}


def experts_first(x, scores, expert, gate, up, down, act):
    """The op with its weights by (E, ...), one token at a time."""
    out = torch.zeros_like(x)
    k = len(expert) // len(x)
    for i, e in enumerate(expert.tolist()):
        t = x[i // k]
        own = scores[i] * (act(gate[e] @ t) * (up[e] @ t) @ down[e].T)
        out = out.index_add(0, torch.tensor([i // k]), own.unsqueeze(0))
    return out


def install_sonic(monkeypatch, interleaved=True):
    seen = {}

    def moe_general_routing_inputs(
        x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id,
        activation_type, is_inference_mode_enabled=False, concat_layout=False,
    ):  # fmt: skip
        (T, width), hidden = x.shape, w2.shape[1]
        assert w1.shape == (2 * hidden, width, E)
        assert w2.shape == (width, hidden, E)
        assert w1.stride() == (width, 1, 2 * hidden * width)
        assert w2.stride() == (hidden, 1, width * hidden)
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        k = len(token_indices) // T
        assert token_indices.tolist() == [row // k for row in range(T * k)]
        assert router_scores.shape == expert_indices.shape == (T * k,)
        assert b1 is None and b2 is None and isinstance(stream_id, int)
        seen["inference"] = is_inference_mode_enabled
        gate, up = (w1[::2], w1[1::2]) if interleaved else w1.chunk(2)
        gate, up, down = (w.permute(2, 0, 1) for w in (gate, up, w2))
        out = experts_first(x, router_scores, expert_indices, gate, up, down, GLU[activation_type])
        return out, torch.bincount(expert_indices, minlength=E)

    module(
        monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs
    )
    module(monkeypatch, "sonicmoe.enums", ActivationType=ActivationType)
    return seen


def install_liger(monkeypatch):
    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
            assert top_k_index.dtype == torch.int32
            assert top_k_index.shape == top_k_weights.shape and len(top_k_index) == len(x)
            assert gate_up_proj.is_contiguous() and down_proj.is_contiguous()
            gate, up = gate_up_proj.chunk(2, 1)
            flat = top_k_weights.flatten(), top_k_index.flatten()
            return experts_first(x, *flat, gate, up, down_proj, F.silu)

    module(
        monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=LigerFusedMoEFunction
    )  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    install_sonic(monkeypatch)
    install_liger(monkeypatch)


def forward(name, here, inputs):
    (call,) = calls_of(RIVALS[name], here, "forward", [inputs])
    return call()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", REAL + FAKED)
def test_results_are_those_of_a_loop_over_experts(installed, name, dtype, routing):
    here = work(dtype)
    inputs = draw(here, routing)
    out = forward(name, here, inputs)
    assert not out.requires_grad
    assert_close_to(out, moe_mlp(**in_dtype(inputs, torch.float64)), moe_mlp(**inputs))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", REAL + FAKED)
def test_gradients_are_those_of_a_loop_over_experts(installed, name, routing):
    rival, here = RIVALS[name], work()
    inputs = draw(here, routing)
    run = lambda t: moe_mlp(**t)  # noqa: E731
    exact, eager = (
        gradients(run, in_dtype(inputs, dtype)) for dtype in (torch.float64, torch.float32)
    )
    # Repacking is linear: an adapter brings the op's gradients into its own layout too.
    exact, eager = (rival.arguments(here, {**inputs, **g}) for g in (exact, eager))
    # The second backward alone shows whether the first overwrote what it needs.
    found = gradients(rival.function(here), rival.arguments(here, inputs), times=2)
    assert set(found) == {n for n, t in exact.items() if t.is_floating_point()}
    assert sum(g.numel() for g in found.values()) == sum(inputs[n].numel() for n in FLOATS)
    for argument, g in found.items():
        assert_close_to(g, exact[argument], eager[argument], name=argument)


def served():
    for name in REAL + FAKED:
        for activation in RIVALS[name].activations or ACTIVATIONS:
            yield pytest.param(name, activation, id=f"{name}-{activation}")


@pytest.mark.parametrize("name, activation", list(served()))
def test_every_activation_that_is_served_is_the_right_one(installed, name, activation):
    here = work(activation=activation)
    inputs = draw(here)
    exact = moe_mlp(**in_dtype(inputs, torch.float64), activation=activation)
    eager = moe_mlp(**inputs, activation=activation)
    assert_close_to(forward(name, here, inputs), exact, eager)


@pytest.mark.parametrize("name", REAL + FAKED)
def test_a_single_token(installed, name):
    here = work(M=1)
    inputs = draw(here)
    torch.testing.assert_close(forward(name, here, inputs), moe_mlp(**inputs))


@pytest.mark.parametrize("name", REAL)
def test_a_float32_probability_leaves_the_result_in_the_dtype_of_x(name):
    here = work("bfloat16")
    inputs = draw(here)
    inputs["prob"] = inputs["prob"].float()
    assert forward(name, here, inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("name", REAL + FAKED)
def test_weights_are_repacked_before_the_call(installed, monkeypatch, name):
    here = work()
    rival, inputs = RIVALS[name], draw(here)
    expected = moe_mlp(**inputs)
    arguments, run = rival.arguments(here, inputs), rival.function(here)
    assert sum(t.numel() for t in arguments.values() if t.dim() == 3) == 3 * E * D * H

    def late(*args, **kwargs):
        raise AssertionError("repacked inside what is timed")

    for pack in ("cat", "stack", "concat", "hstack", "vstack"):
        monkeypatch.setattr(torch, pack, late)
    torch.testing.assert_close(run(arguments), expected)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_transformers_runs_the_implementation_that_is_named(monkeypatch, implementation):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as functions

    called = []
    for name in functions.valid_keys():
        spy = lambda *args, f=functions[name], n=name: called.append(n) or f(*args)  # noqa: E731
        monkeypatch.setitem(functions._global_mapping, name, spy)
    here = work()
    forward(f"hf-{implementation.replace('_', '-')}", here, draw(here))
    assert called == [implementation]
    forward("hf-eager", here, draw(here))
    assert called == [implementation]


def test_grouped_gemm_is_captured_whole_by_compile(monkeypatch):
    asked, compiled = {}, torch.compile

    def without_inductor(run, *, fullgraph, dynamic, **options):
        asked.update(options, fullgraph=fullgraph, dynamic=dynamic)
        return compiled(run, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", without_inductor)
    rival, here = RIVALS["compile-grouped-mm"], work("bfloat16")
    inputs = draw(here, "first and last have none")
    exact = in_dtype(inputs, torch.float64)
    assert_close_to(forward(rival.name, here, inputs), moe_mlp(**exact), moe_mlp(**inputs))
    assert asked == {"mode": "max-autotune-no-cudagraphs", "fullgraph": True, "dynamic": False}
    with rival.preparing("backward"):
        found = gradients(rival.function(here), rival.arguments(here, inputs), times=2)
    plain = gradients(RIVALS["grouped-mm"].function(here), rival.arguments(here, inputs))
    torch.testing.assert_close(found, plain)


def test_grouped_gemm_is_found_under_either_name(monkeypatch):
    here, asked = work(), work("bfloat16")
    inputs = draw(here)
    monkeypatch.delattr(F, "grouped_mm")
    torch.testing.assert_close(forward("grouped-mm", here, inputs), moe_mlp(**inputs))
    monkeypatch.delattr(torch, "_grouped_mm")
    for name in ("grouped-mm", "compile-grouped-mm"):
        assert RIVALS[name].skip(asked, "forward") == "this torch has no grouped GEMM"


def test_sonicmoe_saves_for_a_backward_only_where_there_is_one(monkeypatch):
    seen = install_sonic(monkeypatch)
    here = work()
    rival, inputs = RIVALS["sonicmoe"], draw(here)
    forward("sonicmoe", here, inputs)
    assert seen["inference"] is True
    gradients(rival.function(here), rival.arguments(here, inputs))
    assert seen["inference"] is False


def test_a_rival_with_another_layout_is_found_out(monkeypatch):
    here = work()
    inputs = draw(here)
    install_sonic(monkeypatch, interleaved=False)
    with pytest.raises(AssertionError, match="max error"):
        exact = moe_mlp(**in_dtype(inputs, torch.float64))
        assert_close_to(forward("sonicmoe", here, inputs), exact, moe_mlp(**inputs))


def test_who_serves_it(installed):
    def servers(activation="silu", dtype="bfloat16", phase="both", of=None):
        asked = work(dtype, activation, of=of)
        return {name for name, rival in RIVALS.items() if rival.skip(asked, phase) is None}

    own, torchs = {"fusedmlp", "eager", "compile"}, {"grouped-mm", "compile-grouped-mm"}
    hf = {"hf-eager", "hf-grouped-mm", "hf-batched-mm"}
    every = own | torchs | hf | set(FAKED)
    assert servers() == servers(phase="forward") == servers(phase="backward") == every
    assert servers("relu") == every - {"liger-moe"}
    assert servers("gelu") == own | torchs | hf
    assert servers("bsilu") == own | torchs
    assert servers(dtype="float16") == every - {"compile-grouped-mm"}
    assert servers(dtype="float32") == every - {"compile-grouped-mm", "sonicmoe"}
    assert servers(of=case(recompute=True)) == own
    assert servers(of=case(packed="gate_up")) == own
    assert servers(of=case(lambda *sizes: {**shapes(*sizes), "b_gate": (E, sizes[2])})) == own
    dense = Work(CASES["gated_mlp"], "silu", "bfloat16", 8, 16, 16)
    for name in every - own:
        assert RIVALS[name].skip(dense, "forward") == "does not serve gated_mlp"


def test_reasons_are_words_for_a_user(installed):
    def reason(name, **sizes):
        return RIVALS[name].skip(work("bfloat16", **sizes), "forward")

    for name in ("grouped-mm", "compile-grouped-mm", "hf-grouped-mm", "sonicmoe"):
        for odd in ({"D": 12}, {"H": 12}):
            assert "multiples of 16 bytes" in reason(name, **odd)
    assert reason("hf-eager", D=12) is None
    assert reason("hf-batched-mm", M=64, D=4096, H=8192) is None
    assert "would copy 412 GB of weights" in reason("hf-batched-mm", M=2048, D=4096, H=8192)
    for name in ("sonicmoe", "compile-grouped-mm"):
        assert "bfloat16" in RIVALS[name].skip(work(), "forward")


@pytest.mark.parametrize(
    "name, package",
    [("hf-eager", "transformers.integrations.moe"), ("hf-grouped-mm", "transformers"),
     ("sonicmoe", "sonicmoe"), ("liger-moe", "liger_kernel")],
)  # fmt: skip
def test_a_missing_rival_gives_its_reason(monkeypatch, name, package):
    for known in [m for m in sys.modules if m.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, package, None)
    reason = RIVALS[name].skip(work("bfloat16"), "forward")
    assert reason.startswith("cannot be imported: ModuleNotFoundError")
