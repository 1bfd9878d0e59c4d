"""`predict` and the default command: what a machine without a GPU can say."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from default_command import judge

from fusedmlp.backends.op import OPS
from fusedmlp.bench import check, cli, overview, predict, render
from fusedmlp.bench.machine import ARCH_OF, ROOFS, ROOT
from fusedmlp.bench.saved import saved_bytes
from fusedmlp.bench.shapes import DENSE
from fusedmlp.bench.timing.session import plan
from fusedmlp.bench.work import DGLU, Work
from fusedmlp.kernels import pick
from fusedmlp.kernels.arch import ARCHES, arch_for
from fusedmlp.kernels.arch.tile import Tile
from fusedmlp.testing import CASES


def work(case="gated_linear", dtype="bfloat16", M=4096, D=4096, H=14336):
    return Work(CASES[case], "silu", dtype, M, D, H)


def test_a_record_by_hand():
    h100 = next(r for r in predict.predict(work(), "forward") if r["gpu"] == "H100")
    assert h100["flops"] == 4 * 4096 * 4096 * 14336
    assert h100["bytes"] == 2 * (4096 * 4096 + 2 * 14336 * 4096 + 4096 * 14336)
    assert h100["roofline_ms"] == pytest.approx(h100["flops"] / 989.4e12 * 1e3)
    assert h100["bound"] == "compute"
    assert "computed" in h100["source"]
    assert "median_ms" not in h100


def test_one_token_is_bound_by_memory():
    for record in predict.predict(work(M=1), "forward"):
        assert record["bound"] == "memory"
        seconds = record["bytes"] / ROOFS[record["gpu"]].bytes_per_s
        assert record["roofline_ms"] == pytest.approx(seconds * 1e3)


KEPT = {  # by one value of 16 bits for each: g and u, z; the order of 64 tokens on 3 experts
    "gated_mlp": 2 * 64 * 48 * 2,
    "mlp": 64 * 48 * 2,
    "moe_mlp": 2 * 64 * 48 * 2 + 4 * (64 + 3 + 2),
    "gated_mlp-recompute-bias": 0,
    "gated_act": 0,
}


@pytest.mark.parametrize("phase", ("forward", "backward", "both", DGLU))
@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_for_a_backward(case, phase):
    found = saved_bytes(work(case, M=64, D=32, H=48), phase, ARCH_OF["H100"])
    assert found == (KEPT[case] if phase in ("backward", "both") else None)


@pytest.mark.parametrize("phase", ("forward", "backward", "both"))
@pytest.mark.parametrize("case", ("gated_mlp", "mlp", "moe_mlp"))
def test_the_sum_over_kernels_is_no_less_than_the_roofline(case, phase):
    for record in predict.predict(work(case), phase):
        least = record["least_ms"]
        assert least is not None and least >= 0.999 * record["roofline_ms"]
        # A backward's epilogue lies in the open, so an op is not twice what a roofline says.
        assert least < 4 * record["roofline_ms"]
    (h100, *_) = predict.predict(work("gated_linear", dtype="float32"), "forward")
    assert h100["least_ms"] is None


def test_a_last_wave_counts_whole():
    def least(H):
        (h100, *_) = predict.predict(work(M=4096, D=4096, H=H), "forward")
        return h100["least_ms"]

    # 32 x 33 tiles are 8 waves on 132 multiprocessors; one column of tiles more begins a ninth.
    assert least(33 * 128) < 1.02 * least(32 * 128)
    assert least(34 * 128) > 1.1 * least(33 * 128)


def test_launches_follow_the_table_of_tiles():
    h100 = ROOFS["H100"]
    (launch,) = predict.launches(work(), "forward", h100)
    first = ARCH_OF["H100"].tiles["gated_linear_fwd", 2][0]
    assert launch.tile == first
    assert launch.tiles == -(-4096 // first.block_m) * -(-14336 // first.block_n)
    assert launch.waves == pytest.approx(launch.tiles / 132)


def test_experts_have_whole_tiles_and_one_more_for_each_seam():
    """Three experts of 100 rows in all; a weight's gradient has tiles of its own for each."""
    M, D, H, E = 100, 200, 300, 3
    found = predict.launches(work("moe_mlp", M=M, D=D, H=H), "backward", ROOFS["H100"])
    rows = {"moe_dh": (H, None), "moe_down": (D, None), "moe_wgrad": (D, H)}
    assert [launch.kernel for launch in found] == list(rows)
    for launch in found:
        m, n = launch.tile.block_m, launch.tile.block_n
        columns, own = rows[launch.kernel]
        tall = E * -(-own // m) if own else M // m + E
        assert launch.tiles == tall * -(-columns // n), launch
        assert launch.waves == pytest.approx(launch.tiles / 132) and launch.splits == 1


def test_few_rows_are_cut_along_k():
    (launch,) = predict.launches(work(M=1), "forward", ROOFS["H100"])
    assert launch.tile.skinny
    assert launch.splits > 1
    assert launch.waves == pytest.approx(launch.tiles * launch.splits / 132)


def test_ragged_widths_take_element_loads():
    (launch,) = predict.launches(work(D=4093, H=1021), "forward", ROOFS["H100"])
    assert launch.tile.loads == "element"
    assert launch.tiles == 4096 // launch.tile.block_m * -(-1021 // launch.tile.block_n)


def test_several_masks_have_tiles_of_their_own():
    for masks, name in ((1, "masked_gated_linear_fwd"), (4, "masked_gated_linear_fwd_group")):
        (launch,) = predict.launches(work(f"masked_gated_linear-{masks}"), "forward", ROOFS["H100"])
        assert launch.kernel == name


def test_a_block_launches_forward_and_backward():
    def names(phase):
        planned = predict.launches(work("gated_mlp"), phase, ROOFS["B200"])
        return [launch.kernel for launch in planned]

    assert names("forward") == ["gated_linear_fwd"]
    assert names("backward") == ["gated_linear_bwd"]
    assert names("both") == ["gated_linear_fwd", "gated_linear_bwd"]
    assert predict.launches(work("gated_act"), "both", ROOFS["B200"]) == []


def test_kernels_are_those_of_the_tile_table():
    known = {name for arch in ARCHES.values() for name, _ in arch.tiles}
    named = {kernel.name for op in OPS for kernel in predict.kernels(op, "both")}
    # Several masks, and adapters, have tiles of their own.
    adapted = {f"{name}_adapted" for name in named if f"{name}_adapted" in known}
    assert len(adapted) == 4
    assert named | {"masked_gated_linear_fwd_group"} | adapted == known


@pytest.mark.parametrize(
    "case, forward, backward",
    [("gated_mlp-lora", "_adapted", "_adapted"), ("gated_mlp-lora-down", "", "_adapted"),
     ("gated_mlp-lora-gate", "_adapted", ""), ("mlp-lora", "_adapted", "_adapted")],
)  # fmt: skip
def test_adapters_are_planned_on_their_rows(case, forward, backward):
    kernels = ("gated_linear_fwd", "gated_linear_bwd")
    if case.startswith("mlp"):
        kernels = ("linear_act_fwd", "linear_act_bwd")
    planned = predict.launches(work(case), "both", ROOFS["H100"])
    wanted = [f"{kernels[0]}{forward}", f"{kernels[1]}{backward}"]
    assert [launch.kernel for launch in planned] == wanted


def test_planning_does_not_look_like_launching(monkeypatch):
    monkeypatch.setattr(pick, "LAST", {"linear_act_fwd": "really ran"})
    predict.launches(work(), "forward", ROOFS["H100"])
    assert pick.LAST == {"linear_act_fwd": "really ran"}


@pytest.mark.parametrize(
    "registers, shared, warps, blocks",
    [
        # 128 registers x 32 threads x 8 warps = 32768: two blocks of the 65536 registers.
        (128, 0, 8, 2),
        # 129 rounds up to 136 registers a thread: one block only.
        (129, 0, 8, 1),
        # Hopper has 228 KiB; each block costs its own and 1 KiB more.
        (32, 113 * 1024, 4, 2),
        (32, 114 * 1024, 4, 1),
        # 2048 threads of 32 registers.
        (32, 0, 4, 16),
    ],
)
def test_blocks_at_once_by_hand(registers, shared, warps, blocks):
    tile = Tile(64, 64, 32, warps, 2)
    assert predict.blocks_at_once(arch_for(90), tile, registers, shared) == blocks


def test_blocks_share_tensor_memory_and_threads():
    tile = Tile(64, 64, 32, 4, 2)
    tensors = [predict.blocks_at_once(ARCH_OF["B200"], tile, 32, 0, n) for n in (512, 256, 0)]
    assert tensors == [1, 2, 16]
    for arch in ARCHES.values():
        assert predict.blocks_at_once(arch, tile, 32, 0) == arch.threads // 128


def test_the_compilers_words_reach_their_launch():
    records = predict.predict(work(), "forward")
    tile = records[0]["launches"][0]["tile"]
    row = {
        "arch": ARCH_OF["H100"].name, "kernel": "gated_linear_fwd:_fwd_kernel",
        "dtype": "bfloat16", "tensor_memory": 0,
        "tile": tile, "variant": "train", "registers": 168, "shared": 200_000,
    }  # fmt: skip
    predict.add_compiled(records, [{**row, "variant": "infer", "registers": 1}, row])
    for record in records:
        (launch,) = record["launches"]
        if ARCH_OF[record["gpu"]] is ARCH_OF["H100"]:
            assert (launch["registers"], launch["shared"]) == (168, 200_000)
            assert launch["blocks_at_once"] == 1
        else:
            assert "registers" not in launch


def test_blocks_at_once_are_those_of_the_launchs_own_tile():
    """Where registers and memory are no limit, threads are: the fewer warps, the more blocks."""
    arch = ARCH_OF["H100"]
    (kernel, size_of), tiles = next(iter(arch.tiles.items()))
    assert len({tile.num_warps for tile in tiles}) > 1
    dtype = {2: "bfloat16", 4: "float32"}[size_of]
    for tile in tiles:
        launch = {"kernel": kernel, "tile": str(tile)}
        row = {
            "arch": arch.name, "kernel": f"{kernel}:main", "dtype": dtype, "tensor_memory": 0,
            "tile": str(tile), "variant": "train", "registers": 1, "shared": 0,
        }  # fmt: skip
        predict.add_compiled([{"gpu": "H100", "dtype": dtype, "launches": [launch]}], [row])
        assert launch["blocks_at_once"] == predict.blocks_at_once(arch, tile, 1, 0)


def test_the_table_says_what_the_records_say(monkeypatch):
    """In a wide terminal; in a narrow one the first GPU's column is the last to go."""
    records = predict.predict(work("gated_mlp", M=64, D=256, H=512), "both")
    text = shown(monkeypatch, records, 400)
    (line,) = [line for line in text.splitlines() if line.startswith("gated_mlp ")]
    h100, flops = records[0], 18 * 64 * 256 * 512 / 1e9
    assert line.split()[6:11] == [render.number(flops), *render.size(h100["bytes"]).split(),
                                  *render.size(h100["saved_bytes"]).split()]  # fmt: skip
    times = [f"{render.number(r['roofline_ms'])} {r['bound']}, kernels" for r in records]
    assert all(time in line for time in times)
    narrow = " ".join(shown(monkeypatch, records, 60).split())
    kept, left = narrow.split("Left out, for want of columns: ")
    first, *others = (f"{name} ms, bound" for name in ROOFS)
    assert first in kept and not any(gpu in kept for gpu in others)
    assert left.startswith("activation, saved, ") and left.endswith(" more.")


def shown(monkeypatch, records, columns):
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    out.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(render, "rich", None)
    predict.show(records)
    return out.getvalue()


LAUNCHED = [{"gpu": "H100", "dtype": "bfloat16", "launches": [{"kernel": "linear_act_fwd"}]}]


def test_compiling_runs_the_gate_without_the_interpreter(monkeypatch):
    seen, name = {}, ARCH_OF["H100"].name

    def run(argv, env, **options):
        seen.update(argv=argv, env=env)
        with open(argv[argv.index("--json") + 1], "w") as file:
            json.dump([{"arch": name}], file)
        return subprocess.CompletedProcess(argv, 0, b"", b"")

    monkeypatch.setattr(predict.subprocess, "run", run)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert predict.compile_kernels(LAUNCHED) == [{"arch": name}]
    assert "TRITON_INTERPRET" not in seen["env"]
    assert seen["argv"][1:3] == ["-m", "fusedmlp.bench.gate.kernels"]
    wanted = ["--arch", name, "--kernel", "linear_act_fwd", "--dtype", "bfloat16"]
    assert seen["argv"][-6:] == wanted


def test_a_failed_gate_is_an_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 2, b"", b"ptxas is missing")
    monkeypatch.setattr(predict.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(predict.Refusal, match="ptxas is missing"):
        predict.compile_kernels(LAUNCHED)


def test_command_prints_and_writes_computed_figures(tmp_path, capsys):
    file = tmp_path / "predicted.json"
    argv = ["predict", "--model", "gpt2", "--m", "8", "--phase", "forward", "--json", str(file)]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "8x768x3072" in text
    figures, launched = text.split("Launches as planned: computed, nothing was run\n")
    assert "linear_act_fwd" in launched and "linear_act_fwd" not in figures
    assert f"\nAll of this is {predict.COMPUTED}.\n" in text
    records = json.loads(file.read_text())["records"]
    assert {r["case"] for r in records} == {"linear_act-bias", "mlp-bias"}
    assert {r["activation"] for r in records} == {"gelu_tanh"}
    assert {r["gpu"] for r in records} == set(ROOFS)


def test_what_has_no_backward_is_predicted_forward(tmp_path, capsys):
    file = tmp_path / "predicted.json"
    argv = ["predict", "--model", "hyperglu-2", "--m", "4096", "--json", str(file)]
    assert cli.main(argv) == 0
    records = json.loads(file.read_text())["records"]
    phases = {
        op: {r["phase"] for r in records if r["op"] == op} for op in {r["op"] for r in records}
    }
    both = {"forward", "backward"}
    assert phases == {"hyper_attention": both, "hyper_attention_step": {"forward"}}


def test_ops_of_no_model_are_computed_at_the_first_ones_widths():
    (model, *_), works = overview.STANDARD, list(overview.to_compute([]))
    named = [w for w in works if w.model == model.name]
    assert {(w.M, w.D, w.H) for w in named} == {(4096, model.D, model.H)}
    own = {CASES[name].op for name in overview.cases_of(model)}
    assert {"linear_act", "mlp", "masked_gated_mlp", "binary_gated_mlp"} <= {
        w.case.op for w in named if w.case.op not in own
    }


@pytest.mark.parametrize("models", ([], [DENSE["gpt2"], DENSE["minilm"]]), ids=("none", "two"))
def test_on_a_gpu_the_models_are_timed_or_the_first(models, monkeypatch):
    timed = []

    def run(options, emit):
        timed.append(options.widths)
        return [1000 + len(timed)]

    monkeypatch.setattr(overview.timing, "run", run)
    found = {}
    assert overview._time_all(models, found, lambda record: None)
    here = models or [DENSE["llama3-8b"]]
    assert timed == [((m.D, m.H, m.name),) for m in here]
    assert found["sm_clocks_while_timing"] == overview.clock_range([1001, 1002][: len(here)])


@pytest.mark.parametrize("model", DENSE)
def test_every_model_can_be_predicted(model):
    here = DENSE[model]
    works = plan(overview.options_for(here))
    assert {(w.D, w.H, w.model) for w in works} == {(here.D, here.H, model)}
    for one in works:
        assert len(predict.predict(one, "both")) == len(ROOFS)


def test_on_a_gpu_the_models_own_calls_are_checked_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert overview.check_options([DENSE["gpt2"]]) == [check.CheckOptions(brief=True)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    everything, own = overview.check_options([DENSE["gpt2"]])
    assert everything.cases == tuple(CASES)
    assert own.cases == ("linear_act-bias", "mlp-bias")
    assert own.shapes == ((2048, 768, 3072),)
    assert own.activations == ("gelu_tanh",)


# The command line itself, as a user starts it: without the interpreter that the tests run under.


def command(*arguments):
    ours = ("TRITON_INTERPRET", "FUSEDMLP_BACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        [sys.executable, "-m", "fusedmlp.bench", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


@pytest.mark.interpreter
def test_default_command(tmp_path):
    """Every kernel is checked in the interpreter. A change has this by an installed wheel, in
    test_the_console_script_of_a_wheel."""
    file = tmp_path / "all.json"
    done = command("--model", "llama3-8b", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "progress is for terminals"
    judge(done.stdout, file, f"checkout: {ROOT / 'fusedmlp'}", {(4096, 14336)})


@pytest.mark.interpreter
def test_time_without_a_gpu(monkeypatch, tmp_path, capsys):
    file = tmp_path / "times.json"
    assert cli.main(["time", "--json", str(file)]) == 2
    assert "nothing was timed" in capsys.readouterr().err
    assert json.loads(file.read_text())["records"] == []


@pytest.mark.parametrize("name", ["check", "time", "predict"])
def test_help_has_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    start = "  fusedmlp bench "
    examples = [line.split()[2:] for line in text.splitlines() if line.startswith(start)]
    assert len(examples) >= 3
    for example in examples:
        assert cli.parser().parse_args(example).main is not None


def test_top_level_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in cli.COMMANDS)


def test_options_after_the_command_are_its_own():
    args = cli.parser().parse_args(["predict", "--model", "gpt2"])
    assert [m.name for m in args.model] == ["gpt2"]
    assert args.main is predict.main
