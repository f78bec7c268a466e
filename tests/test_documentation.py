"""What README and docs tell a reader to do is done here: each block of Python or commands, on a micro model.

A block that cannot run on a CPU without the network has the reason in the line above it, which the page does
not show: `<!--- skip: next "needs a GPU" -->`. In the commands, a run ends after two updates.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from helpers import timm_vit
from PIL import Image
from safetensors.torch import save_file
from small_runs import make_images

from flashkat_hf.cli import main
from flashkat_hf.training.recipe import Settings

sybil = pytest.importorskip("sybil")
from sybil import Document, Example  # noqa: E402
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
REASONS = ("needs a GPU", "needs the network", "run by", "needs a terminal", "a part of", "needs a cluster")
WITH_BLOCKS = [page for page in PAGES if re.search("^```(bash|python)", page.read_text(), re.MULTILINE)]
RUN, SHOWN = {"bash", "python"}, {"text", "json", "yaml", "html", "c", "latex", "markdown"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Return a folder with all that the pages' commands name: photos, a picture, checkpoints, a ViT."""
    folder = tmp_path_factory.mktemp("pages")
    make_images(folder / "photos", train=40)
    Image.open(folder / "photos/val/red/0.png").resize((64, 48)).save(folder / "picture.png")
    Image.open(folder / "picture.png").save(folder / "picture.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        two_updates(patch)
        patch.chdir(folder)
        assert main(["finetune"]) == 0
    reset()
    for name in ("SMALL_IMAGES", "ICONS", "FOLDER"):
        shutil.copytree(folder / "photos", folder / name)
    shutil.copytree(folder / "runs/digits/best", folder / "CHECKPOINT")
    torch.manual_seed(0)
    save_file(timm_vit().state_dict(), folder / "vit.safetensors")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch, hub, _one_run) -> Iterator[Path]:
    """Go to a copy of `prepared`, beside a Hub of our own where we are alice."""
    folder = shutil.copytree(prepared, tmp_path / "work", symlinks=True)
    two_updates(monkeypatch)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield folder
    reset()


def two_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run end after two updates, whatever its settings say."""
    after_init = Settings.__post_init__

    def shortened(settings) -> None:
        settings.max_steps, settings.workers = 2, 0
        after_init(settings)

    monkeypatch.setattr(Settings, "__post_init__", shortened)


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def parsed(page: Path, bash=None) -> Document:
    """Return a page with its blocks of Python and commands, and the marks of those that are not to run."""
    evaluate = bash or (lambda example: None)
    parsers = PythonCodeBlockParser(), CodeBlockParser("bash", evaluate), SkipParser()
    return Document.parse(str(page), *parsers)


def evaluate(examples: Iterable[Example]) -> list[str]:
    """Run the blocks of a page in their order; return the reasons of those that are not to run."""
    reasons = []
    for example in examples:
        try:
            example.evaluate()
        except SkipTest as reason:
            reasons.append(str(reason))
    return reasons


def run_commands(example: Example) -> None:
    """Run the lines of a block one after the other, in this process."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            run_command([word.replace("YOU/", "alice/") for word in words], line)
            reset()


def run_command(words: list[str], line: str) -> None:
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert (launch.module, launch.training_script) == (True, "flashkat_hf"), line
        words = ["flashkat", *launch.training_script_args]
    if words == ["flashkat", "finetune"]:
        shutil.rmtree("runs/digits")  # the page means a reader who has none yet
    if words[0] == "flashkat":
        assert main(words[1:]) == 0, line
    elif words[0] == "python" and words[1].endswith(".py"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        raise ValueError(f"{line}: nothing here runs {words[0]}; mark the block with the reason")


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(page, workspace):
    """Each block runs, or says why it cannot; blocks of one page share their names."""
    document = parsed(page, run_commands)
    wrong = [reason for reason in evaluate(document.examples()) if not reason.startswith(REASONS)]
    assert not wrong, f"say {', '.join(REASONS)}; not {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_says_what_it_is(page):
    """A block without a language would be run by nobody."""
    fences = [line for line in page.read_text().splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0
    languages = {fence.removeprefix("```").split()[0] if fence != "```" else "" for fence in fences[::2]}
    assert languages <= RUN | SHOWN, page


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/api/functions/index.html").read_text()
    assert "model_functions" in reference  # with its docstring, which mkdocstrings reads off the source
    assert "what the model is called with" in reference


def test_what_is_wrong_in_a_page_is_found(tmp_path, workspace):
    def failure(text: str) -> str:
        page = tmp_path / "page.md"
        page.write_text(text)
        with pytest.raises((AssertionError, ValueError, NameError)) as caught:
            evaluate(parsed(page, run_commands).examples())
        return str(caught.value)

    assert "flashkat info nowhere" in failure("```bash\nflashkat info nowhere/best\n```\n")
    assert "nothing here runs rm" in failure("```bash\nrm -r runs  # all of them\n```\n")
    assert "is not defined" in failure("```python\nprint(undefined)\n```\n")
