"""A training run from its settings to its folder.

What is checked before it begins, and on which devices it runs.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from torch import nn
from transformers.utils import logging

from ..data.samples import Examples
from ..data.sources import open_data
from ..hub.background import BackgroundPusher
from ..messages import warn
from .processes import StopSignals
from .recipe import DATA, Settings
from .run_folder import RunFolder
from .state import Checkpoints
from .trainer import Trainer


def train(
    settings: Settings,
    on_model: Callable[[Path], None] | None = None,
    build: Callable[[Settings, list[str]], tuple[nn.Module, Any]] | None = None,
) -> dict[str, Any] | None:
    """Train, and leave the folder `settings.output`.

    Args:
        settings: the run.
        on_model: called in the main process with best/ or last/ each time that it has been written and is
            complete; by default pushes best/ to `settings.push_to`.
        build: makes another model of settings and class names, and its image processor; default:
            `build_model`.

    Returns:
        What summary.json says, in the main process. None if the run was complete before.

    Raises:
        ValueError: in one line, for settings, data or a model that do not serve, before the model is built
            where that can be; a loss that is not finite.
        OSError: something cannot be written; earlier checkpoints and models are as they were.
        SystemExit: with 143 or 130, after SIGTERM or Ctrl-C, when the state is saved.
    """
    logging.disable_progress_bar()  # of writing small files
    folder = RunFolder(settings.output or Path("runs"))
    folder.check(settings)
    if missing := [name for name in settings.trackers if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--trackers: {missing[0]} is missing: pip install {missing[0]}")
    accelerator = make_accelerator(settings)
    micro_batch, accumulate = settings.micro_batches(accelerator.num_processes)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    options = {name: getattr(settings, name) for name in DATA if getattr(settings, name)}
    data = open_data(settings.data, **ranks, **options)
    if data.train.num_images is not None and data.train.num_images < settings.batch_size:
        raise ValueError(
            f"--batch_size: {settings.batch_size} is more than the {data.train.num_images} training images"
        )
    settings.augmentation = settings.augmentation.resolved(accelerator.device, settings.in_memory)
    compiled = accelerator.device.type == "cuda" if settings.compile is None else settings.compile
    readers = None
    if not isinstance(data.train, Examples):  # a stream, whose order follows from them
        readers = max(1, min(settings.worker_processes(), data.train.most_workers(accelerator.num_processes)))
    about = settings.to_dict() | {
        "precision": accelerator.mixed_precision,
        "compile": compiled,
        "micro_batch": micro_batch,
        "num_processes": accelerator.num_processes,
        "stream_workers": readers,
        "class_names": data.class_names,
        "data_fingerprint": data.fingerprint,
    }
    going_on = settings.resume and (folder.path / "settings.json").exists()
    before = folder.compare(about) if going_on else {}
    if going_on and (folder.path / "summary.json").exists():
        kept = settings.keep_after_success or before.get("keep_after_success")
        if accelerator.is_main_process and not kept:  # a kill came before the run could
            Checkpoints(folder.checkpoints, settings.keep_checkpoints).remove()
        warn(f"{folder.path} is complete; nothing is left to do")
        return None
    accelerator.wait_for_everyone()  # until every process has checked
    pushes = settings.push_to and accelerator.is_main_process and not on_model
    with _pushing(settings, folder) if pushes else nullcontext(on_model) as on_model:
        trainer = Trainer(
            settings, accelerator, folder, data, micro_batch, accumulate, compiled, on_model, build
        )
        if accelerator.is_main_process:
            folder.repair()
            if not going_on:
                folder.start(about, settings.overwrite)
            if not folder.pictures:
                warn("matplotlib is missing, so the run leaves no curves.png and functions.png")
        accelerator.wait_for_everyone()
        if accelerator.device.type == "cpu" and settings.size == "micro":
            torch.set_num_threads(
                1
            )  # two cores gain little on such small products, and lose much when others use them
        with StopSignals() as signals:
            return trainer.run(signals, going_on)


@contextmanager
def _pushing(settings: Settings, folder: RunFolder) -> Iterator[Callable[[Path], None]]:
    """Pushes each best/ to a branch while training, and the last one to main; says what was not pushed."""
    pusher = BackgroundPusher(str(settings.push_to), private=settings.push_private or None)

    def submit(path: Path) -> None:
        if path == folder.best:
            pusher.submit(
                path, f"Best model after {json.loads((path / 'summary.json').read_text())['epochs']} epochs"
            )

    left: list[str] = []
    try:
        yield submit
        left = pusher.finish(folder.best, "Upload the best model")
    except BaseException:  # stopped, and not to be held up
        left = pusher.finish(None, "", patience=0.0)
        raise
    finally:
        for line in left:
            warn(line)


def make_accelerator(settings: Settings) -> Accelerator:
    """accelerate's, in the precision of the settings, of `accelerate launch`, or bfloat16 on a GPU.

    Raises:
        ValueError: the device does not have the precision.
    """
    cpu = without_accelerator()  # said aloud: otherwise accelerate does not see torchrun's other processes
    gpu = cast(torch.device, PartialState(cpu=cpu).device).type == "cuda"
    precision = settings.precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        raise ValueError(f"--precision: {precision} is not supported, no or bf16 are")
    if settings.precision is None and gpu and torch.cuda.is_bf16_supported():
        precision = "bf16"
    if gpu:
        torch.set_float32_matmul_precision("high")
    output = settings.output or Path("runs")
    project = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs"))
    trackers: list = list(settings.trackers)
    return Accelerator(mixed_precision=precision, cpu=cpu, log_with=trackers or None, project_config=project)


def without_accelerator() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
