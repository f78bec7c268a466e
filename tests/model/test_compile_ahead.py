"""The kernels compile for GPUs that are not here, into the code that their speed rests on."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashkat_hf.data.gpu import triton_augmentation, triton_crops
from flashkat_hf.model import (
    triton_attention,
    triton_block_sums,
    triton_drop_path,
    triton_norm,
    triton_norm_rational,
    triton_rational,
    triton_rational_mlp,
    triton_sums,
)
from flashkat_hf.model.triton_tiles import (
    NORM_BACKWARD,
    NORM_BACKWARD_TOTALS,
    NORM_FORWARD,
    attention_blocks,
    backward_tile,
    forward_tile,
    linear_tile,
    norm_tile,
)

POINTER_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
FLOAT32 = {
    *(
        "numerator_ptr",
        "denominator_ptr",
        "weight_ptr",
        "bias_ptr",
        "mean_ptr",
        "rstd_ptr",
        "lse_ptr",
        "factor_ptr",
    ),
    *("partial_ptr", "column_ptr", "column_sum_ptr", "statistics_ptr", "rest_ptr"),
}
# torch.compile launches these itself and passes numbers in float64, in which nothing is to be computed.
OPEN = (
    triton_attention.packed_attention_forward_kernel,
    triton_attention.packed_attention_queries_kernel,
    triton_attention.packed_attention_keys_kernel,
    triton_norm_rational.add_norm_rational_forward_kernel,
)
FLOAT64 = r"\b(add|sub|mul|fma|div|sqrt|rcp|ex2)\.\S*f64"
UNSCALED, SCALED = {"TOTALS": True, "SCALED": False}, {"TOTALS": True, "SCALED": True}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def compile_for(kernel, tile, dtype: str, target: GPUTarget):
    """Compile a kernel as a launch on aligned tensors would."""
    return compile_with(
        kernel, {"SEGMENTS": tile.segments, "WIDTH": tile.width}, tile.num_warps, dtype, target
    )


def compile_with(kernel, constants: dict[str, int], num_warps: int, dtype: str, target: GPUTarget, **options):
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FLOAT32 else POINTER_TYPES[dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("eps", "scale"):
            signature[name] = "fp64" if kernel in OPEN else "fp32"
        else:
            wide = name in ("num_segments", "num_rows") or name.startswith("offset_")
            signature[name] = "i64" if wide else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": num_warps, **options})


@pytest.mark.parametrize("dtype", POINTER_TYPES)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("group_size", [384, 3])
def test_compiles(group_size, capability, dtype):
    target = GPUTarget("cuda", capability, 32)
    hidden_size, num_bytes = 8 * group_size, BYTES[dtype]
    forward = compile_for(
        triton_rational.rational_forward_kernel, forward_tile(2**20, group_size, num_bytes), dtype, target
    )
    tile = backward_tile(2**20, hidden_size, group_size, num_bytes, num_multiprocessors=132)
    backward = compile_for(triton_rational.rational_backward_kernel, tile, dtype, target)
    between_linears = compile_for(triton_rational_mlp.rational_mlp_backward_kernel, tile, dtype, target)
    for compiled in (forward, backward, between_linears):
        ptx = compiled.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", ptx)  # no atomic additions: two runs agree bit for bit
        assert ".local" not in ptx  # no spills
        assert bool(re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\..*, 0x10", ptx)) == (
            group_size == 384
        )  # 16 bytes
        assert "shfl" not in ptx  # sums stay inside a thread until the end


@pytest.mark.parametrize("dtype", POINTER_TYPES)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("hidden_size", [192, 384, 768])
def test_norm_compiles(hidden_size, capability, dtype):
    tile = norm_tile(2**12, hidden_size, hidden_size // 8, 132, NORM_BACKWARD)
    sizes = {"ROWS": tile.rows, "SEGMENTS": tile.segments, "PARTS": tile.parts, "WIDTH": tile.width}
    for kernel, flags in (
        (triton_norm.norm_forward_kernel, {}),
        (triton_norm.norm_backward_kernel, {}),
        (triton_norm_rational.add_norm_rational_forward_kernel, {"SCALED": False}),
        (triton_norm_rational.add_norm_rational_forward_kernel, {"SCALED": True}),
        (triton_norm_rational.add_norm_rational_backward_kernel, {"TOTALS": False, "SCALED": False}),
        (triton_norm_rational.add_norm_rational_backward_kernel, UNSCALED),
        (triton_norm_rational.add_norm_rational_backward_kernel, SCALED),
    ):
        target = GPUTarget("cuda", capability, 32)
        ptx = compile_with(kernel, {**sizes, **flags}, tile.num_warps, dtype, target).asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", ptx)
        assert ".local" not in ptx
        assert not re.search(FLOAT64, ptx)
        assert ("bar.sync" in ptx) == (hidden_size == 768)  # smaller rows are reduced inside a warp


@pytest.mark.parametrize("hidden_size", [192, 384, 768])
@pytest.mark.parametrize(
    ("kernel", "flags", "registers"),
    [
        (triton_norm.norm_forward_kernel, {}, NORM_FORWARD),
        (triton_norm.norm_backward_kernel, {}, NORM_BACKWARD),
        (triton_norm_rational.add_norm_rational_forward_kernel, {"SCALED": False}, NORM_FORWARD),
        (triton_norm_rational.add_norm_rational_forward_kernel, {"SCALED": True}, NORM_FORWARD),
        (triton_norm_rational.add_norm_rational_backward_kernel, UNSCALED, NORM_BACKWARD_TOTALS),
        (triton_norm_rational.add_norm_rational_backward_kernel, SCALED, NORM_BACKWARD_TOTALS),
    ],
)
def test_a_norm_has_the_registers_that_its_tile_counts_on(kernel, flags, registers, hidden_size):
    """Else not all programs run at once, and a few of them after all others."""
    tile = norm_tile(2**17, hidden_size, hidden_size // 8, 132, registers)
    sizes = {"ROWS": tile.rows, "SEGMENTS": tile.segments, "PARTS": tile.parts, "WIDTH": tile.width}
    target = GPUTarget("cuda", 90, 32)
    ptx = compile_with(kernel, {**sizes, **flags}, tile.num_warps, "bfloat16", target).asm["ptx"]
    check_assembly(ptx, int(registers[0] + registers[1] * tile.parts * tile.width))


@pytest.mark.parametrize("dtype", POINTER_TYPES)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("adds", [False, True])
def test_stochastic_depth_compiles(adds, capability, dtype):
    constants = {"SEGMENTS": 256, "WIDTH": 16 // BYTES[dtype], "ADDS": adds}
    target = GPUTarget("cuda", capability, 32)
    ptx = compile_with(triton_drop_path.scale_samples_kernel, constants, 2, dtype, target).asm["ptx"]
    assert ".local" not in ptx
    assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\..*, 0x10", ptx)  # 16 bytes
    assert re.search(r"st\.global\S*\.v4\.b32", ptx)


@pytest.mark.parametrize("capability", [80, 90])
def test_sums_compile(capability):
    constants = {"COEFFICIENTS": 10, "ROWS": 64, "SEGMENTS": 256, "COLUMN_ROWS": 512, "COLUMNS": 32}
    tiles = {"ROWS_1": 256, "SEGMENTS_1": 64, "ROWS_2": 64, "SEGMENTS_2": 256}
    for kernel, sizes in (
        (triton_sums.gather_sums_kernel, constants),
        (triton_block_sums.gather_block_sums_kernel, {**tiles, "COLUMN_ROWS": 512, "COLUMNS": 32}),
    ):
        ptx = compile_with(kernel, sizes, 16, "float32", GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", ptx)
        assert ".local" not in ptx


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("part", ["forward", "queries", "keys"])
def test_attention_compiles(part, capability, dtype):
    kernel = getattr(triton_attention, f"packed_attention_{part}_kernel")
    for num_tokens in (192, 197, 220):
        constants = {"HEAD_DIM": 64, "REST": attention_blocks(num_tokens)[1]}
        registers = triton_attention.KEYS_REGISTERS if part == "keys" else triton_attention.REGISTERS
        target = GPUTarget("cuda", capability, 32)
        ptx = compile_with(kernel, constants, 4, dtype, target, maxnreg=registers).asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", ptx)
        assert re.search(r"wgmma\.mma|mma\.sync", ptx)  # on the matrix units
        assert not re.search(FLOAT64, ptx)
        if capability == 90:
            check_assembly(ptx, registers)


def check_assembly(ptx: str, max_registers: int) -> None:
    """Matrix instructions run beside others, few registers are enough, and nothing is kept in memory."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", source, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= max_registers
    assert "0 bytes spill stores" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("keep", [False, True])
