"""Which tests cover which files: the cheap ones first, for a mutant is done with when one fails.

Each file of kernels/, fusedmlp/ and csrc/ is in one row, or in NOT_DRAWN with the reason.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """`sources`: globs from the root, `tests`: what pytest is given."""

    room: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]


DEFAULTS = "tests/house/test_defaults.py"
# What holds for every op; the last is slow.
PLACES = (DEFAULTS, "tests/house/test_anatomy.py")
LAUNCHES = "tests/ops/test_every_kernel.py"
ARGUMENTS = "tests/ops/test_arguments.py"
CHOICE = "tests/backends/test_cpu_choice.py"  # which way `auto` goes on CPU tensors
ROW = (
    "tests/ops/test_unread.py",
    CHOICE,
    LAUNCHES,
    "tests/ops/test_flops.py",
    "tests/backends/test_cpu.py",
    ARGUMENTS,
    "tests/ops/test_derivatives.py",
)
EACH_OP = "tests/ops/test_each_op.py"
ERRORS = "tests/ops/test_errors.py"
STRIDES = "tests/ops/test_strides.py"
LORA = "tests/ops/test_lora.py"
LORA_EVERYWHERE = "tests/ops/test_lora_everywhere.py"
PACKED_LORA = "tests/ops/test_packed_lora.py"
MOE_LORA = "tests/ops/test_moe_lora.py"
INVARIANCE = "tests/ops/test_batch_invariance.py"
CUTLASS = "tests/backends/test_cutlass_backend.py"
DENSE = (EACH_OP, ERRORS, "tests/kernels/test_arch.py", STRIDES, "tests/ops/test_ops.py")
ACTIVATIONS = (
    "tests/ops/test_gates.py",
    "tests/layers/test_activations.py",
    "tests/house/test_activation_row.py",
    EACH_OP,
    "tests/ops/test_ops.py",
)
MASKED = (EACH_OP, "tests/ops/test_masked_errors.py", ERRORS, STRIDES, "tests/ops/test_masked.py")
ROUTED = (
    EACH_OP,
    ERRORS,
    "tests/ops/test_dropped.py",
    STRIDES,
    "tests/ops/test_top1_route.py",
    "tests/ops/test_topk_route.py",
    "tests/ops/test_topk_errors.py",
    "tests/ops/test_topk_routers.py",
    "tests/ops/test_moe_mlp.py",
    "tests/ops/test_moe_topk.py",
)
HYPER = (
    EACH_OP,
    STRIDES,
    "tests/ops/test_hyper_attention_step.py",
    "tests/ops/test_hyper_attention.py",
)
BINARY = (EACH_OP, "tests/ops/test_binary_errors.py", ERRORS, STRIDES, "tests/ops/test_binary.py")
PATCH_MODELS = "tests/patching/test_patch_models.py"
PATCH_RANKS = "tests/distributed/test_patch_distributed.py"
PATCH_OPTIONS = "tests/patching/test_patch_options.py"
PATCHING = (
    DEFAULTS,
    "tests/patching/test_patch_words.py",
    PATCH_OPTIONS,
    "tests/patching/test_patch_match.py",
    "tests/patching/test_patch_spelling.py",
    "tests/patching/test_patch_around.py",
    "tests/patching/test_patch_report.py",
    "tests/patching/test_patch_cut.py",
    "tests/patching/test_patch_called.py",
    "tests/patching/test_patch_left.py",
    "tests/patching/test_patch_recompute.py",
    "tests/patching/test_patch.py",
    "tests/patching/test_patch_later.py",
    "tests/patching/test_patch_libraries.py",
    "tests/patching/test_patch_state.py",
    "tests/patching/test_patch_lora.py",
    "tests/patching/test_patch_lora_experts.py",
    "tests/patching/test_patch_experts.py",
    "tests/patching/test_patch_routers.py",
    "tests/patching/test_patch_topk.py",
    PATCH_MODELS,
    "tests/patching/test_patch_lora_called.py",
    PATCH_RANKS,
    "tests/distributed/test_patch_sharding.py",
)
PATCH_ROUTED = (
    DEFAULTS,
    PATCH_OPTIONS,
    "tests/patching/test_patch_experts.py",
    "tests/patching/test_patch_gates.py",
    "tests/patching/test_patch_lora_experts.py",
    "tests/patching/test_patch_topk.py",
    "tests/patching/test_patch_routers.py",
    "tests/patching/test_patch_later.py",
    "tests/patching/test_patch_left.py",
    "tests/patching/test_patch_recompute.py",
    "tests/patching/test_patch_state.py",
    "tests/patching/test_patch.py",
    PATCH_MODELS,
    "tests/families/test_families.py",
    PATCH_RANKS,
)
LAYERS = (
    DEFAULTS,
    "tests/layers/test_layers_errors.py",
    "tests/layers/test_layers_options.py",
    "tests/layers/test_layers_hooks.py",
    "tests/layers/test_layers_input.py",
    "tests/layers/test_layers_dtype.py",
    "tests/layers/test_layers_widths.py",
    "tests/layers/test_layers_state.py",
    "tests/layers/test_layers_every.py",
)
GLU = (
    "tests/layers/test_layers_glu.py",
    "tests/layers/test_layers_masked_glu.py",
    "tests/layers/test_layers_gates.py",
)
FEEDFORWARD = ("tests/layers/test_layers_feedforward.py", *GLU)
EXPERTS = (
    "tests/layers/test_layers_experts.py",
    "tests/layers/test_layers_moe.py",
    "tests/layers/test_layers_topk.py",
)
HYPERGLU = (
    DEFAULTS,
    "tests/hyperglu/test_hyperglu_config.py",
    "tests/hyperglu/test_hyperglu_core.py",
    "tests/hyperglu/test_hyperglu_decoding.py",
    "tests/hyperglu/test_hyperglu_calls.py",
    "tests/hyperglu/test_hyperglu.py",
)
ONE_BIT = (
    DEFAULTS,
    "tests/weights/test_binary_format.py",
    "tests/ops/test_binary_errors.py",
    "tests/layers/test_layers_binary.py",
)
PLANS = ("tests/kernels/test_launch_plans.py", "tests/kernels/test_later.py")
GEMMS = ("tests/backends/test_csrc_gated_linear.py",)
PORTABLE = "tests/backends/test_csrc_portable.py"

ROWS: tuple[Row, ...] = (
    Row(
        "kernels",
        ("kernels/dense/*.py", "kernels/skinny.py", "kernels/epilogues.py"),
        (*DENSE, LAUNCHES),
    ),
    Row("kernels", ("kernels/masked/*.py",), (*MASKED, LAUNCHES)),
    Row("kernels", ("kernels/moe/*.py",), (*ROUTED, LAUNCHES)),
    Row("kernels", ("kernels/hyper/*.py",), (*HYPER, LAUNCHES)),
    Row("kernels", ("kernels/binary/*.py",), (*BINARY, LAUNCHES)),
    Row("kernels", ("kernels/plans.py", "kernels/later.py"), PLANS),
    Row(
        "kernels",
        ("kernels/activations.py", "kernels/exponentials.py"),
        ACTIVATIONS,
    ),
    Row(
        "kernels",
        (
            "kernels/tiles.py",
            "kernels/maps.py",
            "kernels/stacked.py",
            "kernels/left.py",
            "kernels/pick.py",
            "kernels/device.py",
            "kernels/interpreter.py",
            "kernels/arch/__init__.py",
            "kernels/arch/tile.py",
            "kernels/arch/assembler.py",
        ),
        (
            EACH_OP,
            "tests/kernels/test_interpreter.py",
            "tests/kernels/test_maps.py",
            "tests/kernels/test_stacked.py",
            "tests/kernels/test_grids.py",
            "tests/kernels/test_arch.py",
            "tests/kernels/test_assembler.py",
            STRIDES,
            "tests/ops/test_ops.py",
        ),
    ),
    # ---- the reference
    Row(
        "reference",
        ("fusedmlp/reference/activations.py", "fusedmlp/reference/gates.py"),
        (*ACTIVATIONS, ERRORS),
    ),
    Row(
        "reference",
        ("fusedmlp/reference/dense.py", "fusedmlp/reference/__init__.py"),
        (*DENSE, LORA),
    ),
    Row(
        "reference",
        ("fusedmlp/reference/lora.py",),
        (LORA, MOE_LORA, *DENSE),
    ),
    Row(
        "reference",
        ("fusedmlp/reference/rows.py", "fusedmlp/invariance.py"),
        (INVARIANCE,),
    ),
    Row("reference", ("fusedmlp/reference/masked.py",), (*MASKED, PACKED_LORA)),
    Row("reference", ("fusedmlp/reference/moe.py",), (*ROUTED, MOE_LORA)),
    Row(
        "reference",
        ("fusedmlp/reference/values.py",),
        ("tests/layers/test_layers_dtype.py", "tests/ops/test_masked_errors.py"),
    ),
    Row("reference", ("fusedmlp/reference/hyper.py",), HYPER),
    Row("reference", ("fusedmlp/reference/binary.py",), (*BINARY, PACKED_LORA)),
    # ---- ops
    Row(
        "ops",
        ("fusedmlp/ops/_lora.py", "fusedmlp/check/lora.py"),
        (LORA, *DENSE, *ROW, LORA_EVERYWHERE, MOE_LORA, INVARIANCE),
    ),
    Row(
        "ops", ("fusedmlp/ops/masked_*.py",), (*PLACES, *MASKED, *ROW, PACKED_LORA, LORA_EVERYWHERE)
    ),
    Row(
        "ops",
        (
            "fusedmlp/ops/_experts.py",
            "fusedmlp/ops/moe_*.py",
            "fusedmlp/ops/top*_route.py",
            "fusedmlp/ops/tree_path.py",
        ),
        (*PLACES, *ROUTED, *ROW, MOE_LORA, LORA_EVERYWHERE, "tests/ops/test_interleaved.py"),
    ),
    Row("ops", ("fusedmlp/ops/_moe_lora.py",), (MOE_LORA, EACH_OP, LORA_EVERYWHERE)),
    Row("ops", ("fusedmlp/ops/_adapted.py",), (PACKED_LORA, LORA_EVERYWHERE)),
    Row("ops", ("fusedmlp/ops/hyper_*.py",), (*PLACES, *HYPER, *ROW)),
    Row(
        "ops", ("fusedmlp/ops/binary_*.py",), (*PLACES, *BINARY, *ROW, PACKED_LORA, LORA_EVERYWHERE)
    ),
    Row(
        "ops",
        ("fusedmlp/ops/*.py",),
        (*PLACES, *DENSE, *ROW, LORA, LORA_EVERYWHERE, INVARIANCE),
    ),
    # ---- layers
    Row(
        "layers",
        (
            "fusedmlp/layers/parts/freezing.py",
            "fusedmlp/layers/glu.py",
            "fusedmlp/layers/masked_glu.py",
        ),
        (*GLU, *LAYERS),
    ),
    Row(
        "layers",
        ("fusedmlp/layers/feedforward.py", "fusedmlp/layers/parts/around.py"),
        (*FEEDFORWARD, *LAYERS),
    ),
    Row(
        "layers",
        ("fusedmlp/layers/binary.py",),
        (
            *ONE_BIT,
            "tests/patching/test_quantize.py",
            "tests/patching/test_one_bit_lora.py",
            *LAYERS,
        ),
    ),
    Row("layers", ("fusedmlp/layers/gmlp.py",), ("tests/layers/test_layers_gmlp.py", *LAYERS)),
    Row("layers", ("fusedmlp/layers/ngpt.py",), ("tests/layers/test_layers_ngpt.py", *LAYERS)),
    Row(
        "layers",
        (
            "fusedmlp/layers/pointwise.py",
            "fusedmlp/layers/parts/config.py",
            "fusedmlp/layers/parts/sequential.py",
        ),
        (
            "tests/layers/test_layers_pointwise_config.py",
            "tests/layers/test_layers_pointwise.py",
            *LAYERS,
        ),
    ),
    Row(
        "layers",
        ("fusedmlp/layers/mlp.py", "fusedmlp/layers/gating.py", "fusedmlp/layers/residual.py"),
        ("tests/layers/test_layers_mlp.py", *LAYERS),
    ),
    Row(
        "layers",
        ("fusedmlp/layers/transformer.py",),
        ("tests/layers/test_layers_transformer.py", *LAYERS),
    ),
    Row("layers", ("fusedmlp/layers/init_weights.py",), ("tests/layers/test_init_weights.py",)),
    Row(
        "layers",
        (
            "fusedmlp/layers/fff.py",
            "fusedmlp/layers/switch.py",
            "fusedmlp/layers/moe.py",
            "fusedmlp/layers/per_expert.py",
            "fusedmlp/layers/parts/experts.py",
            "fusedmlp/layers/parts/stacked.py",
            "fusedmlp/layers/parts/capacity.py",
        ),
        (*EXPERTS, "tests/layers/test_layers_export.py", *LAYERS),
    ),
    Row(
        "layers",
        ("fusedmlp/activations.py", "fusedmlp/layers/parts/activation.py"),
        (
            "tests/layers/test_activations.py",
            *FEEDFORWARD,
            "tests/layers/test_layers_mlp.py",
            "tests/ops/test_gates.py",
            *LAYERS,
        ),
    ),
    Row(
        "layers",
        ("fusedmlp/layers/*.py", "fusedmlp/layers/parts/*.py"),
        (
            "tests/layers/test_activations.py",
            *FEEDFORWARD,
            "tests/layers/test_layers_mlp.py",
            "tests/layers/test_layers_moe.py",
            *LAYERS,
        ),
    ),
    Row("hyperglu", ("fusedmlp/hyperglu/*.py",), HYPERGLU),
    # ---- weights, models
    Row("weights", ("fusedmlp/weights/gguf*.py",), ("tests/weights/test_gguf.py",)),
    Row(
        "weights",
        ("fusedmlp/weights/masks.py",),
        (*MASKED, "tests/layers/test_layers_masked_glu.py"),
    ),
    Row("weights", ("fusedmlp/weights/*.py",), (*ONE_BIT, "tests/ops/test_binary.py")),
    Row(
        "patching",
        ("fusedmlp/patching/quantize.py", "fusedmlp/patching/one_bit.py"),
        ("tests/patching/test_quantize.py", PATCH_OPTIONS, "tests/patching/test_pretrained.py"),
    ),
    Row("patching", ("fusedmlp/patching/pretrained.py",), ("tests/patching/test_pretrained.py",)),
    Row(
        "patching",
        ("fusedmlp/patching/one_bit_lora.py",),
        ("tests/patching/test_one_bit_lora.py",),
    ),
    Row(
        "patching",
        ("fusedmlp/patching/checkpoint.py",),
        ("tests/patching/test_patch_checkpoint.py", "tests/patching/test_patch_package.py"),
    ),
    Row(
        "patching",
        (
            "fusedmlp/patching/experts.py",
            "fusedmlp/patching/form.py",
            "fusedmlp/patching/gate.py",
            "fusedmlp/patching/moe.py",
            "fusedmlp/patching/route*.py",
            "fusedmlp/patching/stack.py",
        ),
        PATCH_ROUTED,
    ),
    Row(
        "patching",
        ("fusedmlp/patching/lora.py",),
        (
            "tests/patching/test_patch_lora.py",
            "tests/patching/test_patch_lora_called.py",
            "tests/patching/test_patch_lora_experts.py",
            "tests/patching/test_patch_lora_training.py",
            "tests/patching/test_patch_called.py",
        ),
    ),
    Row("patching", ("fusedmlp/patching/activation.py",), ("tests/ops/test_gates.py", *PATCHING)),
    Row("patching", ("fusedmlp/patching/*.py",), PATCHING),
    Row(
        "distributed",
        ("fusedmlp/distributed/*.py",),
        (
            DEFAULTS,
            "tests/distributed/test_distributed.py",
            PATCH_RANKS,
            "tests/patching/test_patch_lora_experts.py",
        ),
    ),
    # ---- around the ops
    Row(
        "backends",
        ("fusedmlp/backends/cutlass/*.py",),
        (CUTLASS,),
    ),
    Row(
        "backends",
        ("fusedmlp/backends/cuda/*.py",),
        (
            "tests/backends/test_cuda_backend.py",
            "tests/backends/test_cuda_binary.py",
            "tests/backends/test_csrc_functors.py",
            "tests/backends/test_csrc_layouts.py",
            PORTABLE,
            *GEMMS,
            CUTLASS,
            LORA,
            "tests/simt/test_simt_masked_gated_gemv.py",
        ),
    ),
    Row(
        "backends",
        ("fusedmlp/backends/derivatives.py", "fusedmlp/transforms.py"),
        (
            EACH_OP,
            "tests/ops/test_derivatives.py",
            LAUNCHES,
            "tests/backends/test_cpu.py",
            INVARIANCE,
        ),
    ),
    Row("backends", ("fusedmlp/backends/driver.py",), ("tests/backends/test_driver.py",)),
    Row(
        "backends",
        ("fusedmlp/backends/flops.py",),
        ("tests/ops/test_flops.py", "tests/backends/test_cpu.py"),
    ),
    Row(
        "backends",
        ("fusedmlp/backends/cpu/*.py",),
        (
            CHOICE,
            "tests/backends/test_cpu.py",
            "tests/ops/test_binary.py",
            "tests/layers/test_layers_moe.py",
            "tests/ops/test_top1_route.py",
            "tests/ops/test_hyper_attention_step.py",
            "tests/ops/test_dropped.py",
            MOE_LORA,
        ),
    ),
    Row(
        "backends",
        ("fusedmlp/backends/*.py",),
        (
            EACH_OP,
            "tests/house/test_rows.py",
            "tests/backends/test_backend.py",
            "tests/backends/test_cuda_backend.py",
            CUTLASS,
            ERRORS,
            LAUNCHES,
            INVARIANCE,
            "tests/backends/test_cpu.py",
            "tests/house/test_anatomy.py",
        ),
    ),
    Row(
        "check",
        ("fusedmlp/check/layer.py", "fusedmlp/check/numbers.py"),
        (*LAYERS, "tests/layers/test_layers_moe.py"),
    ),
    Row("check", ("fusedmlp/check/experts.py",), (ARGUMENTS, *ROUTED, MOE_LORA, LORA_EVERYWHERE)),
    Row(
        "check",
        ("fusedmlp/check/hyper.py",),
        (ARGUMENTS, *HYPER, "tests/hyperglu/test_hyperglu_calls.py"),
    ),
    Row(
        "check",
        ("fusedmlp/check/*.py",),
        (
            ERRORS,
            ARGUMENTS,
            "tests/ops/test_masked_errors.py",
            "tests/ops/test_binary_errors.py",
            "tests/ops/test_gates.py",
            EACH_OP,
            "tests/ops/test_moe_mlp.py",
        ),
    ),
    Row(
        "testing",
        ("fusedmlp/testing/*.py",),
        (
            DEFAULTS,
            "tests/house/test_cases.py",
            EACH_OP,
            "tests/kernels/test_tolerance.py",
            "tests/kernels/test_rounding.py",
            "tests/kernels/test_interpreter.py",
        ),
    ),
    Row(
        "package",
        ("fusedmlp/hub/*.py",),
        ("tests/hub/test_hub_layers.py", "tests/hub/test_hub_folder.py"),
    ),
    Row(
        "package",
        ("fusedmlp/cli.py", "fusedmlp/running.py"),
        ("tests/patching/test_patch_package.py", "tests/bench/test_command_line.py"),
    ),
    Row("package", ("fusedmlp/progress.py",), ("tests/house/test_progress.py",)),
    Row("package", ("fusedmlp/arrival.py",), ("tests/patching/test_patch_arrival.py",)),
    Row(
        "package",
        ("fusedmlp/packing.py",),
        (
            EACH_OP,
            "tests/ops/test_interleaved.py",
            "tests/ops/test_gates.py",
            "tests/ops/test_ops.py",
        ),
    ),
    Row(
        "package",
        ("fusedmlp/dry/*.py", "fusedmlp/explaining.py"),
        (
            "tests/dry/test_dry_blocks.py",
            "tests/dry/test_apart.py",
            "tests/dry/test_explain_gpu.py",
            "tests/dry/test_warmup.py",
            "tests/layers/test_layers_every.py",
            "tests/backends/test_backend.py",
            "tests/backends/test_cuda_backend.py",
        ),
    ),
    Row(
        "package",
        ("fusedmlp/*.py",),
        (
            EACH_OP,
            ARGUMENTS,
            "tests/backends/test_backend.py",
            "tests/house/test_rows.py",
            "tests/house/test_anatomy.py",
            "tests/bench/test_command_line.py",
        ),
    ),
    # ---- figures that are computed
    Row(
        "bench",
        tuple(
            f"bench/{name}.py"
            for name in ("saved", "predict", "work", "shapes", "overview", "glance", "render")
        ),
        (
            "tests/bench/test_bench_predict.py",
            "tests/bench/test_bench_work.py",
            "tests/bench/test_glance.py",
        ),
    ),
    # ---- CUDA C++ on the host runner, where a mutant is compiled first
    Row(
        "csrc",
        ("csrc/binary_gemv.*",),
        ("tests/simt/test_simt_binary_gemv.py", "tests/backends/test_cuda_binary.py", PORTABLE),
    ),
    Row(
        "csrc",
        ("csrc/masked_gated_gemv.*",),
        ("tests/simt/test_simt_masked_gated_gemv.py", PORTABLE),
    ),
    Row("csrc", ("csrc/moe_route.*",), ("tests/backends/test_csrc_moe_route.py", PORTABLE)),
    Row(
        "csrc",
        ("csrc/activations.cuh", "csrc/epilogue.cuh"),
        ("tests/simt/test_simt_masked_gated_gemv.py", *GEMMS),
    ),
    Row("csrc", ("csrc/gated_linear*", "csrc/gemm.cuh", "csrc/schedule.cuh"), GEMMS),
    Row(
        "csrc",
        ("csrc/tensor_map.*",),
        ("tests/backends/test_tensor_map.py", *GEMMS),
    ),
    Row("csrc", ("csrc/cutlass/find.py",), ("tests/backends/test_cutlass_build.py",)),
    Row(
        "csrc",
        ("csrc/bindings.cpp", "csrc/*.h", "csrc/device.cuh"),
        (PORTABLE, *GEMMS),
    ),
)

NOT_DRAWN: dict[str, str] = {
    "kernels/arch/*.py": "tiles and datasheet figures: they decide speed",
    "kernels/launches/*.py": "sizes that the gate compiles, which no test runs",
    "kernels/launch.py": "the same",
    "bench/*.py": "commands that measure on a GPU",
    "bench/*/*.py": "the same, and what they write",
    "bench/*/*/*.py": "the same",
    "bench/*/*/*/*.*": "the same",
    "csrc/hopper.cuh": "the host runner has other bodies of its functions, only a GPU runs these",
    "csrc/blackwell.cuh": "the same",
    "csrc/mma.cuh": "the same",
    "csrc/keep_log.py": "a wrapper of the build's commands",
    "csrc/cutlass/*.cpp": "built where CUTLASS's headers are, in minutes; slow tests run it",
    "csrc/cutlass/*.cu": "the same",
    "csrc/cutlass/*.cuh": "the same",
    "csrc/cutlass/*.h": "the same",
}
