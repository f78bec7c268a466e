"""Pictures of the learned functions while they are trained: to the trackers, and as a film."""

import io
import json
from contextlib import suppress
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.figures import plot_functions
from ..checkpoints.functions import model_functions
from ..checkpoints.functions_drawing import draw_functions
from ..checkpoints.functions_film import from_records, save_film, to_records
from ..data.augmentation import evaluation_transform
from ..data.samples import DataError, Examples, ImageData, open_image
from ..files import write_text
from ..messages import extra, one_line, warn
from ..model.layers import GroupRational, SimplifiedActivation
from .initial_model import merged
from .run_folder import RunFolder

NUM_IMAGES = 64  # held-out ones that the functions' inputs are measured on
BATCH_SIZE = 16
TAG = "functions"  # of the pictures in the trackers


class Pictures:
    """The pictures of one run, made in its main process: one at each epoch, and functions.gif at the end.

    The functions are noted in functions.jsonl, so that the film of a resumed run begins where the run did.
    """

    def __init__(
        self, accelerator: Accelerator, folder: RunFolder, data: ImageData, processor: Any, film: bool
    ):
        self.accelerator = accelerator
        self.notes = folder.path / "functions.jsonl" if film else None
        self.folder = folder
        self.data = data
        self.processor = processor
        self.batches: list[Tensor] | None = None  # until `_inputs`

    def wanted(self, model: nn.Module) -> bool:
        """Return True if a picture is to be made of each epoch; the same in all processes."""
        return bool(self.notes or self.accelerator.log_with) and self._possible(model)

    def _possible(self, model: nn.Module) -> bool:
        rationals = (isinstance(module, GroupRational | SimplifiedActivation) for module in model.modules())
        return self.folder.pictures and any(rationals)

    def begin(self, epoch: int) -> None:
        """Forget what an earlier run, or a part of this one that is done again, noted after an epoch."""
        if self.notes and self.accelerator.is_main_process:
            kept = [note for note in self._read() if note["epoch"] <= epoch] if epoch else []
            write_text(self.notes, "".join(json.dumps(note) + "\n" for note in kept))

    def add(self, model: nn.Module, epoch: int, step: int) -> None:
        """Note the functions of an epoch, and send their picture to the trackers; no failure ends the run."""
        if not self.accelerator.is_main_process:
            return
        try:
            functions = model_functions(merged(model), self._inputs())
        except ValueError as error:
            warn(f"no picture of the functions after epoch {epoch}: {one_line(error)}")
            return
        if self.notes:
            note = {"epoch": epoch, "step": step, "functions": to_records(functions)}
            with self.notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(note) + "\n")
        if self.accelerator.trackers:
            buffer = io.BytesIO()
            draw_functions(functions, title=f"epoch {epoch}").savefig(buffer, format="png", dpi=100)
            self._send(Image.open(buffer).convert("RGB"), step)

    def finish(self, model: nn.Module) -> None:
        """Write functions.png and, if a film is wanted, functions.gif, where matplotlib is installed."""
        if not self._possible(model):
            return
        plot_functions(merged(model), self._inputs()).savefig(self.folder.path / "functions.png")
        if self.notes and (notes := self._read()):
            frames = [(f"epoch {note['epoch']}", from_records(note["functions"])) for note in notes]
            save_film(self.folder.path / "functions.gif", frames)

    def _send(self, image: Image.Image, step: int) -> None:
        """Send a picture to each tracker, in the form that it takes."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({TAG: numpy.asarray(image)[None]}, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({TAG: [image]}, step)
            elif tracker.name == "trackio":
                tracker.log({TAG: extra("trackio", "trackers").Image(image)}, step)

    def _read(self) -> list[dict[str, Any]]:
        if self.notes is None or not self.notes.exists():
            return []
        return [json.loads(line) for line in self.notes.read_text(encoding="utf-8").splitlines()]

    def _inputs(self) -> list[Tensor] | None:
        """Return the held-out images, evenly spread, or None of a stream: noise stands for its images."""
        images = self.data.test
        if self.batches is None and isinstance(images, Examples):
            transform, count = evaluation_transform(self.processor), min(len(images), NUM_IMAGES)
            pixels = []
            for index in range(count):
                with suppress(DataError):  # evaluation names it, or leaves it out
                    pixels.append(transform(open_image(images[index * len(images) // count].image)))
            self.batches = list(torch.stack(pixels).split(BATCH_SIZE)) if pixels else None
        return self.batches