def test_rational_mlp_compiles(keep, capability, dtype):
    tile = linear_tile(384, 1536, 192)
    sizes = {
        "IN_FEATURES": 384,
        "OUT_FEATURES": 1536,
        "GROUP_SIZE": 192,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }
    constants = {**sizes, "STEP": tile.step, "CHUNK": tile.chunk, "STAGES": tile.stages, "KEEP": keep}
    kernel, target = triton_rational_mlp.rational_mlp_forward_kernel, GPUTarget("cuda", capability, 32)
    ptx = compile_with(kernel, constants, tile.num_warps, dtype, target).asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert ".local" not in ptx
    assert re.search(r"wgmma\.mma|mma\.sync", ptx)
    if capability == 90:
        check_assembly(ptx, max_registers=128)  # two programs a multiprocessor


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_of_images_compile(capability):
    """The data side's kernels go from bytes to bytes, with exact arithmetic where PIL's is."""
    crops, augmentation = triton_crops, triton_augmentation
    types = {"x_ptr": "*u8", "y_ptr": "*u8", "table_ptr": "*u8", "size": "i32"}
    plans = {
        "plan_ptr": "*fp32",
        "mean_ptr": "*fp32",
        "std_ptr": "*fp32",
        "noise_ptr": "*fp32",
        "fill_ptr": "*fp32",
    }
    cases = [
        (crops.resize_width_kernel, {"table_ptr": "*i64", "y_ptr": "*fp32"}, {"BLOCK": 8, "PADDED": 256}),
        (crops.resize_height_kernel, {"table_ptr": "*i64", "x_ptr": "*fp32"}, {"BLOCK": 8, "PADDED": 256}),
        (augmentation.level_tables_kernel, {}, {"BLOCK": 1024}),
        (augmentation.operations_kernel, {}, {"BLOCK": 1024}),
        (augmentation.normalize_kernel, {"y_ptr": "*fp32"}, {"BLOCK": 1024, "STRIDE": 7919, "NOISE": 2**22}),
    ]
    for kernel, others, constants in cases:
        known = types | plans | others | dict.fromkeys(constants, "constexpr")
        signature = {name: known.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        ptx = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}
        ).asm["ptx"]
        assert ".local" not in ptx
        assert "fma.rn.f64" not in ptx


def test_compiles_for_rocm():
    target = GPUTarget("hip", "gfx942", 64)
    compiled = compile_for(
        triton_rational.rational_backward_kernel,
        backward_tile(2**20, 3072, 384, 2, num_multiprocessors=304),
        "bfloat16",
        target,
    )
    assert "amdgcn" in compiled.asm
