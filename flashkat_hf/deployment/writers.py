"""One function for each format: it writes a model's file, and one that loads it reads it back to be run."""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from ..messages import extra
from .chains import find_chains
from .custom_operators import LIBRARY, build, put_operators
from .folding import rationals_of
from .quantizing import quantize

FULL = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs would take bfloat16
Runner = Callable[[Tensor], Tensor]  # pixel values to logits, both float32


class Job(NamedTuple):
    """The input of an exporter.

    Attributes:
        model: pixel values to logits, folded, in evaluation mode, in the precision's dtype inside.
        example: `(batch, channels, height, width)`, float32.
        dynamic: whether the batch may have any size.
        precision: "fp32", "fp16" or "int8".
        batches: pixel values to calibrate with, for int8.
        opset: of ONNX.
        custom: whether rationals are operators of our own, for ONNX.
    """

    model: nn.Module
    example: Tensor
    dynamic: bool
    precision: str
    batches: Sequence[Tensor]
    opset: int
    custom: bool = False


class Format(NamedTuple):
    """A format.

    Attributes:
        write: writes the files of a job into a folder.
        load: makes a function of such a folder.
        precisions: that it has.
        needs: modules that must be installed, and the extra that brings them.
        program: lines of Python between the imports and the answer; they turn `pixels` into `logits`.
    """

    write: Callable[[Job, Path], None]
    load: Callable[[Path], Runner]
    precisions: tuple[str, ...]
    needs: tuple[tuple[str, str], ...]
    program: str


def write_onnx(job: Job, folder: Path, tables: bool = True) -> None:
    shapes = ({0: torch.export.Dim("batch")},) if job.dynamic else None
    path, eight = folder / "model.onnx", job.precision == "int8"
    with quiet():
        torch.onnx.export(
            job.model,
            (job.example,),
            folder / "float.onnx" if eight else path,
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=shapes,
            opset_version=job.opset,
            external_data=False,
        )
        if eight:
            quantize(folder / "float.onnx", path, job.model, job.batches, tables, job.custom)
            (folder / "float.onnx").unlink()
    onnx = extra("onnx", "onnx")
    model = onnx.load(path)
    if job.custom:
        build(folder)
        if not eight:
            rationals = rationals_of(job.model)
            put_operators(model, rationals, find_chains(model.graph, rationals))
    strip(model)
    onnx.save(model, path)


def strip(model: Any) -> None:
    """Remove what the exporter noted beside the nodes: names of modules, and paths of this machine."""
    for item in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del item.metadata_props[:]
        item.ClearField("doc_string")


def load_onnx(folder: Path, custom: bool = True) -> Runner:
    """Load a model, with the library of our operators if the folder has one and `custom` is true."""
    onnxruntime = extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if custom and (folder / LIBRARY).exists():
        options.register_custom_ops_library(str(folder.resolve() / LIBRARY))
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=providers)
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def write_openvino(job: Job, folder: Path) -> None:
    openvino = extra("openvino", "openvino")
    # OpenVINO makes one kernel of a chain of operations, which is faster than a look-up
    precision = "int8" if job.precision == "int8" else "fp32"
    write_onnx(job._replace(precision=precision), folder, tables=False)
    model = openvino.convert_model(folder / "model.onnx")
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=job.precision == "fp16")
    (folder / "model.onnx").unlink()


def load_openvino(folder: Path) -> Runner:
    model = extra("openvino", "openvino").compile_model(folder / "model.xml", "CPU", FULL)
    return lambda pixels: torch.from_numpy(numpy.array(model([pixels.numpy()])[0]))


def program_of(job: Job) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},) if job.dynamic else None
    with quiet():
        program = torch.export.export(job.model, (job.example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def write_pt2(job: Job, folder: Path) -> None:
    torch.export.save(program_of(job), folder / "model.pt2")


def load_pt2(folder: Path) -> Runner:
    return torch.export.load(folder / "model.pt2").module()


def write_aoti(job: Job, folder: Path) -> None:
    with torch.no_grad(), quiet():
        torch._inductor.aoti_compile_and_package(program_of(job), package_path=str(folder / "model.pt2"))


def load_aoti(folder: Path) -> Runner:
    return torch._inductor.aoti_load_package(str(folder / "model.pt2"))


def write_executorch(job: Job, folder: Path) -> None:
    lowering = extra("executorch.exir", "executorch").to_edge_transform_and_lower
    partitioner = extra("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    with quiet():
        lowered = lowering(program_of(job), partitioner=[partitioner.XnnpackPartitioner()])
        (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)


def load_executorch(folder: Path) -> Runner:
    runtime = extra("executorch.runtime", "executorch").Runtime.get()
    method = runtime.load_program(folder / "model.pte").load_method("forward")
    return lambda pixels: method.execute([pixels])[0].clone()


@contextmanager
def quiet() -> Any:
    """Keep exporters' warnings about their own code to themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


ONNX = (("onnx", "onnx"), ("onnxruntime", "onnx"), ("onnxscript", "onnx"))
FORMATS = {
    "onnx": Format(
        write_onnx,
        load_onnx,
        ("fp32", "fp16", "int8"),
        ONNX,
        'session = onnxruntime.InferenceSession(folder / "model.onnx")\n'
        'logits = session.run(None, {"pixel_values": pixels})[0]',
    ),
    "openvino": Format(
        write_openvino,
        load_openvino,
        ("fp32", "fp16", "int8"),
        (("openvino", "openvino"), *ONNX),
        'exact = {"INFERENCE_PRECISION_HINT": "f32"}\n'
        'model = openvino.compile_model(folder / "model.xml", "CPU", exact)\nlogits = model([pixels])[0]',
    ),
    "pt2": Format(
        write_pt2,
        load_pt2,
        ("fp32", "fp16"),
        (),
        'model = torch.export.load(folder / "model.pt2").module()\n'
        "logits = model(torch.from_numpy(pixels)).detach().numpy()",
    ),
    "aoti": Format(
        write_aoti,
        load_aoti,
        ("fp32", "fp16"),
        (),
        'model = torch._inductor.aoti_load_package(str(folder / "model.pt2"))\n'
        "logits = model(torch.from_numpy(pixels)).numpy()",
    ),
    "executorch": Format(
        write_executorch,
        load_executorch,
        ("fp32",),
        (("executorch.runtime", "executorch"),),
        'method = Runtime.get().load_program(folder / "model.pte").load_method("forward")\n'
        "logits = method.execute([torch.from_numpy(pixels)])[0].numpy()",
    ),
}
ELSEWHERE = {  # formats that are asked for, and how to come to them
    "tensorrt": "trtexec --onnx=FOLDER/model.onnx takes what --format onnx writes",
    "coreml": "coremltools.convert takes what --format pt2 writes",
}
IMPORTS = {
    "onnx": "import onnxruntime",
    "openvino": "import openvino",
    "pt2": "import torch",
    "aoti": "import torch",
    "executorch": "import torch\nfrom executorch.runtime import Runtime",
}
CUSTOM_PROGRAM = """\
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(folder.resolve() / "operators.so"))  # without it: the same, slower
session = onnxruntime.InferenceSession(folder / "model.onnx", options)
logits = session.run(None, {"pixel_values": pixels})[0]"""
