"""The `flashkat` command; each of its commands imports what it needs when it starts."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .checkpoints.command_options import add_commands
from .checkpoints.names import check_model_name, check_source_name
from .checkpoints.published import PUBLISHED
from .files import expand_homes
from .messages import one_line, warn

if TYPE_CHECKING:
    from .checkpoints.commands import Images, Opener
    from .hub.upload import Push

TRAINING = {  # commands whose own parsers know the settings of a run
    "finetune": "fine-tune a FlashKAT on images, or train a micro one on scikit-learn's digits",
    "pretrain": "train a FlashKAT from scratch by the paper's recipe",
    "evaluate": "top-1 and top-5 accuracy of a FlashKAT or a ViT",
}
INFERENCE = {  # likewise, in another folder
    "predict": "write the most probable labels of any number of pictures to a Parquet file",
    "embed": "write a FlashKAT's features of any number of pictures to a Parquet file",
}
TRANSFORMS = ("imagenet", "augreg")  # of `conversion.source`, which needs PyTorch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, or what is wrong: 1 after one line on the standard error, 130 after Ctrl-C, and 141 without a word
        when nobody reads the standard output any more.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 141


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="flashkat",
        description="FlashKAT models: training, evaluation, conversion, inspection and the Hub.",
        epilog="On several devices: accelerate launch -m flashkat_hf COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"flashkat_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {**TRAINING, **INFERENCE}.items():
        commands.add_parser(name, help=text, add_help=False, allow_abbrev=False)
    _add_classify(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_info(commands)
    _add_push(commands)
    _add_publish(commands)
    add_commands(commands, _opener)
    options, unknown = parser.parse_known_args(arguments)
    trains = options.command in TRAINING or options.command in INFERENCE
    if unknown and not trains:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    expand_homes(options)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of any library in a log file
    name, sends = f"flashkat {options.command}", options.command in ("push", "publish")
    try:
        if trains:
            if options.command in TRAINING:
                from .training import commands as own
            else:
                from .inference import commands as own
            text = getattr(own, options.command)(unknown)
        else:
            text = options.run(options)
        if text:
            print(text)
    except BrokenPipeError:
        raise
    except (ValueError, ImportError, OSError) as error:
        new_line = "\n" * (sends and _shows_bars())  # a bar may have been cut short
        warn(f"{new_line}{name}: {one_line(str(error), longest=2000)}")
        return 1
    except KeyboardInterrupt:
        again = "" if trains else "; the same command again finishes it"
        warn(f"{name}: interrupted{again}")
        return 130
    return 0


def _quieten(sends: bool = False) -> None:
    """Turn off what libraries report of their own accord, less the bars of uploads."""
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    if sends and _shows_bars():
        enable_progress_bars()  # huggingface_hub's own, of uploads and downloads
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # less its lines about each attempt to reach the network


def _shows_bars() -> bool:
    from huggingface_hub import constants

    return sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS


def _add_classify(commands) -> None:
    text = "name what is in image files"
    parser = commands.add_parser("classify", help=text, description=text)
    parser.add_argument("model", help="folder or Hub id of a FlashKAT")
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="image file")
    text = "labels to name for each image (default: 3)"
    parser.add_argument("--top-k", "--top_k", type=int, default=3, metavar="N", help=text)
    parser.set_defaults(run=_classify)


def _classify(options: argparse.Namespace) -> str:
    from .training.commands import classify

    return classify(options.model, options.images, options.top_k)


def _add_convert(commands) -> None:
    text = "turn a KAT, or a plain ViT or DeiT, into a FlashKAT folder, and prove that both compute the same"
    parser = commands.add_parser("convert", help=text, description=text)
    parser.add_argument("source", help=f"file, folder, Hub id, or one of {', '.join(PUBLISHED)}")
    parser.add_argument("output", help="folder to make; with --to-original a .safetensors or .pth file")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    text = "resize the positions for other images, bicubic"
    parser.add_argument("--image-size", type=int, metavar="N", help=text)
    parser.add_argument("--num-labels", type=int, metavar="N", help="a fresh head")
    text = (
        "a field of the config that the weights cannot tell, such as num_attention_heads=3; may be repeated"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=text)
    text = "image transform, where the source's is not known"
    parser.add_argument("--transform", choices=TRANSFORMS, help=text)
    text = "of a training checkpoint, not the averaged weights"
    parser.add_argument("--no-ema", action="store_true", help=text)
    text = (
        "fit act2 to a ViT's GELU on the activations of a folder of images, or scikit-learn's digits (digits)"
    )
    parser.add_argument("--calibrate", metavar="IMAGES", help=text)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--no-verify", action="store_true", help="skip the proof; the report says so")
    text = "write a FlashKAT folder's weights for the original"
    parser.add_argument("--to-original", action="store_true", help=text)
    parser.add_argument("--naming", choices=("kat", "flashkat"), help="with --to-original: whose names")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> str:
    settings = parse_settings(options.set)
    source, output, overwrite = options.source, options.output, options.overwrite
    if options.to_original:
        others = "image_size num_labels set transform no_ema calibrate revision no_verify"
        for name in others.split():
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} has no meaning with --to-original")
        check_model_name(source)
        _quieten()
        from .conversion.export import export_original

        return f"{output}: {export_original(source, output, naming=options.naming, overwrite=overwrite)}"
    if options.naming:
        raise ValueError("--naming has no meaning without --to-original")
    check_source_name(source)
    _quieten()
    from .conversion.conversion import convert

    same = ("image_size", "num_labels", "transform", "revision", "calibrate")
    report = convert(
        source,
        output,
        overwrite=overwrite,
        settings=settings,
        ema=not options.no_ema,
        verify=not options.no_verify,
        **{name: getattr(options, name) for name in same},
    )
    return f"{report}\n{output} written"


def _add_export(commands) -> None:
    text = "write a FlashKAT for another runtime, run it there, and prove that both compute the same"
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("model", help="folder or Hub id of a FlashKAT")
    formats = "onnx, openvino, executorch, pt2 (torch.export) or aoti (compiled for this machine)"
    parser.add_argument("--format", default="onnx", help=f"{formats}; default: onnx")
    parser.add_argument("--precision", default="fp32", help="fp32, fp16 or int8; default: fp32")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to make")
    text = "folder of images, or digits, to compare on and to calibrate int8 on; default: noise to compare on"
    parser.add_argument("--images", metavar="FOLDER", help=text)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images in a call; default: 1")
    parser.add_argument("--dynamic-batch", action="store_true", help="any number of images in a call")
    parser.add_argument("--opset", type=int, default=18, metavar="N", help="of ONNX; default: 18")
    text = "for onnx: rationals as operators of our own, in a library for onnxruntime that cc or gcc compiles"
    parser.add_argument("--custom-op", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> str:
    check_model_name(options.model)
    _quieten()
    from .deployment import export_model

    names = [
        "format",
        "precision",
        "images",
        "batch_size",
        "dynamic_batch",
        "opset",
        "custom_op",
        "overwrite",
    ]
    return export_model(options.model, options.output, **{name: getattr(options, name) for name in names})


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn FIELD=VALUE strings into a dictionary; values are JSON (3, 0.1, true), and text otherwise.

    Raises:
        ValueError: there is no "=", or a field twice.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {assignment}: FIELD=VALUE is expected")
        if name in settings:
            raise ValueError(f"--set {assignment}: {name} is set twice")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def _add_info(commands) -> None:
    text = "say what a FlashKAT folder or Hub id is, and how far its activations have moved"
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("model", help="folder or Hub id")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> str:
    check_model_name(options.model)
    _quieten()
    from .checkpoints.description import describe

    return describe(options.model)


def _add_push(commands) -> None:
    text = "check a model folder and send it to the Hub in one commit"
    epilog = "The access token is the one of `hf auth login`, or HF_TOKEN's."
    parser = commands.add_parser("push", help=text, description=text, epilog=epilog)
    parser.add_argument("folder", help="what `convert` or a training run has left")
    parser.add_argument("repo", help="owner/name; made if it does not exist")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made from main if it does not exist")
    parser.add_argument("--pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", help="of the commit")
    text = "also optimizer states and training_args.bin"
    parser.add_argument("--include-training-state", action="store_true", help=text)
    parser.add_argument("--license", metavar="ID", help="such as mit, for the card, where there is none yet")
    _add_sending(parser)
    parser.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> str:
    from .hub.destination import Destination, check_token

    check_model_name(options.folder)
    check_token(Destination(options.repo, options.revision or "main"))
    _quieten(sends=True)
    from .hub import push

    result = push(
        options.folder,
        options.repo,
        private=options.private or None,
        revision=options.revision,
        create_pr=options.pr,
        what_if=options.what_if,
        message=options.message,
        include_training_state=options.include_training_state,
        license=options.license,
        report=_say,
    )
    return _outcome(result, options.what_if)


def _add_publish(commands) -> None:
    text = "convert a published KAT, prove it, write its card and push it"
    parser = commands.add_parser("publish", help=text, description=text)
    text = f"{', '.join(PUBLISHED)} or all"
    parser.add_argument("name", choices=(*PUBLISHED, "all"), metavar="NAME", help=text)
    parser.add_argument("--namespace", required=True, help="your name, or an organisation of yours")
    _add_sending(parser)
    parser.set_defaults(run=_publish)


def _publish(options: argparse.Namespace) -> str:
    from .hub.destination import Destination, check_token

    first = next(iter(PUBLISHED)) if options.name == "all" else options.name
    check_token(Destination(f"{options.namespace}/{first}"))
    _quieten(sends=True)
    from .hub import publish

    private, what_if = options.private or None, options.what_if
    results = publish(options.name, options.namespace, private=private, what_if=what_if, report=_say)
    return "\n".join(_outcome(result, what_if) for result in results)


def _add_sending(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true", help="of a new repository")
    text = "check everything and show what would be sent; send nothing"
    parser.add_argument("--what-if", action="store_true", help=text)


def _say(text: str) -> None:
    print(text, flush=True)


def _outcome(result: "Push", what_if: bool) -> str:
    if what_if:
        return f"{result.repo_id}: nothing was sent (--what-if)"
    return f"{result.repo_id} has all of it already: {result.url}" if result.empty else result.url


NUM_TESTED = 1000  # of a folder, evenly spread


def _opener() -> "Opener":
    """Return how the commands of `checkpoints/` open images; that folder knows nothing of `data/`."""
    _quieten()
    from .checkpoints.commands import Opener
    from .data.augmentation import middle
    from .data.samples import open_image

    return Opener(_open_images, lambda path, processor: middle(open_image(path), processor))


def _open_images(source: str, model, processor) -> "Images":
    """Return the images of a folder, or of the digits, for the commands that measure and test on them.

    Measured on is `train/` of a folder with `train/` and `val/`, and tested on `val/`; for any other folder
    both are all its images, with the names of its sub-folders as labels if the model has such labels.

    Raises:
        ValueError: there is no such folder, it has no images, one cannot be read, or a package is missing.
    """
    import torch

    from .checkpoints.commands import Images
    from .conversion.calibration import BATCH_SIZE, find_images, image_batches
    from .data.digits import load_digits
    from .data.image_folder import load_image_folder
    from .data.samples import Examples
    from .training.evaluation import match_classes

    splits = source == "digits" or all((Path(source) / name).is_dir() for name in ("train", "val"))
    measured = str(Path(source) / "train") if splits and source != "digits" else source
    outputs = [model.config.id2label[index] for index in sorted(model.config.id2label)]
    try:
        batches = list(image_batches(find_images(measured), processor))
        if splits:
            data = load_digits() if source == "digits" else load_image_folder(source)
            tested, names, about = data.test, data.class_names, "held-out"
        else:
            images = find_images(source)
            folders = ["/".join(Path(str(image)).relative_to(source).parts[:-1][:1]) for image in images]
            names = sorted(set(folders))
            tested = Examples([str(image) for image in images], [names.index(name) for name in folders])
            about = "the same images that the inputs were measured on"
    except ImportError as error:
        raise ValueError(str(error)) from error
    try:
        labels = match_classes(names, outputs)[0] if len(names) > 1 and "" not in names else None
    except ValueError:
        labels = None
    count = min(len(tested), NUM_TESTED)
    chosen = [index * len(tested) // count for index in range(count)]

    def test_batches():
        for start in range(0, count, BATCH_SIZE):
            part = chosen[start : start + BATCH_SIZE]
            (pixels,) = image_batches([tested.images[index] for index in part], processor)
            known = None if labels is None else torch.tensor([labels[tested.labels[index]] for index in part])
            yield pixels, known

    return Images(batches, test_batches(), about if labels else f"{about}, without labels that the model has")


if __name__ == "__main__":
    sys.exit(main())
