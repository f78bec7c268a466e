"""An ONNX model in int8: matrix products by onnxruntime's quantiser, rationals as tables of 256 entries.

A rational of an 8-bit number has 256 values. Its whole chain of operations, between the number's
quantisation and that of the result, becomes one look-up in a table of 256 bytes for each group, exact for
each entry: the result is what rounding the chain's own value gives.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..messages import extra
from .chains import Chain, find_chains, replace_nodes, sort_nodes
from .custom_operators import LOOKUP, add_function, operator_node
from .folding import FoldedRational, rationals_of

LEVELS = 256


def quantize(
    source: Path,
    target: Path,
    model: nn.Module,
    batches: Sequence[Tensor],
    tables: bool = True,
    custom: bool = False,
) -> None:
    """Write the int8 form of an exported model.

    The attention's own products stay in float32: in 8 bits their softmax costs more than they save. Results
    of linear maps are rounded to 8 bits in front of a rational alone.

    Args:
        source: the float32 ONNX file of `folding.folded`'s model.
        target: the file to make.
        model: the folded model that was exported, for its rationals and the range of what they meet.
        batches: pixel values to calibrate with.
        tables: make tables of the rationals; otherwise they stay chains in float32.
        custom: make a look-up one operator of our own, with a function that stands for it.
    """
    onnx, quantization = extra("onnx", "onnx"), extra("onnxruntime.quantization", "onnx")
    graph = onnx.load(source).graph
    rationals = rationals_of(model)
    chains = find_chains(graph, rationals)
    rationals = {name: rationals[name] for name in chains}
    name = graph.input[0].name

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = iter([image[None] for batch in batches for image in batch])

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {name: image.numpy()}

    quantization.quantize_static(
        source,
        target,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Gemm", "Conv"],
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )
    if not tables:
        return
    quantized = onnx.load(target)
    ranges = input_ranges(model, rationals, batches)
    for name, chain in chains.items():
        put_table(quantized.graph, chain, rationals[name], ranges[name], name, custom)
    sort_nodes(quantized.graph)
    if custom:
        add_function(quantized, LOOKUP)
    onnx.checker.check_model(quantized)
    onnx.save(quantized, target)


@torch.no_grad()
def input_ranges(
    model: nn.Module, rationals: Mapping[str, nn.Module], batches: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    """Return the least and the largest input of each rational, 0 between them."""
    ranges = dict.fromkeys(rationals, (0.0, 0.0))

    def note(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = ranges[name]
            ranges[name] = min(low, inputs[0].min().item()), max(high, inputs[0].max().item())

        return hook

    handles = [act.register_forward_pre_hook(note(name)) for name, act in rationals.items()]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return ranges


@torch.no_grad()
def put_table(
    graph: Any, chain: Chain, act: FoldedRational, span: tuple[float, float], name: str, custom: bool
) -> None:
    """Replace a chain, and the quantisation of its result, by a look-up in a table for each group.

    The channels of a group are brought together, since a look-up in one short table is the fastest.
    """
    numpy_helper, helper = extra("onnx.numpy_helper", "onnx"), extra("onnx.helper", "onnx")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    (last,) = [node for node in graph.node if chain.result in node.input]
    out_scale, out_zero = (float(numpy_helper.to_array(constants[key])) for key in last.input[1:3])
    scale = max((span[1] - span[0]) / (LEVELS - 1), 1e-12)
    zero = round(-span[0] / scale)
    groups, width = act.hidden_size // act.repeats, act.repeats
    numbers = (torch.arange(LEVELS) - zero).double()[:, None] * scale
    values = act.double()(numbers.expand(-1, act.hidden_size))[:, ::width].T
    act.float()
    tensors = {
        "table": (values / out_scale).round().add(out_zero).clamp(0, LEVELS - 1).byte().numpy(),
        "scale": numpy.asarray(scale, numpy.float32),
        "zero": numpy.asarray(zero, numpy.uint8),
        "grouped": numpy.array([-1, groups, width]),
        "joined": numpy.array([groups, -1]),
        "split": numpy.array([groups, -1, width]),
        "rows": numpy.array([-1, act.hidden_size]),
    }
    graph.initializer.extend(
        numpy_helper.from_array(value, f"{name}.{key}") for key, value in tensors.items()
    )
    inputs = [f"{name}.bytes", *(f"{name}.{key}" for key in LOOKUP.inputs[1:])]
    if custom:
        nodes = [operator_node(LOOKUP, inputs, last.output[0], groups)]
    else:
        names = dict(zip(LOOKUP.inputs, inputs, strict=True)) | {"y": last.output[0]}
        rename = lambda old: [names.get(key, f"{name}.{key}") for key in old]  # noqa: E731
        nodes = [type(node).FromString(node.SerializeToString()) for node in LOOKUP.body()]
        for node in nodes:
            node.input[:], node.output[:] = rename(node.input), rename(node.output)
    scales = [f"{name}.scale", f"{name}.zero"]
    nodes.insert(0, helper.make_node("QuantizeLinear", [chain.source, *scales], [inputs[0]]))
    replaced = {output for node in [*chain.nodes, last] for output in node.output}
    replace_nodes(graph, replaced, nodes)
