"""What bench computes by hand: FLOPs, bytes, rooflines, statistics; real sizes; tables."""

import dataclasses
import io
import subprocess
import sys
from collections import Counter

import pytest
import torch
import transformers as hf

from fusedmlp.backends.op import OPS
from fusedmlp.bench import machine, render, shapes
from fusedmlp.bench.timing import stats
from fusedmlp.bench.work import (
    DGLU,
    DTYPES,
    PHASES,
    Work,
    activations_of,
    case_of,
    default_activation,
    ops,
)  # fmt: skip
from fusedmlp.progress import Progress
from fusedmlp.testing import CASES


def work(case="gated_mlp", dtype="bfloat16", M=3, D=5, H=7):
    return Work(CASES[case], "silu", dtype, M, D, H)


def test_flops_of_each_phase():
    # x Wg', x Wu' and h Wd': three GEMMs of 2 * 3 * 5 * 7 each.
    assert work().flops("forward") == 630
    assert work().flops("backward") == 1260
    assert work().flops("both") == 1890


def test_bytes_of_each_phase():
    # x 15, three weights 35 each, y 15. Backward: those and dy read, dx and three dW written.
    assert work().bytes("forward") == 2 * (15 + 105 + 15)
    assert work().bytes("backward") == 2 * (120 + 15 + 120)
    assert work().bytes("both") == work().bytes("forward") + work().bytes("backward")
    assert work(dtype="float32").bytes("forward") == 4 * 135


def test_bytes_of_masks():
    """Logits are numbers with a gradient, bits are 1 byte for 8 weights and have none."""
    numbers = 15 + 35 + 21
    logits, bits = work("masked_gated_linear-1"), work("masked_gated_linear-1-bits")
    assert logits.bytes("forward") == 2 * (numbers + 35)
    assert logits.bytes("backward") == 2 * (numbers + 35 + 15 + 35 + 35)
    assert bits.bytes("forward") == 2 * numbers + 7
    assert bits.bytes("backward") == 2 * (numbers + 15 + 35) + 7


def test_the_gemm_of_a_backward_alone():
    # Reads dy 15, w_down 35, g and u 42; writes dg, du and h.
    assert work().bytes(DGLU) == 2 * (15 + 35 + 42 + 3 * 21)
    assert work().flops(DGLU) == 2 * 3 * 5 * 7 and work().gemm(DGLU) == (3, 7, 5)


def test_every_op_once_and_new_ones_last(monkeypatch):
    own, op = ops(), OPS["mlp"]
    assert sorted(own) == sorted({case.op for case in CASES.values()})
    for name, changes in {
        "new": {},
        "parts": {"within": "mlp"},
        "inner": {"public": False},
    }.items():
        monkeypatch.setitem(OPS, name, dataclasses.replace(op, name=name, **changes))
    assert ops() == [*own, "new"]


def test_bytes_of_the_elementwise_backward():
    # Reads g, u, dh; writes dg, du.
    assert work("gated_act").bytes("backward") == 2 * 5 * 3 * 7


@pytest.mark.parametrize(
    "case, gemm",
    [
        ("gated_act", None),
        ("gated_linear", (3, 14, 5)),
        ("gated_mlp-up_gate-bias", (3, 14, 5)),
        ("linear_act", (3, 7, 5)),
        ("mlp-bias", (3, 7, 5)),
    ],
)
def test_first_gemm(case, gemm):
    assert work(case).gemm() == gemm


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("phase", PHASES)
def test_every_case_has_flops_and_bytes(case, phase):
    assert work(case).flops(phase) > 0
    assert work(case).bytes(phase) > 0


def test_default_activations_are_the_functions_own():
    assert default_activation(CASES["gated_mlp"]) == "silu"
    assert default_activation(CASES["mlp"]) == "gelu"
    assert activations_of(CASES["mlp"], ("relu", "tanh")) == ("relu", "tanh")
    assert activations_of(CASES["mlp"], None) == ("gelu",)


def test_a_case_without_an_activation_takes_none():
    for asked in (None, ("silu", "gelu")):
        assert activations_of(CASES["moe_linear"], asked) == ("identity",)


def test_unknown_case_is_named():
    with pytest.raises(ValueError, match="gated_mlp.*got 'swiglu'"):
        case_of("swiglu")


