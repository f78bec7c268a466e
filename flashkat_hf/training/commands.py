"""The commands that train a model, evaluate it, or ask it about images; each imports PyTorch at its start."""

import argparse
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.names import check_model_name
from ..data.names import check_source
from ..files import expand_homes
from ..lazy import import_uncollected
from ..messages import extra
from .output import check_contents, check_place
from .recipe import DATA, Settings, parse

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

TIMM = ("hf-hub:", "local-dir:")
DATA_SETTINGS = {  # the settings of a run that say how data are read
    item.name: item for item in fields(Settings) if item.metadata.get("marks") == (DATA,)
}


def finetune(arguments: Sequence[str]) -> str:
    """Fine-tune a FlashKAT on images; without arguments, train a micro one on scikit-learn's digits.

    Returns:
        What the main process has to say: the accuracy, and the command that asks the model about an image.

    Raises:
        ValueError, ImportError, OSError: in one line, as `train`.
    """
    settings = parse(
        arguments, "finetune", "Fine-tune a FlashKAT on images; by default a micro one on digits."
    )
    summary = _train(settings)
    if not summary:
        return ""
    best, images = settings.output / "best", sorted((settings.output / "samples").glob("*.png"))
    question = shlex.join(["flashkat", "classify", str(best), str(images[-1]) if images else "IMAGE"])
    return (
        f"test accuracy {summary['top1']:.2%} on {summary['num_test_images']} images; saved in {best}\n"
        f"now ask it about an image:\n{question}"
    )


def pretrain(arguments: Sequence[str]) -> str:
    """Train a FlashKAT from scratch by the paper's recipe.

    Returns:
        What the main process has to say: the accuracies.

    Raises:
        ValueError, ImportError, OSError: in one line, as `train`.
    """
    settings = parse(arguments, "pretrain", "Train a FlashKAT from scratch by the paper's recipe.")
    if settings.data is None:
        raise ValueError("--data is needed: a folder with train/ and val/, a data set, or shards")
    summary = _train(settings)
    if not summary:
        return ""
    accuracy = f"top-1 {summary['top1']:.2%}, top-5 {summary['top5']:.2%}"
    return f"{accuracy} on {summary['num_test_images']} images; saved in {settings.output / 'best'}"


def _train(settings: Settings) -> dict[str, Any] | None:
    if settings.model:
        try:
            check_model_name(settings.model)
        except ValueError as error:
            raise ValueError(f"--model: {error}") from error
    check_source(settings.data)
    check_place(settings.output)
    if settings.output.is_dir():
        check_contents(settings)
    from .start import import_train

    return import_train()(settings)


def classify(model: str, images: Sequence[Path], top_k: int) -> str:
    """Name what is in image files.

    Args:
        model: folder or Hub id of a FlashKAT.
        images: the files.
        top_k: number of labels to name for each.

    Returns:
        One line for each image.

    Raises:
        ValueError: in one line, an image or the model cannot be read.
    """
    if top_k < 1:
        raise ValueError(f"--top-k: {top_k} must be at least 1")
    check_model_name(model)
    from ..data.samples import DataError, open_image

    for path in images:  # before the model, which may take long to load
        open_image(path)
    import_uncollected("..checkpoints.loading", __package__ or "")  # PyTorch and transformers
    from transformers import pipeline
    from transformers.utils import logging

    from ..checkpoints.loading import load_checkpoint
    from ..data.augmentation import middle

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    network, processor = load_checkpoint(model)
    pipe = pipeline("image-classification", model=network, image_processor=processor)
    lines = []
    for path in images:
        image = open_image(path)
        try:
            answers = pipe(middle(image, processor), top_k=top_k)
        except DataError as error:
            raise ValueError(f"cannot use the image {path}: {error}") from error
        if not all(math.isfinite(answer["score"]) for answer in answers):
            raise ValueError(f"the model's outputs for {path} are not finite")
        lines.append(f"{path}: " + ", ".join(f"{one['label']} {one['score']:.1%}" for one in answers))
    return "\n".join(lines)


def evaluate(arguments: Sequence[str]) -> str:
    """Evaluate a checkpoint, a FlashKAT or a ViT, on the test split of any data.

    Returns:
        What the main process has to say: top-1, top-5 and loss, as a sentence or as JSON.

    Raises:
        ValueError, ImportError, OSError: in one line, for a model or data that do not serve.
    """
    options = _evaluation_options(arguments)
    if not options.model.startswith(TIMM):
        check_model_name(options.model)
    check_source(options.data)
    import_uncollected("..checkpoints.loading", __package__ or "")  # PyTorch and transformers
    from accelerate import Accelerator
    from transformers.utils import logging

    accelerator = Accelerator(mixed_precision=None if options.mixed_precision else "no")
    if not accelerator.is_main_process:
        logging.set_verbosity_error()
    if not accelerator.is_main_process or options.no_progress:
        logging.disable_progress_bar()
    result = _evaluation(options, accelerator)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return ""
    if options.json:
        return json.dumps(result)
    return (
        f"{result['model']} on {result['count']} images of {result['data']} ({result['split']}): top-1 "
        f"{result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f}; classes matched "
        f"{result['classes_matched']}; {result['images_per_second']:.0f} images/s"
    )


