"""The folder of a run.

What may be in it, when it may be replaced or gone on with, metrics, summary and pictures.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import nn

from ..data.samples import Examples, ImageData, open_image
from ..files import replacing, restore, to_json, write_text
from ..model.layers import GroupRational
from .recipe import FREE, Settings
from .state import os_errors

CONTENTS = frozenset(
    {
        *("settings.json", "metrics.jsonl", "summary.json", "curves.png", "functions.png"),
        *("best", "last", "samples", "checkpoints", "logs"),
    }
)


class RunFolder:
    """The output of a run, all that is in `CONTENTS`; `docs/training.md` says what each is.

    Args:
        path: the folder.

    Only the main process writes, except checkpoints.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints, self.metrics = path / "checkpoints", path / "metrics.jsonl"
        self.best, self.last = path / "best", path / "last"
        self.pictures = importlib.util.find_spec("matplotlib") is not None

    def check(self, settings: Settings) -> None:
        """Whether the run may have this folder.

        Raises:
            ValueError: it exists and is not to be resumed or overwritten, holds what others wrote, or cannot
                be made.
        """
        path = self.path
        if not os.path.lexists(path):
            home = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
            if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
                raise ValueError(
                    f"--output: {path} cannot be made, {home} is not a folder that can be written to"
                )
            return
        if not path.is_dir():
            raise ValueError(f"--output: {path} exists and is not a folder; name another")
        names = {child.name for child in path.iterdir()}
        if not names:
            return
        if not settings.resume and not settings.overwrite:
            raise ValueError(
                f"--output: {path} exists; --resume goes on with it, --overwrite replaces it, or name another"
            )
        if "settings.json" not in names:
            raise ValueError(f"--output: {path} exists and holds no run of this script; name another")
        if others := sorted(name for name in names - CONTENTS if not name.startswith(".")):
            raise ValueError(
                f"--output: {path} also holds what others wrote: {', '.join(others)}; move it or name another"
            )
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"--output: {path} cannot be written to")

    def start(self, about: dict[str, Any], overwrite: bool) -> None:
        """Make the folder, or empty that of an earlier run, and note the settings.

        Raises:
            OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for child in self.path.iterdir():
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        write_text(self.path / "settings.json", to_json(about))
        self.metrics.write_text("")

    def compare(self, about: dict[str, Any]) -> dict[str, Any]:
        """Whether a resumed run is the same run; returns what was noted of it when it began.

        Raises:
            ValueError: a setting that can change the result, the data or the number of processes differs;
                names all.
        """
        path = self.path / "settings.json"
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"--resume: cannot read {path}: {error}") from error
        about = json.loads(json.dumps(about))
        names = [name for name in {**before, **about} if name not in FREE]
        if "data_fingerprint" in names and before.get("data_fingerprint") != about["data_fingerprint"]:
            raise ValueError(
                f"--resume: {self.path} was trained on other data than {about['data'] or 'the digits'}"
            )
        if differ := [name for name in names if before.get(name) != about.get(name)]:
            texts = [f"{name} was {before.get(name)} and is {about.get(name)}" for name in differ]
            raise ValueError(f"--resume: {self.path} was made with other settings: {', '.join(texts)}")
        return before

    def log(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def write_model(self, name: str, save: Callable[[Path], None], summary: dict[str, Any]) -> None:
        """Replace best/ or last/ by a complete folder.

        Args:
            name: "best" or "last".
            save: writes model and image processor into the folder that it is given.
            summary: of this model.
        """
        with replacing(self.path / name) as folder, os_errors():
            save(folder)
            (folder / "summary.json").write_text(to_json(summary))

    def write_samples(self, data: ImageData) -> None:
        """For the digits: one held-out image of each class."""
        if isinstance(data.test, Examples) and isinstance(data.test.images[0], Image):
            (self.path / "samples").mkdir(exist_ok=True)
            for label, name in enumerate(data.class_names):
                index = list(data.test.labels).index(label)
                open_image(data.test.images[index]).save(self.path / "samples" / f"{name}_{index}.png")

    def repair(self) -> None:
        """Put right what a kill left half-done."""
        for folder in (self.best, self.last):
            restore(folder)

    def draw(self, model: nn.Module) -> None:
        """curves.png and functions.png, where matplotlib is installed."""
        if self.pictures:
            from ..checkpoints.figures import plot_curves, plot_functions

            plot_curves(self.lines()).savefig(self.path / "curves.png")
            if any(isinstance(module, GroupRational) for module in model.modules()):
                plot_functions(model).savefig(self.path / "functions.png")