def test_roofline_by_hand():
    h100 = machine.ROOFS["H100"]
    # 989.4e9 FLOP take 1 ms by computing; 3.35e9 bytes take 1 ms by moving.
    assert h100.milliseconds(989.4e9, 0, "bfloat16") == pytest.approx(1)
    assert h100.milliseconds(0, 3.35e9, "bfloat16") == pytest.approx(1)
    assert h100.milliseconds(989.4e9, 2 * 3.35e9, "float16") == pytest.approx(2)
    assert h100.milliseconds(66.9e9, 0, "float32") == pytest.approx(1)
    assert h100.bound(989.4e9, 1, "bfloat16") == "compute"
    assert h100.bound(1, 3.35e9, "bfloat16") == "memory"
    assert machine.ROOFS["B200"].milliseconds(2250e9, 0, "bfloat16") == pytest.approx(1)
    assert machine.ROOFS["H200"].milliseconds(0, 4.8e9, "bfloat16") == pytest.approx(1)


def test_every_roof_knows_every_dtype_and_its_row():
    for name, roof in machine.ROOFS.items():
        assert set(roof.flops) == set(DTYPES)
        assert roof in machine.ARCH_OF[name].roofs
    # The fastest of the table: the most FLOP/s, and the most bytes.
    assert machine.shortest_ms(2250e9, 0, "bfloat16") == pytest.approx(1)
    assert machine.shortest_ms(0, 8e9, "bfloat16") == pytest.approx(1)


def test_machine_says_what_a_number_depends_on():
    found = machine.describe()
    assert found["torch"] == torch.__version__
    assert {"gpu", "driver", "cuda", "triton", "python", "commit", "clocks"} <= set(found)
    if not torch.cuda.is_available():
        assert found["gpu"] is None
        assert found["clocks"] is None
        assert "GPU: none found by torch" in machine.lines(found)


def test_commit_names_a_checkout_and_says_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() is None

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = machine.commit()
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert machine.commit() == f"{clean}-dirty"


def test_models_are_what_their_configs_say():
    assert (shapes.MODELS["llama3-8b"].D, shapes.MODELS["llama3-8b"].H) == (4096, 14336)
    gpt2 = shapes.MODELS["gpt2"]
    assert (gpt2.D, gpt2.H, gpt2.activation, gpt2.gated, gpt2.bias) == (
        768, 3072, "gelu_tanh", False, True,
    )  # fmt: skip
    assert shapes.MODELS["llama4-scout"].experts == 16
    assert set(shapes.DENSE) | set(shapes.MOE) | set(shapes.HYPER) == set(shapes.MODELS)
    assert set(shapes.CAMPAIGN) <= set(shapes.DENSE)
    kinds = (shapes.DENSE, shapes.MOE, shapes.HYPER)
    assert sum(map(len, kinds)) == len(shapes.MODELS)
    assert all(m.experts is None and not m.hyper for m in shapes.DENSE.values())
    assert all(name.startswith("hyperglu") == m.hyper for name, m in shapes.MODELS.items())
    plain = {name: m for name, m in shapes.MODELS.items() if not m.gated}
    assert set(plain) == {"gpt2", "gpt2-xl", "bert-base", "minilm"}
    assert all(m.H == 4 * m.D for m in plain.values())
    assert {name for name, m in shapes.MODELS.items() if m.bias} == {*plain, "gpt-oss-20b"}
    assert {m.activation for m in plain.values()} == {"gelu", "gelu_tanh"}


