"""The one way in which every operator of this package is built, and where a kernel serves it.

An operator is four functions: forward and backward, which pick the kernel or the formula of `reference.py`,
and for each the shapes of its result. They are called in one of two ways:

- in eager mode by a plain `autograd.Function`, which costs the host least;
- where something looks at the operations instead of running them (`torch.compile`, an exporter, fake
  tensors, a dispatch mode) as operators of `torch.library`, `flashkat::NAME` and `flashkat::NAME_backward`.
  They are open to `torch.compile`, which then launches their kernels with less work for the host.

A copy of this file, as checkpoints bring it, registers under its own package's name, since PyTorch would put
it in the place of the first.
"""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .native_rational import serves

PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = "flashkat" if PACKAGE == "flashkat_hf.model" else re.sub(r"\W", "_", PACKAGE, flags=re.ASCII)
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is ROCm's name too
HALF = (torch.bfloat16, torch.float16)
NO_SECOND_DERIVATIVES = (
    "second derivatives do not pass through a fused block: take them with torch.func (grad, jvp, "
    "hessian), or with a forward hook on each block's drop_path"
)


def has_kernel(x: Tensor) -> bool:
    """Tell whether a Triton kernel serves x; else `reference.py` does, on any device."""
    return x.device.type in TRITON_DEVICES and x.dtype != torch.float64


def decomposes(x: Tensor) -> bool:
    """Tell whether the formula itself is to stand where an operator would.

    It does in an exporter's or a tracer's graph, in one compiled for a CPU that no compiled C serves, under
    the transforms of `torch.func`, and in forward-mode differentiation.
    """
    # PyTorch 2.11's is_exporting() is True under torch.compile (docs/notes/exporting-under-compile.md)
    if torch.compiler.is_dynamo_compiling():
        fused_by_compiler = x.device.type == "cpu" and (torch.compiler.is_exporting() or not serves(x.dtype))
        return fused_by_compiler or torch._C._are_functorch_transforms_active()
    return (
        torch.compiler.is_exporting()
        or (torch.compiler.is_compiling() and x.device.type == "cpu")
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def by_device(plain: Callable, kernel: Callable | None) -> Callable:
    """Return a function with the signature of `plain` that calls the kernel's launcher where one serves.

    Args:
        plain: takes a tensor first; its type hints are an operator's schema.
        kernel: takes the same arguments; None where triton is missing.
    """

    @wraps(plain)
    def function(x: Tensor, *others):
        return (kernel if kernel and has_kernel(x) else plain)(x, *others)

    return function


def is_traced(x: Tensor) -> bool:
    """Tell whether something looks at the operations on x instead of running them."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def register(
    name: str,
    function: Callable,
    shapes: Callable,
    open_to_compiler: bool = False,
    flops: Callable | None = None,
) -> Any:
    """Register a function of tensors, with type hints, as the operator `flashkat::NAME`.

    Args:
        name: of the operator.
        function: its type hints are the operator's schema.
        shapes: makes empty results of the right shapes and dtypes from the same arguments.
        open_to_compiler: whether `torch.compile` looks into it.
        flops: from the arguments, shapes in place of tensors, to the operations of its matrix products, which
            PyTorch's FLOP counter cannot see inside; default: it has none.
    """
    define = torch.library.triton_op if open_to_compiler else torch.library.custom_op
    operator: Any = define(f"{NAMESPACE}::{name}", function, mutates_args=())
    operator.register_fake(shapes)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    if flops is not None and packet not in flop_registry:
        register_flop_formula(packet)(flops)
    return operator


def register_backward(name: str, function: Callable, shapes: Callable, flops: Callable | None = None) -> Any:
    """Register a backward, which `by_device` made, as the operator `flashkat::NAME`.

    `torch.compile` looks into it where a kernel serves. Elsewhere it finds `flashkat::NAME_plain` in it, an
    operator that it does not look into: it would compile each operation of the formula.
    """
    plain = register(f"{name}_plain", function, shapes)

    @wraps(function)
    def opened(x: Tensor, *others):
        return (function if has_kernel(x) else plain)(x, *others)

    return register(name, opened, shapes, open_to_compiler=True, flops=flops)


def called_directly(operator: Callable, function: Callable) -> Callable:
    """Return a function that calls `function` itself in eager mode, and `operator` where something traces."""

    def call(x: Tensor, *others):
        return operator(x, *others) if is_traced(x) else function(x, *others)

    return call


def by_formula(function: Callable, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `sum(grad * function(*inputs))`, which can be differentiated again.

    The inputs count as independent of each other, also where autograd knows that one follows from another.
    """
    return torch.func.vjp(function, *inputs)[1](grad)


def needs_formula(grad: Tensor) -> bool:
    """Tell whether a backward is itself differentiated, transformed or batched: then no kernel serves it."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or is_legacy_batchedtensor(grad)  # torch.autograd.grad(..., is_grads_batched=True)
    )


def differentiable(
    name: str,
    forward: tuple[Callable, Callable],
    backward: tuple[Callable, Callable],
    save: Callable,
    gradients: Callable,
    formula_gradients: Callable,
    num_outputs: int | None = None,
    flops: tuple[Callable | None, Callable | None] = (None, None),
) -> Callable:
    """Build an operator with gradients, and return the function that calls it.

    Args:
        name: of the operator; that of its backward ends in `_backward`.
        forward: the function, whose first argument is a tensor, and the shapes of its results.
        backward: likewise.
        save: `(ctx, inputs, output)` keeps on the autograd context what backward needs.
        gradients: `(ctx, backward, *grads)` returns a gradient for each input; it calls `backward`.
        formula_gradients: `(ctx, *grads)` returns the same by operations that autograd differentiates, for
            second derivatives in eager mode; `by_formula` helps.
        num_outputs: for a forward that returns a tuple, how many of it the caller gets; the rest is saved.
        flops: of forward and backward, as `register` has them.
    """
    operator = register(name, *forward, open_to_compiler=True, flops=flops[0])
    backward_operator = register_backward(f"{name}_backward", *backward, flops=flops[1])
    operator.register_autograd(
        lambda ctx, *grads: gradients(ctx, backward_operator, *grads), setup_context=save
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward[0](*inputs)
            save(ctx, inputs, output)
            return output if num_outputs is None else output[:num_outputs]

        @staticmethod
        def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
            if needs_formula(grads[0]):
                return formula_gradients(ctx, *grads)
            return gradients(ctx, backward[0], *grads)

    def call(x: Tensor, *others):
        if is_traced(x):
            output = operator(x, *others)
            return output if num_outputs is None else output[:num_outputs]
        return Eager.apply(x, *others)

    return call
