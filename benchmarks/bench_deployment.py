"""Latency of an exported FlashKAT beside timm's ViT of the same size and the same tools: one CPU thread.

    python benchmarks/bench_deployment.py --size tiny --rounds 40     # adds lines to results/deployment.jsonl

Each round runs every model once, so that a busy machine slows all of them. What counts is the 10th percentile
of the rounds, of the time that a processor worked for this process: with one thread that is the time that a
free machine takes, and on a shared one it leaves out the waiting for others. Before it is timed, each
FlashKAT is held against the source's logits (`flashkat export`).
"""

import argparse
import json
import subprocess
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy
import onnx
import onnxruntime
import timm
import torch
from onnxruntime import quantization
from PIL import Image

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, make_image_processor
from flashkat_hf.deployment.custom_operators import LIBRARY
from flashkat_hf.deployment.export import export_model
from flashkat_hf.deployment.writers import FORMATS

RESULTS = Path(__file__).parent / "results/deployment.jsonl"
IMAGES = 8


def write_source(folder: Path, size: str) -> None:
    """Write a FlashKAT whose coefficients have moved, so that none can be left out, and some images."""
    torch.manual_seed(0)
    model = FlashKATForImageClassification(FlashKATConfig.from_size(size, num_labels=1000)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "numerator" in name or "denominator" in name:
                parameter.add_(0.05 * torch.rand_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(1.5)
            elif name.endswith("bias"):  # one of zeros would be left out
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_image_processor(model.config.image_size).save_pretrained(folder)
    (folder / "images").mkdir()
    pixels = numpy.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), dtype=numpy.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC).save(
            folder / f"images/{index}.png"
        )


def products_without_weights(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the attention's own products: in 8 bits their softmax costs more than they save."""
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and not constants & set(node.input)]


class Pixels(quantization.CalibrationDataReader):
    """The pixel values that a quantiser calibrates with."""

    def __init__(self, pixels: torch.Tensor):
        self.rest = iter(pixels.split(1))

    def get_next(self):
        pixels = next(self.rest, None)
        return None if pixels is None else {"pixel_values": pixels.numpy()}


def write_vit(folder: Path, size: str, pixels: torch.Tensor) -> None:
    """Write timm's ViT as float32 and, with and without the attention's own products, int8."""
    torch.manual_seed(0)
    vit = timm.create_model(f"vit_{size}_patch16_224").eval()
    path, names = folder / "vit.onnx", {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(vit, (pixels[:1],), path, dynamo=True, verbose=False, external_data=False, **names)
    for name, excluded in (("all", []), ("weights", products_without_weights(onnx.load(path).graph))):
        quantization.quantize_static(
            path,
            folder / f"vit-int8-{name}.onnx",
            Pixels(pixels),
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_exclude=excluded,
            per_channel=True,
        )


def in_onnxruntime(path: Path):
    options = onnxruntime.SessionOptions()
    if (path.parent / LIBRARY).exists():
        options.register_custom_ops_library(str(path.parent / LIBRARY))
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels})[0]


def in_openvino(path: Path):
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.compile_model(path, "CPU", settings)
    return lambda pixels: model([pixels])[0]


def race(runs: dict, pixels: numpy.ndarray, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the 10th percentile and the median of each run's milliseconds of processor, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(pixels)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run(pixels)
            seconds[name].append(time.process_time() - start)
    return {name: tuple(numpy.percentile(times, (10, 50)) * 1e3) for name, times in seconds.items()}


def processor() -> str:
    """Return the name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "source"
        write_source(source, options.size)
        runs, sizes, proofs = {}, {}, {}
        for runtime, load in (("onnx", in_onnxruntime), ("openvino", in_openvino)):
            try:
                for module, _ in FORMATS[runtime].needs:
                    __import__(module)
            except ImportError as error:
                print(f"without {runtime}: {error}")
                continue
            for precision, custom in product(("fp32", "int8"), (False, True)):
                if custom and runtime != "onnx":
                    continue
                out = folder / f"{runtime}-{precision}-{custom}"
                choices = {"format": runtime, "precision": precision, "custom_op": custom}
                export_model(str(source), out, images=str(source / "images"), **choices)
                key = runtime, precision, "flashkat_hf, custom operators" if custom else "flashkat_hf"
                runs[key] = load(out / ("model.onnx" if runtime == "onnx" else "model.xml"))
                sizes[key] = sum(file.stat().st_size for file in out.glob("model.*"))
                proofs[key] = json.loads((out / "proof.json").read_text())["relative_difference"]
        pixels = torch.randn(IMAGES, 3, 224, 224)
        write_vit(folder, options.size, pixels)
        for runtime, load in (("onnx", in_onnxruntime), ("openvino", in_openvino)):
            if (runtime, "fp32", "flashkat_hf") in runs:
                for precision, name, file in (
                    ("fp32", "timm ViT", "vit.onnx"),
                    ("int8", "timm ViT", "vit-int8-weights.onnx"),
                    ("int8", "timm ViT, attention's products too", "vit-int8-all.onnx"),
                ):
                    runs[runtime, precision, name] = load(folder / file)
                    sizes[runtime, precision, name] = (folder / file).stat().st_size
        times = race(runs, pixels[:1].numpy(), options.rounds)
    head = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    about = {
        "machine": processor(),
        "size": options.size,
        "pixels": 224,
        "batch": 1,
        "threads": 1,
        "time": "of the processor",
        "rounds": options.rounds,
        **{name: version(name) for name in ("torch", "timm", "onnxruntime")},
        "commit": subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip(),
    }
    if any(runtime == "openvino" for runtime, _, _ in runs):
        about["openvino"] = version("openvino")
    with options.output.open("a") as file:
        for (runtime, precision, model), (ms, median) in times.items():
            row = {"runtime": runtime, "precision": precision, "model": model}
            row |= {"ms": round(ms, 2), "ms_median": round(median, 2)}
            row["of_vit"] = round(ms / times[runtime, precision, "timm ViT"][0], 3)
            row["megabytes"] = round(sizes[runtime, precision, model] / 1e6, 1)
            if (difference := proofs.get((runtime, precision, model))) is not None:
                row["relative_difference"] = float(f"{difference:.2g}")
            file.write(json.dumps(row | about) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