# Models whose numbers are the defaults of their config.
CONFIGS = {
    "llama2-7b": hf.LlamaConfig, "mistral-7b": hf.MistralConfig, "phi3-mini": hf.Phi3Config,
    "gpt2": hf.GPT2Config, "bert-base": hf.BertConfig, "mixtral-8x7b": hf.MixtralConfig,
    "deepseek-v3": hf.DeepseekV3Config, "llama4-scout": hf.Llama4TextConfig,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_those_of_transformers(name):
    model, config = shapes.MODELS[name], CONFIGS[name]()
    widths = ("moe_intermediate_size", "intermediate_size", "n_inner")
    width = next((w for key in widths if (w := getattr(config, key, None))), 4 * config.hidden_size)
    assert (config.hidden_size, width) == (model.D, model.H)
    assert model.experts == getattr(config, "num_local_experts", None)
    assert model.top_k == getattr(config, "num_experts_per_tok", None)


def test_a_model_of_one_expert_a_token_needs_no_top_k():
    one = shapes.Model("one", 8, 16, experts=4)
    assert shapes.cases_of(one) == shapes.cases_of(dataclasses.replace(one, top_k=1))


@pytest.mark.parametrize("name", shapes.DENSE)
def test_a_models_cases_exist_and_fit_it(name):
    model = shapes.DENSE[name]
    cases = shapes.cases_of(model)
    assert set(cases) <= set(CASES)
    gated = {CASES[case].op.startswith("gated") for case in cases}
    assert gated == {model.gated}
    if model.bias:
        assert all(case.endswith("-bias") for case in cases)


@pytest.mark.parametrize("name", shapes.MOE)
def test_a_model_of_experts_is_timed_with_as_many(name):
    """Evenly, half of all tokens to one expert, and every other expert empty."""
    model = shapes.MOE[name]
    cases = [case_of(case) for case in shapes.cases_of(model)]
    assert len(cases) == (3 if model.top_k == 1 else 2)
    generator = torch.Generator().manual_seed(0)
    k, counts = model.top_k, []
    for case in cases:
        own = case.shapes(8192, 4, 2)
        assert own["w_gate"] == (model.experts, 2, 4)
        assert own["expert"] == own["prob"] == ((8192, k) if k > 1 else (8192,))
        assert ("b_down" in own) == model.bias
        expert = case.draws["expert"](own["expert"], generator).view(8192, k)
        assert (expert.sort(1)[0].diff(dim=1) > 0).all()  # a token's experts differ
        counts.append(torch.bincount(expert[:, 0], minlength=model.experts))
    even, skewed, *sparse = counts
    assert even.min() > 0 and even.max() < 3 * 8192 / model.experts
    assert 0.45 < skewed.max() / 8192 < 0.6
    assert all((c == 0).sum() == model.experts // 2 for c in sparse)
    # A GEMM of as many rows is what its speed is compared with.
    assert Work(cases[0], "silu", "bfloat16", 64, 8, 16).gemm() == (64 * k, 32, 8)


def test_quantiles_by_hand():
    samples = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert stats.summarize(samples) == stats.Summary(median=3.0, q20=1.8, q80=4.2)
    assert stats.quantile([1.0, 2.0], 0.5) == 1.5
    assert stats.summarize([7.0]) == stats.Summary(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no samples"):
        stats.summarize([])


def test_interleaving_takes_one_of_each_per_round_and_rotates():
    taken = []

    def sampler(name):
        return lambda: taken.append(name) or float(len(taken))

    rounds = []
    samples = stats.interleave(
        {name: sampler(name) for name in "abc"}, 3, lambda: rounds.append(len(taken))
    )
    assert "".join(taken) == "abcbcacab"
    assert rounds == [3, 6, 9]
    assert samples == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}
    assert Counter(taken) == {"a": 3, "b": 3, "c": 3}


def test_a_drifting_clock_does_not_favour_anyone():
    now = [1.0]

    def slower_and_slower():
        now[0] *= 1.1
        return now[0]

    samples = stats.interleave(dict.fromkeys("ab", slower_and_slower), 20)
    a, b = (stats.summarize(samples[name]).median for name in "ab")
    # Block after block, b's median would be 1.1 ** 20 = 6.7 times a's.
    assert a == pytest.approx(b, rel=0.11)


def test_plain_tables_need_no_rich(monkeypatch):
    monkeypatch.setattr(render, "rich", None)
    out = io.StringIO()
    render.table("Title", ("name", "ms"), [["a", "1.5"], ["longer", "10"]], out)
    assert out.getvalue() == ("\nTitle\nname     ms\n------  ---\na       1.5\nlonger   10\n")
    rows = [["a", "1.5", "1"], ["longer", "-", "of 2"], ["", "inf", "3"]]
    assert render.plain_table(("name", "ms", "mixed"), rows).splitlines() == [
        "name     ms  mixed", "------  ---  -----", "a       1.5  1", "longer    -  of 2",
        "        inf  3",
    ]  # fmt: skip


def test_a_paragraph_is_broken_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    out = Terminal()
    render.say("four long-words, and one of many-many-letters", out)
    assert out.getvalue().splitlines() == [
        "four", "long-words,", "and one of", "many-many-letters",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_is_for_terminals_only(monkeypatch, with_rich):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal, file = Terminal(), io.StringIO()
    for err in (terminal, file):
        with Progress("check", 2, err) as progress:
            progress.step("one [bold]")
            progress.step("two")
    assert file.getvalue() == ""
    assert "2/2" in terminal.getvalue()


@pytest.mark.parametrize(
    "value, text",
    [(None, "-"), (0, "0"), (0.01234, "0.0123"), (12345.6, "12346"), (1e-6, "1.00e-06"),
     (float("inf"), "inf"), (999.4, "999"), (999.6, "1000"), (1000.4, "1000"), (-1000, "-1000"),
     (0.001, "0.001"), (99999, "99999"), (1e5, "1.00e+05"), (0.00099, "9.90e-04")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert render.number(value) == text


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_600, "1 MB"),
     (12_345_678, "12.3 MB"), (999_600_000, "1 GB"), (1_234_000_000_000, "1234 GB")],
)  # fmt: skip
def test_sizes_are_short(count, text):
    assert render.size(count) == text
