"""The options of `plot`, `functions` and `explain`, whose code in `commands.py` needs PyTorch."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .names import check_model_name

SUFFIXES = (".png", ".svg", ".html")  # of pictures
FORMATS = ("table", "latex", "json", "sympy", "numpy", "c")  # of formulas


def add_commands(commands, make_opener: Callable[[], Any]) -> None:
    """Add `plot`, `functions` and `explain` to a parser's commands.

    Args:
        commands: argparse's sub-parsers.
        make_opener: makes the `commands.Opener` with which a command opens images, when it runs.
    """

    def run(name: str, *suffixes: str) -> Callable[[argparse.Namespace], str]:
        def command(options: argparse.Namespace) -> str:
            for model in (options.model, getattr(options, "compare", None)):
                if model is not None:
                    check_model_name(model)
            if getattr(options, "simplify", None) is not None:
                _check_simplify(options)
            if options.output is not None:
                options.output = _output(options, suffixes)
            opener = make_opener()
            from . import commands as ours

            return getattr(ours, name)(options, opener)

        return command

    text = "draw the learned functions over the inputs that they meet"
    parser = commands.add_parser("plot", help=text, description=text)
    _add_model(parser, f"picture to write: {', '.join(SUFFIXES)}", required=True)
    parser.add_argument("--compare", metavar="OTHER", help="draw another checkpoint's functions over them")
    parser.add_argument(
        "--what", choices=("value", "slope"), default="value", help="the functions or their slopes"
    )
    parser.add_argument(
        "--theme", choices=("light", "dark"), help="default: light; a page follows its reader's"
    )
    parser.add_argument("--size", choices=("screen", "column"), default="screen", help="column: of a paper")
    parser.set_defaults(run=run("plot", *SUFFIXES))

    text = "write the learned functions as formulas, or replace them by simpler ones"
    parser = commands.add_parser("functions", help=text, description=text)
    _add_model(parser, "file to write; with --simplify the folder of the simplified model", required=False)
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    parser.add_argument("--digits", type=int, default=4, metavar="N", help="of the table's numbers; 17: all")
    parser.add_argument(
        "--simplify",
        type=float,
        metavar="TOL",
        help="replace each function by the simplest within TOL of its output's spread, such as 0.05",
    )
    parser.set_defaults(run=run("functions"))

    text = "draw what a prediction rests on: attention rollout and integrated gradients"
    parser = commands.add_parser("explain", help=text, description=text)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("image", help="file of an image")
    parser.add_argument("-o", "--output", required=True, help="picture to write: .png or .svg")
    parser.add_argument("--label", help="name or index of the label to explain; default: the most probable")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.set_defaults(run=run("explain", ".png", ".svg"))


def _add_model(parser: argparse.ArgumentParser, output: str, required: bool) -> None:
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("-o", "--output", required=required, help=output)
    parser.add_argument(
        "--images", metavar="FOLDER", help="measure the inputs on these, or on scikit-learn's digits (digits)"
    )
    parser.add_argument("--layer", type=int, metavar="N", help="only this layer")
    parser.add_argument("--group", type=int, metavar="G", help="only this group of channels")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")


def _check_simplify(options: argparse.Namespace) -> None:
    if not options.simplify > 0:
        raise ValueError(f"--simplify {options.simplify:g}: the tolerance must be positive")
    for name in ("images", "output"):
        if not getattr(options, name):
            raise ValueError(f"--simplify needs --{name}")
    for name in ("layer", "group"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} has no meaning with --simplify")


def _output(options: argparse.Namespace, suffixes: tuple[str, ...] = ()) -> Path:
    """Return the path to write to.

    Raises:
        ValueError: it exists and `--overwrite` is not given, its folder does not, or it ends otherwise.
    """
    output = Path(options.output)
    if suffixes and output.suffix.lower() not in suffixes:
        raise ValueError(f"{output} must end with {', '.join(suffixes)}")
    if output.exists() and not options.overwrite:
        raise ValueError(f"{output} exists; --overwrite replaces it")
    if output.exists() and output.is_dir() != (getattr(options, "simplify", None) is not None):
        raise ValueError(f"{output} is {'a' if output.is_dir() else 'no'} folder")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output.parent} is not a folder")
    return output
