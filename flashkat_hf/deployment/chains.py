"""Rationals in an ONNX graph: their chains of operations are found, and one node takes the place of each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn


class Chain(NamedTuple):
    """The operations of one rational in a graph."""

    source: str  # name of the tensor that goes in
    result: str  # name of the tensor that comes out
    nodes: list[Any]


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


def replace_nodes(graph: Any, outputs: set[str], nodes: list[Any]) -> None:
    """Put nodes in the place of those that make some outputs; `sort_nodes` must follow."""
    kept = [node for node in graph.node if not outputs & set(node.output)]
    del graph.node[:]
    graph.node.extend([*kept, *nodes])


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
