"""The folder of a run: what is in it, whether a run may go on with another's, metrics and pictures."""

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL.Image import Image

from ..checkpoints.weights import fingerprint
from ..data.samples import Examples, ImageData, open_image
from ..files import read_json, replacing, restore, to_json, write_text
from .curves import plot_curves
from .defaults import complete_epochs
from .output import check_contents, check_place
from .recipe import FIELDS, FREE_NAMES, Settings
from .run_lock import NAME as LOCK
from .run_lock import locked
from .state import os_errors


class RunFolder:
    """The output of a run, what is in `output.CONTENTS`; only the main process writes, except checkpoints."""

    def __init__(self, path: Path):
        self.path = path
        self.settings = path / "settings.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.last = path / "last"
        self.pictures = importlib.util.find_spec("matplotlib") is not None

    @contextmanager
    def claimed(self, settings: Settings, accelerator: Accelerator) -> Iterator[None]:
        """Hold the folder for the run: no other one writes into it meanwhile; all processes take part.

        Raises:
            ValueError: it exists and is not to be resumed or overwritten, holds what others wrote, cannot be
                made, or another run is writing into it.
        """
        with ExitStack() as held:
            problem: list[Exception | None] = [None]
            if accelerator.is_main_process:
                try:
                    check_place(self.path)
                    held.enter_context(locked(self.path))
                    check_contents(settings)
                except (ValueError, OSError) as error:
                    problem = [error]
            broadcast_object_list(problem)
            if problem[0]:
                raise problem[0]
            yield

    def start(self, description: dict[str, Any], overwrite: bool) -> None:
        """Make the folder, or empty that of an earlier run, and write settings.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for child in self.path.iterdir():
                if child.name.startswith(LOCK):
                    continue
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        write_text(self.settings, to_json(description))
        self.metrics.write_text("")

    def with_epochs(self, settings: Settings) -> Settings:
        """Return settings with the epochs that the run to be resumed chose for its `--time`."""
        completed = copy.copy(settings)
        complete_epochs(completed, read_json(self.settings)["epochs"])
        return completed

    def compare(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return the settings.json of the run that is to be resumed, and refuse to resume another run.

        The data may have moved: their fingerprint says whether they are the same.

        Raises:
            ValueError: a setting that can change the result, the data or the number of processes differs;
                names all.
        """
        try:
            earlier = read_json(self.settings)
        except ValueError as error:
            raise ValueError(f"--resume: cannot read the run's settings: {error}") from error
        present = json.loads(json.dumps(description))
        earlier = {
            item.name: item.default for item in FIELDS
        } | earlier  # of a version that had fewer settings
        if earlier.get("data_fingerprint") != present["data_fingerprint"]:
            data = present["data"] or "these"
            raise ValueError(f"--resume: {self.path} was trained on other data than {data}")
        if changes := [
            f"{name} was {earlier.get(name)} and is {present.get(name)}"
            for name in {**earlier, **present}
            if name not in FREE_NAMES | {"data"} and earlier.get(name) != present.get(name)
        ]:
            raise ValueError(f"--resume: {self.path} was made with other settings: {', '.join(changes)}")
        return earlier

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def write_model(self, name: str, save: Callable[[Path], None], summary: dict[str, Any]) -> None:
        """Replace best/ or last/ by a complete folder, into which `save` writes model and image processor."""
        with replacing(self.path / name) as folder, os_errors():
            save(folder)
            write_summary(folder, summary)

    def write_samples(self, data: ImageData) -> None:
        """Write one held-out image of each class, if images with classes are in memory: the digits."""
        samples, test = self.path / "samples", data.test
        in_memory = isinstance(test, Examples) and isinstance(test.images[0], Image)
        if in_memory and isinstance(test.labels[0], int):
            samples.mkdir(exist_ok=True)
            for label, name in enumerate(data.class_names):
                index = list(test.labels).index(label)
                open_image(test.images[index]).save(samples / f"{name}_{index}.png")

    def repair(self) -> None:
        """Undo what a kill left half-done."""
        for folder in (self.best, self.last):
            restore(folder)

    def draw(self, rates: Sequence[tuple[int, float]], score: str, title: str) -> None:
        """Write curves.png, where matplotlib is installed; the rest as in `plot_curves`."""
        if self.pictures:
            plot_curves(self.lines(), rates, score, title).savefig(self.path / "curves.png")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json beside its weights, with their checksum: a card states its figures of no others."""
    write_text(folder / "summary.json", to_json(summary | {"weights_sha256": fingerprint(folder)}))
