"""The `flashkat` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

from .checkpoints.description import describe
from .checkpoints.published import PUBLISHED
from .conversion.conversion import convert
from .conversion.export import export_original
from .conversion.source import TRANSFORMS
from .hub import publish, push
from .hub.upload import Push
from .messages import warn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 after one line on the standard error about what is wrong."""
    parser = argparse.ArgumentParser(
        prog="flashkat", description="FlashKAT models: conversion, inspection and the Hub."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_info(commands)
    _add_push(commands)
    _add_publish(commands)
    options = parser.parse_args(arguments)
    sends = options.command in ("push", "publish")
    show_bars = sends and not constants.HF_HUB_DISABLE_PROGRESS_BARS and sys.stderr.isatty()
    logging.disable_progress_bar()
    if show_bars:
        enable_progress_bars()  # huggingface_hub's own, of uploads and downloads
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # less its lines about each attempt to reach the network
    try:
        print(options.run(options))
    except ValueError as error:
        new_line = "\n" * show_bars  # a bar may have been cut short
        warn(f"{new_line}flashkat {options.command}: {error}")
        return 1
    except KeyboardInterrupt:
        warn(f"flashkat {options.command}: interrupted; the same command again finishes it")
        return 130
    return 0


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
        return f"{output}: {export_original(source, output, naming=options.naming, overwrite=overwrite)}"
    if options.naming:
        raise ValueError("--naming has no meaning without --to-original")
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
    parser.set_defaults(run=lambda options: describe(options.model))


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
    private, what_if = options.private or None, options.what_if
    results = publish(options.name, options.namespace, private=private, what_if=what_if, report=_say)
    return "\n".join(_outcome(result, what_if) for result in results)


def _add_sending(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true", help="of a new repository")
    text = "check everything and show what would be sent; send nothing"
    parser.add_argument("--what-if", action="store_true", help=text)


def _say(text: str) -> None:
    print(text, flush=True)


def _outcome(result: Push, what_if: bool) -> str:
    if what_if:
        return f"{result.repo_id}: nothing was sent (--what-if)"
    return f"{result.repo_id} has all of it already: {result.url}" if result.empty else result.url


if __name__ == "__main__":
    sys.exit(main())
