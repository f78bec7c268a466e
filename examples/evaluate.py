"""Top-1 and top-5 accuracy of a checkpoint, a FlashKAT or a ViT, on the test split of any data.

    python examples/evaluate.py runs/digits/best                                # on scikit-learn's digits
    accelerate launch examples/evaluate.py runs/tiny/best --data imagenet --batch-size 256
    accelerate launch examples/evaluate.py google/vit-base-patch16-224 --data imagenet
    python examples/evaluate.py hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data imagenet --json

Every image counts once, on any number of processes. The data: docs/data.md.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

from flashkat_hf.checkpoints import load_checkpoint
from flashkat_hf.data import open_data
from flashkat_hf.data.augmentation import evaluation_transform
from flashkat_hf.data.batches import EvalBatches
from flashkat_hf.messages import one_line, warn
from flashkat_hf.training.evaluation import evaluate, match_classes
from flashkat_hf.training.recipe import DATA, Settings

TIMM = ("hf-hub:", "local-dir:")
DATA_SETTINGS = {  # the settings of a run that say how data are read
    item.name: item for item in fields(Settings) if item.metadata.get("marks") == (DATA,)
}


def load_classifier(name: str) -> tuple[nn.Module, Callable, list[str]]:
    """Return a model, its evaluation transform, and the names of its outputs.

    Args:
        name: folder or Hub id of a FlashKAT or of another image classifier of transformers or timm.

    Raises:
        ValueError: it cannot be loaded; in one line.
    """
    if name.startswith(TIMM):
        return load_timm(name)
    config = Path(name, "config.json")
    try:
        if config.is_file() and "architecture" in json.loads(config.read_text()):
            return load_timm(f"local-dir:{name}")
        kind = AutoConfig.from_pretrained(name).model_type
        if kind == "timm_wrapper":
            return load_timm(f"hf-hub:{name}")
        if kind == "flashkat":
            model, processor = load_checkpoint(name)
        else:
            model = AutoModelForImageClassification.from_pretrained(name)
            processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # the Hub's, safetensors' and transformers' errors have no common class
        raise ValueError(f"cannot load {name}: {one_line(error)}") from error
    outputs = [str(model.config.id2label.get(i, f"LABEL_{i}")) for i in range(model.config.num_labels)]
    return model, evaluation_transform(processor), outputs


def load_timm(name: str) -> tuple[nn.Module, Callable, list[str]]:
    """Return the same of a timm checkpoint: `hf-hub:` or `local-dir:` and its id or folder."""
    import timm

    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise ValueError(f"cannot load {name}: {one_line(error)}") from error
    config = timm.data.resolve_model_data_config(model)
    names = model.pretrained_cfg.get("label_names") or [f"LABEL_{i}" for i in range(model.num_classes)]
    return model, timm.data.create_transform(**config, is_training=False), [str(name) for name in names]


def run(options: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Evaluate as the options say; return all that there is to say about it."""
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
        kind = {"action": "store_true"} if item.default is False else {}
        kind |= {"nargs": "+", "metavar": "NAME"} if name == "class_names" else {}
        parser.add_argument(f"--{name.replace('_', '-')}", help=item.metadata["help"], **kind)
    options = parser.parse_args(arguments)
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} must be at least {least}")
    return options


def main(options: argparse.Namespace) -> None:
    try:
        accelerator = Accelerator(mixed_precision=None if options.mixed_precision else "no")
        if not accelerator.is_main_process:
            logging.set_verbosity_error()
        if not accelerator.is_main_process or options.no_progress:
            logging.disable_progress_bar()
        result = run(options, accelerator)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    except KeyboardInterrupt:
        warn("interrupted")
        raise SystemExit(130) from None
    if accelerator.is_main_process:
        print(json.dumps(result) if options.json else describe(result))
    accelerator.end_training()


def describe(result: dict[str, Any]) -> str:
    return (
        f"{result['model']} on {result['count']} images of {result['data']} ({result['split']}): top-1 "
        f"{result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f}; classes matched "
        f"{result['classes_matched']}; {result['images_per_second']:.0f} images/s"
    )


if __name__ == "__main__":
    main(parse())
