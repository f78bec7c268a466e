"""Two operators of our own for onnxruntime on a CPU: a rational, and a look-up, in one pass over memory.

In the ONNX file each is a function of standard operations, too, so a runtime without our library computes
the same, as a chain. `build` has the machine's own compiler make the library from `SOURCE`, for all
processors of this machine's kind.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..messages import extra
from .chains import Chain, replace_nodes, sort_nodes
from .folding import FoldedRational

DOMAIN = "flashkat"
LIBRARY = "operators.so"
OPSET = 18
TIME_LIMIT = 60  # seconds for the compiler, which needs one
OPTIONS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
SOURCE = Path(__file__).with_name("operators.c")


class Operator(NamedTuple):
    """An operator.

    Attributes:
        name: of the node.
        inputs: names of what goes in, for the function.
        body: makes the function's nodes, from `inputs` to "y".
    """

    name: str
    inputs: tuple[str, ...]
    body: Callable[[], list[Any]]


def rational_body() -> list[Any]:
    """Return P(x) / Q(|x|) by Horner's rule."""
    make = extra("onnx.helper", "onnx").make_node
    nodes, value = [], "a5"
    for power in (4, 3, 2, 1, 0):
        nodes += [make("Mul", [value, "x"], [f"ax{power}"])]
        nodes += [make("Add", [f"ax{power}", f"a{power}"], [f"p{power}"])]
        value = f"p{power}"
    nodes += [make("Abs", ["x"], ["u"]), make("Constant", [], ["b0"], value_float=1.0)]
    value = "b4"
    for power in (3, 2, 1, 0):
        nodes += [make("Mul", [value, "u"], [f"bu{power}"])]
        nodes += [make("Add", [f"bu{power}", f"b{power}"], [f"q{power}"])]
        value = f"q{power}"
    return [*nodes, make("Div", ["p0", "q0"], ["y"])]


def lookup_body() -> list[Any]:
    """Return y = table[group of x, x], where groups are runs of neighbours in rows."""
    helper = extra("onnx.helper", "onnx")
    make = helper.make_node
    return [
        make("Reshape", ["x", "grouped"], ["in_groups"]),
        make("Transpose", ["in_groups"], ["by_group"], perm=[1, 0, 2]),
        make("Reshape", ["by_group", "joined"], ["together"]),
        make("Cast", ["together"], ["indices"], to=helper.TensorProto.INT32),
        make("GatherElements", ["table", "indices"], ["found"], axis=1),
        make("Reshape", ["found", "split"], ["found_by_group"]),
        make("Transpose", ["found_by_group"], ["found_in_groups"], perm=[1, 0, 2]),
        make("Reshape", ["found_in_groups", "rows"], ["y"]),
    ]


RATIONAL = Operator(
    "GroupRational", ("x", *(f"a{i}" for i in range(6)), *(f"b{i}" for i in range(1, 5))), rational_body
)
LOOKUP = Operator("GroupLookup", ("x", "table", "grouped", "joined", "split", "rows"), lookup_body)


def operator_node(operator: Operator, inputs: Sequence[str], output: str, groups: int) -> Any:
    make = extra("onnx.helper", "onnx").make_node
    return make(operator.name, list(inputs), [output], domain=DOMAIN, groups=groups)


def add_function(model: Any, operator: Operator) -> None:
    """Add the function that computes an operator where there is no library."""
    helper = extra("onnx.helper", "onnx")
    opset = helper.make_opsetid("", OPSET)
    function = helper.make_function(
        DOMAIN, operator.name, operator.inputs, ["y"], operator.body(), [opset], ["groups"]
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.ir_version = max(model.ir_version, 8)  # the first with functions


def put_operators(model: Any, rationals: dict[str, FoldedRational], chains: dict[str, Chain]) -> None:
    """Replace each rational's chain in an ONNX model by one node."""
    numpy_helper = extra("onnx.numpy_helper", "onnx")
    for name, chain in chains.items():
        inputs = [f"{name}.rational.{key}" for key in RATIONAL.inputs[1:]]
        model.graph.initializer.extend(
            numpy_helper.from_array(column.numpy(), key)
            for column, key in zip(rationals[name].columns(), inputs, strict=True)
        )
        groups = rationals[name].hidden_size // rationals[name].repeats
        node = operator_node(RATIONAL, [chain.source, *inputs], chain.result, groups)
        replace_nodes(model.graph, {output for node in chain.nodes for output in node.output}, [node])
    sort_nodes(model.graph)
    add_function(model, RATIONAL)


def find_compiler() -> str:
    """Return the path of a C compiler.

    Raises:
        ValueError: there is none, or the system has no libraries of this kind.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith(("linux", "darwin")):
        raise ValueError("--custom-op needs a C compiler (cc, gcc or clang) on Linux or macOS; found none")
    return compiler


def build(folder: Path) -> None:
    """Compile the library into a folder, with its source beside it.

    Raises:
        ValueError: the compiler fails.
    """
    source = folder / SOURCE.name
    source.write_bytes(SOURCE.read_bytes())
    command = [find_compiler(), *OPTIONS, str(source), "-o", str(folder / LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    if done.returncode:
        # an older compiler, or another C library, which cannot choose by the processor
        done = subprocess.run(
            [*command, "-DONE_PROCESSOR"], capture_output=True, text=True, timeout=TIME_LIMIT
        )
    if done.returncode:
        raise ValueError(f"--custom-op: {command[0]} fails: {done.stderr.strip().splitlines()[-1]}")
