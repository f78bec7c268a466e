"""Launches of the kernels: what Triton finds out anew for each of them is kept from the first.

Triton binds arguments to names, sorts them into classes, looks the compiled kernel up, asks the driver about
each pointer, and enters the device, launch by launch. Here the compiled kernel is kept by what it was made
for: device, dtypes, constants, warps. The numbers of our kernels are of one type each and no reason to
compile anew (`do_not_specialize`), and all pointers are aligned to 16 bytes, or Triton launches. It also does
whenever anybody listens to launches, on devices other than NVIDIA's, in the interpreter, and with a version
of Triton that takes other arguments.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache, reduce, wraps
from operator import attrgetter, or_
from typing import Any

import torch
from torch import Tensor, nn

from .triton_math import triton

EAGER = (Tensor, nn.Parameter)  # a tensor of another type is looked at by a compiler or a tracer
ALIGNMENT = 16  # bytes; Triton compiles another kernel for pointers that are not
# what `run` of a compiled kernel takes before the kernel's arguments, in Triton 3.6 and 3.8
GRID_TO_FUNCTION = ["self", "gridX", "gridY", "gridZ", "stream", "function"]
TO_HOOKS = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]
_kept: dict[tuple, Any] = {}
_pointer, _dtype = Tensor.data_ptr, attrgetter("dtype")
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
KEPT_DEVICES = ("cuda",) if _current_device and _current_stream and not torch.version.hip else ()


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: tuple[int, ...],
    num_warps: int,
    max_registers: int = 0,
) -> None:
    """Launch a kernel whose parameters are pointers, then numbers of fixed types, then constants.

    Args:
        kernel: a function of `triton.jit`.
        grid: programs along three axes.
        tensors: on one device.
        numbers: as the kernel's annotations say.
        constants: compiled in.
        num_warps: of a program.
        max_registers: of a thread; 0 sets no limit.
    """
    first = tensors[0]
    if type(first) not in EAGER or first.device.type not in KEPT_DEVICES or is_watched(kernel):
        _by_triton(kernel, grid, tensors, numbers, constants, num_warps, max_registers)
        return
    device, pointers = first.get_device(), [*map(_pointer, tensors)]
    key = id(kernel), device, num_warps, max_registers, constants, *map(_dtype, tensors)
    kept = _kept.get(key)
    if kept is None or reduce(or_, pointers) % ALIGNMENT:
        compiled = _by_triton(kernel, grid, tensors, numbers, constants, num_warps, max_registers)
        if not reduce(or_, pointers) % ALIGNMENT and takes_known_arguments(compiled):
            # the kernel, too, so that no other gets its id
            _kept[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled, kernel
        return
    if device != _current_device():  # pyright: ignore[reportOptionalCall]
        with torch.accelerator.device_index(device):
            launch(kernel, grid, tensors, numbers, constants, num_warps, max_registers)
        return
    run, function, metadata, *_ = kept
    stream, no_hooks = _current_stream(device), (None, None, None)  # pyright: ignore[reportOptionalCall]
    run(*grid, stream, function, metadata, *no_hooks, *pointers, *numbers, *constants)


def is_watched(kernel: Any) -> bool:
    """Tell whether somebody listens to this kernel's launches, or has them compiled in another way."""
    runtime = triton.knobs.runtime
    return bool(
        getattr(kernel, "pre_run_hooks", True)  # the interpreter's functions have none
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.debug
        or triton.knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


def takes_known_arguments(compiled: Any) -> bool:
    """Tell whether a compiled kernel is run with the arguments of the versions of Triton that we know."""
    run = getattr(compiled, "run", None)
    if run is None or not hasattr(compiled, "function") or not hasattr(compiled, "packed_metadata"):
        return False
    names = list(inspect.signature(type(run).__call__).parameters)
    return names in ([*GRID_TO_FUNCTION, "args"], [*GRID_TO_FUNCTION, *TO_HOOKS, "args"])


def _by_triton(kernel: Any, grid, tensors, numbers, constants, num_warps: int, max_registers: int) -> Any:
    """Launch as Triton does it, or so that `torch.compile` launches it, and return the compiled kernel."""
    first = tensors[0]
    options: dict[str, int] = {"num_warps": num_warps}
    if max_registers and first.is_cuda and not torch.version.hip:  # others' compilers have no such option
        options["maxnreg"] = max_registers
    if type(first) not in EAGER and isinstance(kernel, triton.JITFunction):
        kernel = torch.library.wrap_triton(kernel)
    with torch.accelerator.device_index(first.device.index):  # pyright: ignore[reportArgumentType] - None is a no-op
        return kernel[grid](*tensors, *numbers, *constants, **options)


def planned(function: Callable) -> Callable:
    """Keep what a function of integers returns; a compiler's symbols, which come first, it sees itself."""
    kept = lru_cache(maxsize=1024)(function)

    @wraps(function)
    def plan(first, *others):
        return kept(first, *others) if type(first) is int else function(first, *others)

    return plan
