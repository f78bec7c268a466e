"""The kernels compile for GPUs that are not here, into the code that their speed rests on."""

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashkat_hf import triton_rational
from flashkat_hf.triton_tiles import backward_tile, forward_tile

POINTER_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def compile_for(kernel, tile, dtype: str, target: GPUTarget):
    """Compile as a launch on aligned tensors would."""
    constants = {"SEGMENTS": tile.segments, "WIDTH": tile.width}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            tables = name in ("numerator_ptr", "denominator_ptr", "partial_ptr")
            signature[name] = "*fp32" if tables else POINTER_TYPES[dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if name == "num_segments" else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": tile.num_warps})


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
    for compiled in (forward, backward):
        ptx = compiled.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", ptx)  # no atomic additions: two runs agree bit for bit
        assert ".local" not in ptx  # no spills
        assert bool(re.search(r"ld\.global\S*\.v4\.b32", ptx)) == (group_size == 384)  # 16 bytes at a time
        assert "shfl" not in ptx  # sums stay inside a thread until the end


def test_compiles_for_rocm():
    target = GPUTarget("hip", "gfx942", 64)
    compiled = compile_for(
        triton_rational.rational_backward_kernel, backward_tile(2**20, 3072, 384, 2, 304), "bfloat16", target
    )
    assert "amdgcn" in compiled.asm
