"""A model for another runtime: one folder with the model, what goes with it, and what was proved."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.functions_inputs import noise_images
from ..checkpoints.image_processor import GreyViTImageProcessor, has_own_work
from ..checkpoints.loading import load_checkpoint
from ..conversion.calibration import find_images, image_batches
from ..conversion.conversion import written_whole
from ..files import write_text
from ..messages import extra
from ..model.configuration_flashkat import pair
from .custom_operators import find_compiler
from .folding import folded
from .writers import CUSTOM_PROGRAM, ELSEWHERE, FORMATS, IMPORTS, Job, Runner, load_onnx

NUM_CHECKED = 4  # images in check.safetensors
BOUNDS = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5}  # of the difference of the logits, over their size
LEAST_OPSET = 18
PROGRAM = '''\
"""Name an image: python run.py IMAGE (needs numpy, Pillow and {needs})."""
import json, pathlib, sys

import numpy
{imports}
from PIL import Image

folder, name = pathlib.Path(__file__).parent, sys.argv[1]
p, labels = (json.loads((folder / file).read_text()) for file in ("preprocessing.json", "labels.json"))
image = Image.open(name).convert(p["mode"])
shorter = min(image.size) if p["keep_ratio"] else None
size = [p["resize"] * side // (shorter or side) for side in image.size]
image = image.resize(size, Image.Resampling(p["resample"]))
left, top = (round((side - p["crop"]) / 2) for side in image.size)
image = numpy.asarray(image.crop((left, top, left + p["crop"], top + p["crop"])), numpy.float32)
pixels = ((image.reshape(p["crop"], p["crop"], -1) / 255 - p["mean"]) / p["std"]).transpose(2, 0, 1)[None]
pixels = numpy.ascontiguousarray(pixels, numpy.float32)
{program}
print(labels[logits[0].argmax()])
'''
JAVASCRIPT = """\
// Name an image: node run.cjs IMAGE (npm install onnxruntime-node sharp; onnxruntime-web serves, too)
const ort = require("onnxruntime-node"), sharp = require("sharp");
const fs = require("node:fs"), path = require("node:path");
const read = (file) => JSON.parse(fs.readFileSync(path.join(__dirname, file)));
const p = read("preprocessing.json"), labels = read("labels.json"), side = p.crop;
(async () => {
  const size = { width: p.resize, height: p.resize, fit: p.keep_ratio ? "outside" : "fill" };
  const kernel = ["nearest", "lanczos3", "linear", "cubic"][p.resample];
  const image = sharp(process.argv[2]).removeAlpha().toColourspace(p.mode === "RGB" ? "srgb" : "b-w");
  const { data, info } = await image.resize({ ...size, kernel }).raw().toBuffer({ resolveWithObject: true });
  const left = Math.round((info.width - side) / 2), top = Math.round((info.height - side) / 2);
  const value = (c, y, x) => data[((top + y) * info.width + left + x) * info.channels + c] / 255;
  const pixels = Float32Array.from({ length: p.mean.length * side * side }, (_, i) => {
    const c = Math.floor(i / side / side), y = Math.floor(i / side) % side;
    return (value(c, y, i % side) - p.mean[c]) / p.std[c];
  });
  const session = await ort.InferenceSession.create(path.join(__dirname, "model.onnx"));
  const feeds = { pixel_values: new ort.Tensor("float32", pixels, [1, p.mean.length, side, side]) };
  const { logits } = await session.run(feeds);
  console.log(labels[logits.data.indexOf(Math.max(...logits.data))]);
})();
"""


class Logits(nn.Module):
    """A classifier as a function from float32 pixel values to float32 logits, in another dtype inside."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values.to(self.dtype)).logits.float()


