"""Rules for when one kernel may stand for several modules of a block, and the block written by such kernels.

This file alone asks about devices, hooks, replaced modules, dropout, dtypes and tracing. The block itself, as
the paper has it, is `FlashKATLayer.forward`; a module that is listened to, replaced (LoRA) or dropped out is
called as it is, and what is left around it stays fused.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook

from .op_attention import HEAD_DIMS, MAX_BATCH, MAX_TOKENS, packed_attention
from .op_block import block, block_serves, block_tail, tail_serves
from .op_norm_rational import add_norm_rational, norm_beside
from .op_rational_mlp import rational_mlp
from .operators import HALF, TRITON_DEVICES, decomposes

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])
PLAIN_WEIGHTS = {nn.Parameter, Tensor, type(None)}
KNOWN: set[type[nn.Module]] = {
    nn.Linear,
    nn.LayerNorm,
    nn.Dropout,
}  # what a kernel may stand for; no subclasses
OWN_ATTENTION = "sdpa", "packed"  # names of PyTorch's attention, for which our kernel stands
TAIL, MLP = ("attention", "norm2", "mlp", "drop_path"), ("act1", "fc1", "act2", "fc2", "dropout")
LINEAR, TABLES = ("weight", "bias"), ("numerator", "denominator")


def fusible(cls: ModuleClass) -> ModuleClass:
    """Note that a kernel may stand for modules of this class; a decorator of classes."""
    KNOWN.add(cls)
    return cls


def fuses(x: Tensor, *modules: nn.Module) -> bool:
    """Tell whether kernels may stand for these modules: x is on a GPU, nobody listens, and none was touched.

    Hooks on all modules (PyTorch's FLOP counter has them) hear the plain block, module by module.
    """
    if x.device.type not in TRITON_DEVICES or (not torch.compiler.is_compiling() and _has_any_global_hook()):
        return False
    return untouched(*modules)


def untouched(*modules: nn.Module) -> bool:
    """Tell whether modules do just what their classes say.

    They are known, listened to by nobody, their forward their own. One loop, since a step asks for hundreds.
    """
    for module in modules:
        if (
            type(module) not in KNOWN
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__  # as accelerate puts it there to move weights
            or not module.__dict__.get("is_plain", True)  # a GroupRational of another form, or channels first
            or not PLAIN_WEIGHTS.issuperset(map(type, module._parameters.values()))  # quantised or sharded
        ):
            return False
    return True


def working_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def drops(*modules: nn.Dropout) -> bool:
    """Tell whether one of these is at work."""
    return any(module.training and module.p for module in modules)


def fused_block(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Compute a `FlashKATLayer` by fused operators, as far as its modules allow.

    The bias gradients of proj and fc2 come from norm2's backward, which has the gradients of both branches,
    if both branches are added as they are, or if one node of autograd is the block and multiplies them.
    """
    tail = None if torch.compiler.is_compiling() else tail_parameters(layer, hidden_states)
    if tail is not None:
        return one_node_block(layer, hidden_states, tail, **kwargs)
    attention, norm, mlp, drop_path = layer.attention, layer.norm2, layer.mlp, layer.drop_path
    hidden_states, x = stream_and_norm(layer.norm1, hidden_states)
    if not fuses(hidden_states, norm, mlp, mlp.act1):
        hidden_states = hidden_states + drop_path(attention(x, **kwargs)[0])
        return hidden_states + drop_path(mlp(norm(hidden_states)))
    parameters = norm.weight, norm.bias, mlp.act1.numerator, mlp.act1.denominator
    if not adds_whole_branches(layer, hidden_states):
        branch = drop_path(attention(x, **kwargs)[0])
        hidden_states, x = add_norm_rational(hidden_states, branch, *parameters, norm.eps)
        return hidden_states + drop_path(mlp.after_act1(x))
    mixed, _ = attention.mix(x, **kwargs)
    branch = linear(mixed, attention.proj.weight, attention.proj.bias.detach())
    biases = attention.proj.bias, mlp.fc2.bias
    hidden_states, x = add_norm_rational(hidden_states, branch, *parameters, norm.eps, *biases)
    return hidden_states + fused_mlp(mlp, x, mlp.fc2.bias.detach())


def one_node_block(layer: Any, x: Tensor, tail: list[Tensor], **kwargs: Any) -> Tensor:
    """Compute a `FlashKATLayer` by one node of autograd, or by one for what is behind its attention.

    `tail_parameters` has asked about x.
    """
    norm1, attention, norm2, drop_path = map(layer._modules.get, ("norm1", "attention", "norm2", "drop_path"))
    factors = drop_path.factors(x, branches=2) if drop_path.drops else None
    qkv = attention._modules["qkv"]
    head = [*map(norm1._parameters.get, LINEAR), *map(qkv._parameters.get, LINEAR)]
    if untouched(norm1, qkv) and attends_plainly(attention, x) and block_serves(x, head):
        heads = attention.num_heads, attention.scaling, is_short(attention, x)
        return block(x, heads, (norm1.eps, norm2.eps), working_dtype(x), factors, head + tail)
    x, normed = stream_and_norm(norm1, x)
    mixed, _ = attention.mix(normed, **kwargs)
    return block_tail(x, mixed.to(working_dtype(x)), norm2.eps, factors, tail)


def tail_parameters(layer: Any, x: Tensor) -> list[Tensor] | None:
    """Return the parameters of a `FlashKATLayer` from proj on; None where `block_tail` does not serve them.

    Modules and parameters are read where `nn.Module` keeps them: by name each would cost the host a call. The
    layer has asked whether x `fuses`.
    """
    attention, norm2, mlp, drop_path = map(layer._modules.get, TAIL)
    if not untouched(attention, norm2, mlp, drop_path):
        return None
    proj, dropout = map(attention._modules.get, ("proj", "dropout"))
    act1, fc1, act2, fc2, mlp_dropout = map(mlp._modules.get, MLP)
    if not untouched(proj, dropout, act1, fc1, act2, fc2, mlp_dropout) or (
        (dropout.training and dropout.p) or (mlp_dropout.training and mlp_dropout.p)
    ):
        return None
    parameters = [
        *(*map(proj._parameters.get, LINEAR), *map(norm2._parameters.get, LINEAR)),
        *(*map(act1._parameters.get, TABLES), *map(fc1._parameters.get, LINEAR)),
        *(*map(act2._parameters.get, TABLES), *map(fc2._parameters.get, LINEAR)),
    ]
    return parameters if tail_serves(x, parameters) else None


def adds_whole_branches(layer: Any, x: Tensor) -> bool:
    """Tell whether the last linear maps of both branches are added as they are, with nobody listening."""
    attention, drop_path = layer.attention, layer.drop_path
    if not fuses(x, attention, attention.proj, attention.dropout, drop_path) or drops(attention.dropout):
        return False
    return not drop_path.drops and fuses_mlp(layer.mlp, x)


def stream_and_norm(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a residual stream, to go on with, and its norm.

    In eager mode by one kernel, in `working_dtype`.
    """
    if fuses(x, norm) and not torch.compiler.is_compiling() and not decomposes(x) and x.is_contiguous():
        return norm_beside(x, norm.weight, norm.bias, norm.eps, working_dtype(x))  # pyright: ignore[reportArgumentType]
    return x, norm(x)


def fuses_mlp(mlp: Any, x: Tensor) -> bool:
    """Tell whether act2 of a `GRKANMlp` can be applied beside the linear maps around it."""
    if not fuses(x, mlp.fc1, mlp.act2, mlp.fc2, mlp.dropout) or drops(mlp.dropout):
        return False
    return mlp.fc1.bias is not None and mlp.fc2.bias is not None


def fused_mlp(mlp: Any, x: Tensor, out_bias: Tensor) -> Tensor:
    """Compute `fc2(act2(fc1(x)))` with `out_bias` in place of fc2's bias."""
    dtype = working_dtype(x)
    x, weight, out_weight = x.to(dtype), mlp.fc1.weight.to(dtype), mlp.fc2.weight.to(dtype)
    tables = mlp.act2.numerator, mlp.act2.denominator
    return rational_mlp(x, weight, mlp.fc1.bias, *tables, out_weight, out_bias)


def fuses_attention(attention: Any, x: Tensor) -> bool:
    """Tell whether the kernel for short sequences serves: it wins in half precision, on a GPU."""
    return (
        fuses(x, attention._modules["qkv"])
        and not decomposes(x)
        and attends_plainly(attention, x)
        and is_short(attention, x)
    )


def attends_plainly(attention: Any, x: Tensor) -> bool:
    """Tell whether an attention is PyTorch's, in half precision and without dropout."""
    return (
        attention.config._attn_implementation in OWN_ATTENTION
        and working_dtype(x) in HALF
        and not (attention.training and attention.config.attention_probs_dropout_prob)
    )


def is_short(attention: Any, x: Tensor) -> bool:
    """Tell whether the attention kernel takes sequences of x's length, so many, and these heads."""
    return x.shape[0] <= MAX_BATCH and x.shape[1] <= MAX_TOKENS and attention.head_dim in HEAD_DIMS


def fused_attention(attention: Any, x: Tensor) -> Tensor:
    """Compute `FlashKATAttention.mix`; the attention's backward gives qkv's bias its gradient."""
    bias = attention.qkv.bias
    qkv = linear(x, attention.qkv.weight, None if bias is None else bias.detach())
    return packed_attention(qkv, attention.num_heads, attention.scaling, bias)