def _evaluation_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flashkat evaluate",
        description="Top-1 and top-5 accuracy of a checkpoint, a FlashKAT or a ViT; every image counts once.",
    )
    parser.add_argument("model", help="folder or Hub id; hf-hub:ID or local-dir:FOLDER for timm's")
    parser.add_argument("--data", help="folder, shards, or Hub id; default: the digits")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which half of the data")
    parser.add_argument("--batch-size", type=int, default=64, help="images of one process (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images, for each process")
    parser.add_argument(
        "--mixed-precision", action="store_true", help="as accelerate is set; default: the model's own"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    for name, item in DATA_SETTINGS.items():
        kind: dict[str, Any] = {"action": "store_true"} if item.default is False else {}
        kind |= {"nargs": "+", "metavar": "NAME"} if name == "class_names" else {}
        parser.add_argument(f"--{name.replace('_', '-')}", help=item.metadata["help"], **kind)
    options = parser.parse_args(arguments)
    expand_homes(options)
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} must be at least {least}")
    return options


def _evaluation(options: argparse.Namespace, accelerator: "Accelerator") -> dict[str, Any]:
    """Evaluate as the options say; return all that there is to say about it."""
    from ..data import open_data
    from ..data.batches import EvalBatches
    from .evaluation import evaluate, match_classes

    processes = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    values = {name: getattr(options, name) for name in DATA_SETTINGS if getattr(options, name)}
    data = open_data(options.data, **processes, **values)
    model, transform, outputs = load_classifier(options.model)
    indices, rule = match_classes(data.class_names, outputs)
    batches = EvalBatches(
        data.train if options.split == "train" else data.test,
        transform,
        batch_size=options.batch_size,
        workers=options.workers,
        pin_memory=accelerator.device.type == "cuda",
        **processes,
    )
    model = accelerator.prepare_model(model, evaluation_mode=True)
    start = time.perf_counter()
    with closing(batches):
        result = evaluate(
            model,
            batches,
            accelerator,
            outputs=indices,
            mixed_precision=options.mixed_precision,
            progress=None if options.no_progress else "evaluating",
        )
    seconds = time.perf_counter() - start
    return {
        "model": options.model,
        "data": options.data or "digits",
        "split": options.split,
        **result,
        "classes_matched": rule,
        "images_per_second": round(result["count"] / seconds, 1),
        "skipped": sorted(batches.corrupt),  # by the main process
    }


def load_classifier(name: str) -> "tuple[nn.Module, Callable, list[str]]":
    """Return a model, its evaluation transform, and the names of its outputs.

    Args:
        name: folder or Hub id of a FlashKAT or of another image classifier of transformers or timm.

    Raises:
        ValueError: it cannot be loaded; in one line.
    """
    from transformers import AutoConfig

    from ..checkpoints.loading import load_checkpoint, load_other, reason
    from ..data.augmentation import evaluation_transform

    if name.startswith(TIMM):
        return _load_timm(name)
    file = Path(name, "config.json")
    try:
        if file.is_file() and "architecture" in json.loads(file.read_text()):
            return _load_timm(f"local-dir:{name}")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type == "timm_wrapper":
            return _load_timm(f"hf-hub:{name}")
        if config.model_type == "flashkat":
            model, processor = load_checkpoint(name)
        else:
            model, processor = load_other(name, config)
    except Exception as error:  # the Hub's, safetensors' and transformers' errors have no common class
        text = str(error) if str(error).startswith("cannot load ") else f"cannot load {name}: {reason(error)}"
        raise ValueError(text) from error
    outputs = [str(model.config.id2label.get(i, f"LABEL_{i}")) for i in range(model.config.num_labels)]
    return model, evaluation_transform(processor), outputs


def _load_timm(name: str) -> "tuple[nn.Module, Callable, list[str]]":
    """Return the same of a timm checkpoint: `hf-hub:` or `local-dir:` and its id or folder."""
    from ..checkpoints.loading import reason

    timm = extra("timm")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise ValueError(f"cannot load {name}: {reason(error)}") from error
    config = timm.data.resolve_model_data_config(model)
    names = model.pretrained_cfg.get("label_names") or [f"LABEL_{i}" for i in range(model.num_classes)]
    return model, timm.data.create_transform(**config, is_training=False), [str(name) for name in names]