@torch.no_grad()
def export_model(
    source: str,
    output: Path,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    images: str | None = None,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    opset: int = LEAST_OPSET,
    custom_op: bool = False,
    overwrite: bool = False,
) -> str:
    """Write a model for another runtime, run it there, and hold its logits against the source's.

    The folder has the model's file, `preprocessing.json`, `labels.json`, `check.safetensors` (pixel values
    and the source's logits), `proof.json` (what was compared, how far it was off, on which versions) and
    `run.py`, which names an image; for ONNX also `run.cjs`, which does so in JavaScript. It appears whole and
    proved, or not at all.

    Args:
        source: folder or Hub id of a FlashKAT.
        output: folder to make.
        format: a name in `writers.FORMATS`.
        precision: "fp32", "fp16" or "int8".
        images: folder of images, or "digits", to calibrate int8 and to compare on; by default noise with
            the spectrum of photographs is compared on, and int8 is refused.
        batch_size: images in a call.
        dynamic_batch: any number of images in a call.
        opset: of ONNX, 18 or later.
        custom_op: for ONNX in fp32 and int8, make each rational one operator of our own, and compile the
            library that has it, for onnxruntime on machines of this kind; a runtime without the library
            computes the same from the file alone, as a chain of operations.
        overwrite: replace the folder.

    Returns:
        What was proved, in a line.

    Raises:
        ValueError: in one line: a format without that precision, no images for int8, an image processor that
            is no resizing and cropping, logits that are off by more than `BOUNDS`; nothing is written then.
        ImportError: a package is missing; the message names the extra.
    """
    if format in ELSEWHERE:
        raise ValueError(
            f"format {format!r} is not written, since it could not be run and proved; {ELSEWHERE[format]}"
        )
    if format not in FORMATS:
        raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
    form = FORMATS[format]
    if precision not in form.precisions:
        having = [name for name, other in FORMATS.items() if precision in other.precisions]
        raise ValueError(
            f"{format} has no precision {precision!r}: it has {', '.join(form.precisions)}"
            + (f"; {precision} is in {', '.join(having)}" if having else "")
        )
    if opset < LEAST_OPSET:
        raise ValueError(f"--opset {opset}: PyTorch exports to {LEAST_OPSET} and later")
    if custom_op:
        if format != "onnx" or precision == "fp16":
            raise ValueError(f"--custom-op is for onnx in fp32 and int8, not {format} in {precision}")
        find_compiler()
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size} must be at least 1")
    if format == "executorch" and dynamic_batch:
        raise ValueError("--dynamic-batch: executorch has a fixed number of images in a call (--batch-size)")
    if precision == "int8" and images is None:
        raise ValueError("int8 is calibrated on images: --images FOLDER, or digits")
    for module, name in form.needs:
        extra(module, name)
    output = Path(output).expanduser()
    check_output(output, overwrite)
    model, processor = load_checkpoint(source)
    preprocessing = preprocessing_of(processor, model.config.num_channels)
    batches, about = pixels_of(images, model, processor)
    model = model.float().eval()
    checked = torch.cat(batches)[:NUM_CHECKED]
    checked = checked.repeat(-(-batch_size // len(checked)), 1, 1, 1)[: max(batch_size, len(checked))]
    checked = checked[: len(checked) // batch_size * batch_size]
    expected = model(checked).logits
    inner = Logits(folded(model), torch.float16 if (precision, format) in HALF else torch.float32).eval()
    # a dynamic batch is traced with two: 1 would be taken for a constant
    example = checked[:1].repeat(2 if dynamic_batch and batch_size == 1 else batch_size, 1, 1, 1)
    job = Job(inner, example, dynamic_batch, precision, batches, opset, custom_op)
    with written_whole(output) as folder:
        form.write(job, folder)
        logits = logits_of(form.load(folder), checked, batch_size)
        proof = compare(logits, expected, precision, source) | {
            "source": Path(source).name if Path(source).is_dir() else source,
            "format": format,
            "precision": precision,
            "images": about,
            "batch_size": "any" if dynamic_batch else batch_size,
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "versions": versions(format),
        }
        if custom_op:
            logits = logits_of(load_onnx(folder, custom=False), checked, batch_size)
            proof["without_library"] = compare(logits, expected, precision, source)
            proof["library"] = f"{platform.system()} {platform.machine()}"
        stored = {"pixel_values": checked.contiguous(), "logits": expected.contiguous()}
        save_file(stored, folder / "check.safetensors")
        labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
        for name, values in (("preprocessing", preprocessing), ("labels", labels), ("proof", proof)):
            write_text(folder / f"{name}.json", json.dumps(values, indent=2) + "\n")
        needs = {"onnx": "onnxruntime", "pt2": "torch", "aoti": "torch"}.get(format, format)
        program = CUSTOM_PROGRAM if custom_op else form.program
        text = PROGRAM.format(needs=needs, imports=IMPORTS[format], program=program)
        write_text(folder / "run.py", text)
        if format == "onnx":
            write_text(folder / "run.cjs", JAVASCRIPT)
    return (
        f"{output}: {format} in {precision}, {proof['bytes'] / 1e6:.1f} MB; logits within "
        f"{proof['relative_difference']:.1e} of {source}'s on {about}, {proof['same_label']} of "
        f"{len(checked)} labels the same"
    )


def logits_of(run: Runner, pixels: Tensor, batch_size: int) -> Tensor:
    return torch.cat([run(part.contiguous()).detach() for part in pixels.split(batch_size)]).float()


HALF = {("fp16", "onnx"), ("fp16", "pt2"), ("fp16", "aoti")}  # OpenVINO keeps float32 operations


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier export."""
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"{output} exists; --overwrite replaces it")
    if output.is_symlink() or not all((output / name).is_file() for name in ("proof.json", "run.py")):
        raise ValueError(f"{output} is no exported model, so --overwrite does not replace it")


def compare(logits: Tensor, expected: Tensor, precision: str, source: str) -> dict[str, Any]:
    """Return how far logits are from what they must be.

    Raises:
        ValueError: farther than the precision allows.
    """
    if logits.shape != expected.shape:
        raise ValueError(f"the exported model returns {tuple(logits.shape)}, not {tuple(expected.shape)}")
    difference = ((logits - expected).norm() / expected.norm().clamp(min=1e-12)).item()
    if not difference <= BOUNDS[precision]:
        raise ValueError(
            f"the exported logits differ from {source}'s by {difference:.3g} of their size, more than the "
            f"{BOUNDS[precision]:g} that {precision} allows; nothing is written"
        )
    return {
        "relative_difference": difference,
        "largest_difference": (logits - expected).abs().max().item(),
        "allowed_relative_difference": BOUNDS[precision],
        "same_label": int((logits.argmax(-1) == expected.argmax(-1)).sum()),
        "compared": len(logits),
    }


def preprocessing_of(processor: Any, num_channels: int) -> Mapping[str, Any]:
    """Return what an image processor does as numbers that a program in any language can follow.

    Raises:
        ValueError: it does more than resizing, cropping and normalising, or channels are no colours.
    """
    kind: Any = type(processor)
    own_work = has_own_work(processor) and kind is not GreyViTImageProcessor
    size = {} if own_work else dict(processor.size)
    square = size.get("height") == size.get("width")
    side = size.get("shortest_edge") or (size.get("height") if square else None)
    if num_channels not in (1, 3) or not side:
        raise ValueError(
            f"the image processor ({type(processor).__name__}, {num_channels} channels) does more than to "
            "resize, crop and normalise; the exported folder could not say how to prepare images"
        )
    return {
        "mode": "RGB" if num_channels == 3 else "L",
        "resize": side,
        "keep_ratio": "shortest_edge" in size,
        "resample": int(processor.resample),
        "crop": dict(processor.crop_size)["height"] if processor.do_center_crop else side,
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }


def pixels_of(images: str | None, model: Any, processor: Any) -> tuple[list[Tensor], str]:
    """Return batches of pixel values, and what they are in words."""
    if images is None:
        shape = model.config.num_channels, *pair(model.config.image_size)
        return [noise_images(NUM_CHECKED, *shape)], f"{NUM_CHECKED} images of noise"
    batches = list(image_batches(find_images(images), processor))
    return batches, f"images of {Path(images).name or images}"


def versions(format: str) -> dict[str, str]:
    """Return the versions of what took part."""
    names = [
        "torch",
        "flashkat_hf",
        *dict.fromkeys(name.partition(".")[0] for name, _ in FORMATS[format].needs),
    ]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = getattr(importlib.import_module(name), "__version__", "unknown")
    return found
