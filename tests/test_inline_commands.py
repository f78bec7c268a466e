"""Commands in the sentences of the pages, and in blocks that no CPU can run, are read by the real parsers.

`tests/test_documentation.py` runs the blocks. Here nothing runs: a command, a flag, a value, a script, an
extra, a name or a path that does not exist any more is found.
"""

import argparse
import importlib.metadata
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT
from torch.distributed.run import get_args_parser as torchrun_parser

from flashkat_hf import cli
from flashkat_hf.inference import commands as inference
from flashkat_hf.training import commands as training
from flashkat_hf.training import recipe

FOLDERS = ("flashkat_hf", "examples", "model_cards")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/README.md")),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]
PROGRAMS = (
    "flashkat",
    "python",
    "make",
    "accelerate",
    "torchrun",
    "scripts/check",
    "pip",
    "hf",
    "mkdocs",
    "jupyter",
)
DENSE = ("examples/segment.py", "examples/detect.py")
OTHERS = {"--dependency", "--check"}  # of SLURM, and of a script without a parser


class Caught(Exception):
    """Carries the parser that a program was about to use."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def parser_of(program: Callable[[], Any]) -> argparse.ArgumentParser:
    """Return the first parser that a program parses with; the program goes no further."""

    def catch(parser, *_, **__):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
        patch.setattr(sys, "argv", ["program"])
        try:
            program()
        except Caught as caught:
            return caught.parser
    raise AssertionError("the program parses nothing")


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


@cache
def flashkat() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    parsers = subparsers(parser_of(lambda: cli.main([])))
    for name in ("finetune", "pretrain"):
        parsers[name] = parser_of(lambda name=name: recipe.parse([], name))
    parsers["evaluate"] = parser_of(lambda: training._evaluation_options([]))
    for name in ("predict", "embed"):
        parsers[name] = parser_of(lambda name=name: inference._options(name, []))
    return parsers


@cache
def script(path: str) -> argparse.ArgumentParser:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / path).parent))
        own = parser_of(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"))
    if path not in DENSE:
        return own
    parents = [own, parser_of(lambda: recipe.parse([]))]  # further flags are those of `flashkat finetune`
    return argparse.ArgumentParser(parents=parents, add_help=False, conflict_handler="resolve")


@cache
def module(name: str) -> argparse.ArgumentParser:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.delitem(sys.modules, f"{name}.__main__", raising=False)  # imported by another test
        return parser_of(lambda: runpy.run_module(name, run_name="__main__"))


@cache
def known_flags() -> set[str]:
    """Return the flags of our commands, the launchers and every script that a page names."""
    parsers = [*flashkat().values(), launch_command_parser(), torchrun_parser()]
    parsers += [script(path) for path in (*DENSE, "examples/demo/app.py", "benchmarks/bench_model.py")]
    parsers += [module("benchmarks.paper")]
    return {flag for parser in parsers for flag in parser._option_string_actions} | OTHERS


def parse_words(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Parse words that may lack arguments, or have NAMES as values; return those that are not known."""
    names = [word for word in words if re.fullmatch("[A-Z_]+", word)]
    kept = [
        (action, action.required, action.nargs, action.type, action.choices) for action in parser._actions
    ]
    for action, _, nargs, kind, choices in kept:
        action.required = False
        if nargs is None:
            action.nargs = "?"
        if kind and names:
            action.type = None
        if choices is not None:
            action.choices = [*choices, *names]
    try:
        return parser.parse_known_args(words)[1]
    except (SystemExit, ValueError) as error:
        raise AssertionError(f"{shlex.join(words)}: {error}") from None
    finally:
        for action, *before in kept:
            action.required, action.nargs, action.type, action.choices = before


def check_words(words: list[str], parser: argparse.ArgumentParser) -> None:
    unknown = parse_words(words, parser)
    assert not unknown, f"{shlex.join(words)}: {unknown} unknown"


def check_command(command: str) -> None:
    """Raise AssertionError if a command has something that does not exist."""
    command = re.sub(r'"?\$[A-Z_]+"?', "1", command)
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    while words and re.match("[A-Z_]+=", words[0]):
        del words[0]
    if not words:
        return
    program, rest = words[0], words[1:]
    if program == "srun":
        check_command(words[-1].removeprefix("exec "))
    elif program == "flashkat":
        check_flashkat(rest)
    elif program in ("accelerate", "torchrun"):
        check_launched(rest[1:] if program == "accelerate" else rest, program)
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        paths = [word.partition("::")[0] for word in rest[2:] if word.startswith("tests/")]
        assert [path for path in paths if not list(ROOT.glob(path))] == [], command
    elif program == "python" and rest[:1] == ["-m"]:
        check_words(rest[2:], module(rest[1]))
    elif program == "python" and rest and rest[0] != "out/run.py":  # that one `flashkat export` writes
        check_script(rest[0], rest[1:])
    elif program == "make":
        options = ["make", "--dry-run", *rest]
        done = subprocess.run(options, cwd=ROOT, capture_output=True, text=True, check=False)
        assert not rest or done.returncode == 0, done.stderr
    elif program == "scripts/check":
        assert rest[:1] in ([], *([part] for part in ("lint", "demo", "tests", "gpu"))), command
    elif program == "pip":
        extras = {extra for word in rest for extra in re.findall(r"\[(.*)\]", word)}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        known = project["optional-dependencies"].keys() | {"..."}
        assert {name for names in extras for name in names.split(",")} <= known, command
    else:
        scripts = {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}
        assert program in scripts, command


