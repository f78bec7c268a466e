"""`flashkat predict` and `flashkat embed`; each imports PyTorch at its start."""

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from ..checkpoints.names import check_model_name
from ..lazy import import_uncollected
from ..messages import extra
from ..training.commands import DATA_SETTINGS, TIMM, load_classifier

KINDS = {
    "predict": "The most probable labels of each picture, in a Parquet file.",
    "embed": "A FlashKAT's features of each picture, in a Parquet file.",
}


def predict(arguments: Sequence[str]) -> str:
    """Write the most probable labels of each picture.

    Returns:
        What the main process has to say.

    Raises:
        ValueError, ImportError, OSError: in one line.
    """
    return _command("predict", arguments)


def embed(arguments: Sequence[str]) -> str:
    """Write features of each picture; see `predict`."""
    return _command("embed", arguments)


def _command(kind: str, arguments: Sequence[str]) -> str:
    options = _options(kind, arguments)
    if not options.model.startswith(TIMM):
        check_model_name(options.model)
    extra("pyarrow")
    import_uncollected("..checkpoints.loading", __package__ or "")  # PyTorch and transformers
    from accelerate import Accelerator
    from transformers.utils import logging

    from ..training.speed import cores
    from .inputs import Inputs
    from .pictures import open_pictures
    from .questions import Forward, features, predictions
    from .run import run

    accelerator = Accelerator(mixed_precision=None if options.mixed_precision else "no")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    values = {name: getattr(options, name) for name in DATA_SETTINGS if name != "skip_corrupt"}
    pictures = open_pictures(options.data, options.split, **values)
    model, transform, labels = load_classifier(options.model)
    model = model.to(accelerator.device).eval()
    inputs = Inputs(transform, accelerator.device, options.decoder)
    context: Any = accelerator.autocast if options.mixed_precision else nullcontext
    ours = getattr(getattr(model, "config", None), "model_type", None) == "flashkat"
    workers = options.workers
    if workers is None:
        share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(16, max(1, share)) if accelerator.device.type == "cuda" else 0
    plan: dict[str, Any] = {"command": kind, "model": options.model, "data": options.data}
    plan["mixed_precision"] = accelerator.mixed_precision
    if kind == "predict":
        top_k = options.top_k or min(5, len(labels))
        if top_k > len(labels):
            raise ValueError(f"--top-k: {top_k} is more than the model's {len(labels)} labels")
        question = predictions(Forward(model, options.batch_size, context, ours), labels, top_k)
        plan["top_k"] = top_k
    else:
        if not ours:
            raise ValueError(f"{options.model} is no FlashKAT, whose features embed writes")
        question = features(Forward(cast(Any, model).flashkat, options.batch_size, context), options.patches)
        plan["patches"] = options.patches
    rows = run(
        options.output,
        pictures,
        inputs,
        question,
        accelerator,
        plan=plan,
        batch_size=options.batch_size,
        workers=workers,
        overwrite=options.overwrite,
        progress=None if options.no_progress else f"{kind}ing",
    )
    accelerator.end_training()
    return "" if rows is None else f"{options.output}: {rows} pictures{_unreadable(options.output)}"


def _unreadable(path: Path) -> str:
    errors = extra("pyarrow.parquet").read_table(path, columns=["error"])["error"]
    count = len(errors) - errors.null_count
    return f", {count} of them could not be read (column error)" if count else ""


def _options(kind: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"flashkat {kind}", description=KINDS[kind])
    text = "folder or Hub id" + ("; hf-hub:ID or local-dir:FOLDER for timm's" if kind == "predict" else "")
    parser.add_argument("model", help=text)
    text = "folder of pictures, text file of paths, or what training reads: folder, shards, Hub id, digits"
    parser.add_argument("data", help=text)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="Parquet file to make"
    )
    if kind == "predict":
        parser.add_argument("--top-k", type=int, metavar="N", help="labels of a picture (default: 5, or all)")
    else:
        parser.add_argument("--patches", action="store_true", help="the features of every patch, too")
    parser.add_argument(
        "--split", choices=("test", "train"), default="test", help="of data that training reads"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures of one process (default: 64)")
    text = "processes that read, for each process (default: on a GPU as many as there are cores, else none)"
    parser.add_argument("--workers", type=int, help=text)
    text = "who decodes JPEG files (default: auto, a GPU that can)"
    parser.add_argument("--decoder", choices=("auto", "workers", "gpu"), default="auto", help=text)
    parser.add_argument("--mixed-precision", action="store_true", help="as accelerate is set")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the file; parts made with other settings are dropped",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    for name, item in DATA_SETTINGS.items():
        if name == "skip_corrupt":  # it always does
            continue
        more: dict[str, Any] = {"action": "store_true"} if item.default is False else {}
        more |= {"nargs": "+", "metavar": "NAME"} if name == "class_names" else {}
        parser.add_argument(f"--{name.replace('_', '-')}", help=item.metadata["help"], **more)
    options = parser.parse_args(arguments)
    for name, least in (("batch_size", 1), ("workers", 0), ("top_k", 1)):
        value = getattr(options, name, None)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: {value} must be at least {least}")
    if options.output.suffix != ".parquet":
        parser.error(f"--output: {options.output} must end in .parquet")
    return options
