"""An ONNX model in int8: matrix products by onnxruntime's quantiser, rationals as tables of 256 entries.

A rational of an 8-bit number has 256 values. Its whole chain of operations, between the number's
quantisation and that of the result, becomes one look-up in a table of `(256, hidden_size)` bytes, exact for
each entry: the result is what rounding the chain's own value gives.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from ..messages import extra
from .folding import FoldedRational

LEVELS = 256


class Chain(NamedTuple):
    """The operations of one rational in a graph."""

    source: str  # name of the tensor that goes in
    result: str  # name of the tensor that comes out
    nodes: list[Any]


def quantize(
    source: Path, target: Path, model: nn.Module, batches: Sequence[Tensor], tables: bool = True
) -> None:
    """Write the int8 form of an exported model.

    Args:
        source: the float32 ONNX file of `folding.folded`'s model.
        target: the file to make.
        model: the folded model that was exported, for its rationals and the range of what they meet.
        batches: pixel values to calibrate with.
        tables: make tables of the rationals; otherwise they stay chains in float32.
    """
    onnx, quantization = extra("onnx", "onnx"), extra("onnxruntime.quantization", "onnx")
    graph = onnx.load(source).graph
    rationals = {name: act for name, act in model.named_modules() if isinstance(act, FoldedRational)}
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
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        nodes_to_exclude=products_without_weights(graph),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    if not tables:
        return
    quantized = onnx.load(target)
    ranges = input_ranges(model, rationals, batches)
    for name, chain in chains.items():
        put_table(quantized.graph, chain, rationals[name], ranges[name], name)
    sort_nodes(quantized.graph)
    onnx.checker.check_model(quantized)
    onnx.save(quantized, target)


def products_without_weights(graph: Any) -> list[str]:
    """Return the names of the attention's own products: in 8 bits their softmax costs more than they save."""
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and not constants & set(node.input)]


def find_chains(graph: Any, rationals: Mapping[str, nn.Module]) -> dict[str, Chain]:
    """Find the nodes of each rational by its module's name, which the exporter wrote beside them."""
    nodes: dict[str, list[Any]] = {name: [] for name in rationals}
    for node in graph.node:
        scopes = next((item.value for item in node.metadata_props if "name_scopes" in item.key), "")
        for name in rationals:
            if f"'{name}'" in scopes:
                nodes[name].append(node)
    constants = {tensor.name for tensor in graph.initializer}
    chains = {}
    for name, own in nodes.items():
        if not own:  # the identity: no operation
            continue
        made = {output for node in own for output in node.output}
        sources = {i for node in own for i in node.input if i and i not in made | constants}
        outside = {i for node in graph.node if not any(node is mine for mine in own) for i in node.input}
        results = made & outside
        if len(sources) != 1 or len(results) != 1:
            raise ValueError(
                f"{name} is not one chain in the graph: from {sorted(sources)} to {sorted(results)}"
            )
        chains[name] = Chain(sources.pop(), results.pop(), own)
    return chains


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
def put_table(graph: Any, chain: Chain, act: FoldedRational, span: tuple[float, float], name: str) -> None:
    """Replace a chain, and the quantisation of its result, by a look-up in a table for each channel.

    Behind a product that is quantised already, the look-up takes its bytes and has the bias in the table.
    """
    numpy_helper, helper = extra("onnx.numpy_helper", "onnx"), extra("onnx.helper", "onnx")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    number = lambda tensor: numpy_helper.to_array(constants[tensor])  # noqa: E731
    (last,) = [node for node in graph.node if chain.result in node.input]
    own = {output for node in chain.nodes for output in node.output}
    nodes = [node for node in graph.node if not own & set(node.output) and node is not last]
    if (product := product_with_bias(graph, chain.source)) is not None:
        (data, scale, zero), bias = product.input[:3], number(bias_of(graph, chain.source))
        scale, zero, offset = float(number(scale)), int(number(zero)), torch.from_numpy(bias.copy()).double()
    else:
        scale, offset = max((span[1] - span[0]) / (LEVELS - 1), 1e-12), torch.zeros(act.hidden_size).double()
        zero, data = round(-span[0] / scale), f"{name}.bytes"
    out_scale, out_zero = float(number(last.input[1])), int(number(last.input[2]))
    values = act.double()((torch.arange(LEVELS) - zero).double()[:, None] * scale + offset)
    act.float()
    tensors = {
        "table": (values / out_scale).round().add(out_zero).clamp(0, LEVELS - 1).byte().numpy(),
        "scale": numpy.asarray(scale, numpy.float32),
        "zero": numpy.asarray(zero, numpy.uint8),
        "rows": numpy.array([-1, act.hidden_size]),
    }
    graph.initializer.extend(
        numpy_helper.from_array(value, f"{name}.{key}") for key, value in tensors.items()
    )
    make = helper.make_node
    if product is None:
        nodes.append(make("QuantizeLinear", [chain.source, f"{name}.scale", f"{name}.zero"], [data]))
    nodes += [
        make("Cast", [data], [f"{name}.numbers"], to=helper.TensorProto.INT32),
        make("Reshape", [f"{name}.numbers", f"{name}.rows"], [f"{name}.indices"]),
        make("GatherElements", [f"{name}.table", f"{name}.indices"], [f"{name}.found"], axis=0),
        make("Shape", [data], [f"{name}.shape"]),
        make("Reshape", [f"{name}.found", f"{name}.shape"], [last.output[0]]),
    ]
    del graph.node[:]
    graph.node.extend(nodes)


def product_with_bias(graph: Any, tensor: str) -> Any:
    """Return the DequantizeLinear of a product to which a constant is added to make `tensor`, or None."""
    constants = {item.name for item in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    adds = makers[tensor]
    if adds.op_type != "Add" or len(constants & set(adds.input)) != 1:
        return None
    (other,) = set(adds.input) - constants
    return makers[other] if makers[other].op_type == "DequantizeLinear" else None


def bias_of(graph: Any, tensor: str) -> str:
    (adds,) = [node for node in graph.node if tensor in node.output]
    (bias,) = {item.name for item in graph.initializer} & set(adds.input)
    return bias


def sort_nodes(graph: Any) -> None:
    """Put every node behind those that make its inputs, and leave out those that nobody needs."""
    needed = {tensor.name for tensor in graph.output}
    makers = {output: node for node in graph.node for output in node.output}
    stack = [makers[name] for name in needed if name in makers]
    while stack:
        new = set(stack.pop().input) - needed
        needed |= new
        stack += [makers[name] for name in new if name in makers]
    made = {tensor.name for tensor in [*graph.initializer, *graph.input]} | {""}
    left = [node for node in graph.node if needed & set(node.output)]
    ordered: list[Any] = []
    while left:
        ready = [node for node in left if made.issuperset(node.input)]
        assert ready, "the graph has a cycle"
        made.update(output for node in ready for output in node.output)
        ordered += ready
        left = [node for node in left if not made.issuperset(node.output)]
    del graph.node[:]
    graph.node.extend(ordered)
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)