def check_flashkat(words: list[str]) -> None:
    if words and words[0] != "COMMAND":
        assert words[0] in flashkat(), f"there is no flashkat {words[0]}"
        check_words([word for word in words[1:] if word != "--help"], flashkat()[words[0]])


def check_launched(words: list[str], program: str) -> None:
    """Check what a launcher is told, and what it launches."""
    if not words:
        return
    if program == "accelerate":
        options = launch_command_parser().parse_args(words)
        assert (options.module, options.training_script) == (True, "flashkat_hf") or not options.module
        launched, target = options.training_script_args, options.training_script
    else:
        options = torchrun_parser().parse_args([word for word in words if word != "-m"])
        launched, target = options.training_script_args, options.training_script
    if target == "flashkat_hf":
        check_flashkat(launched)
    else:
        check_script(target, launched)


def check_script(path: str, words: list[str]) -> None:
    assert (ROOT / path).is_file(), f"there is no {path}"
    text = (ROOT / path).read_text()
    if called := re.search(r"main\(\[\"(\w+)\", \*sys.argv", text):
        check_words(words, flashkat()[called[1]])
    elif "read_flags" in text:  # flags of the example's own, and the settings of a run
        check_words(parse_words(words, script(path)), flashkat()["finetune"])
    elif "ArgumentParser" in text:
        check_words(words, script(path))
    else:
        assert [word for word in words if word not in text] == [], path


def sentences(page: Path) -> str:
    """Return a page without its blocks; of a notebook the cells of text."""
    text = re.sub("^`.*`$", "", page.read_text(), flags=re.MULTILINE)  # messages, in troubleshooting
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub("^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def codes(page: Path) -> Iterator[str]:
    """Yield what stands as code in a page's sentences."""
    for _, code in re.findall(r"(?<!`)(`+)([^`].*?)\1(?!`)", sentences(page), flags=re.DOTALL):
        yield " ".join(code.split())


def inline(page: Path) -> Iterator[str]:
    """Yield the commands and flags in a page's sentences."""
    for code in codes(page):
        code = code.removeprefix("TRITON_INTERPRET=1 ")
        if code.startswith("--") or (code.split(" ")[0] in PROGRAMS and code != "python"):
            yield code


def not_run(page: Path) -> Iterator[str]:
    """Yield the commands of blocks that are marked as not to be run, and of blocks in folders' READMEs."""
    runs = page.suffix == ".md" and (page.parent == ROOT or ROOT / "docs" in page.parents)
    mark = r"^<!--- skip: next \".*\" -->\n" if runs else ""
    for block in re.findall(f"{mark}^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.split(" ")[0] not in (
                "export",
                "cp",
                "apt-get",
                ".venv/bin/pre-commit",
            ) and not line.startswith("#"):
                yield line


def test_there_are_commands_in_sentences():
    assert sum(len(list(inline(page))) for page in PAGES) > 150


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_and_paths_that_there_are(page):
    """`flashkat_hf.some.name` can be imported, and `benchmarks/file.py` is a file of the repository."""
    for code in codes(page):
        if re.fullmatch(r"flashkat_hf(\.\w+)+(\(.*\))?", code):
            pkgutil.resolve_name(code.partition("(")[0])
        elif re.fullmatch(r"(flashkat_hf|tests|docs|benchmarks|examples|scripts)/[\w./*:]+", code):
            assert list(ROOT.glob(code.partition("::")[0].rstrip("/"))), f"there is no {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_not_run(page):
    for code in inline(page):
        if code.startswith("--"):
            flags = [word.rstrip(":;,") for word in code.split() if re.match("--[a-z]", word)]
            flags = [flag.partition("=")[0] for flag in flags]
            assert [flag for flag in flags if flag not in known_flags()] == [], code
        else:
            check_command(code)
    for line in not_run(page):
        check_command(line)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("flashkat fine-tune", "there is no flashkat fine-tune"),
        ("flashkat plot MODEL --picture a.png", "--picture"),
        ("flashkat plot MODEL --theme blue", "blue"),
        ("flashkat finetune --epochs many", "many"),
        ("accelerate launch -m flashkat_hf pretrain --sizes small", "--sizes"),
        ("torchrun --nproc_per_node 2 -m flashkat_hf evaluate MODEL --batches 3", "--batches"),
        ("python examples/demo/app.py --ports 1", "--ports"),
        ("python examples/finetune.py --dat photos", "--dat"),
        ("python examples/segment.py --twin false --learn 1", "--learn"),
        ("python benchmarks/render.py --checks", "benchmarks/render.py"),
        ("python examples/train.py", "there is no examples/train.py"),
        ("python -m pytest tests/test_nothing.py", "test_nothing"),
        ("make demonstration", "demonstration"),
        ("scripts/check style", "style"),
        ("pip install 'flashkat_hf[training]'", "training"),
        ("mkdoc serve", "mkdoc"),
    ],
)
def test_what_does_not_exist_is_found(command, problem):
    with pytest.raises(AssertionError, match=problem):
        check_command(command)
