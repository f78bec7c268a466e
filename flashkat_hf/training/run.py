"""A training run from its settings to its folder: the checks before it begins, and the parts put together."""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.utils import logging

from ..files import read_json
from ..messages import warn
from .defaults import complete, facts
from .feed import Feed
from .initial_model import build_model
from .launch import check_launch
from .optimization import seed_update
from .plan import resolve
from .prepared_model import PreparedModel
from .processes import StopSignals
from .recipe import Settings
from .run_folder import RunFolder
from .run_log import describe_data
from .selection import select
from .state import Checkpoints
from .task import ImageClassification, Task, check_unused
from .trainer import Trainer


def train(
    settings: Settings,
    on_model: Callable[[Path], None] | None = None,
    build: Callable[[Settings, list[str]], tuple[nn.Module, Any]] | None = None,
    task: Task | None = None,
) -> dict[str, Any] | None:
    """Train, and leave the folder `settings.output`; the settings stay as they are.

    Args:
        settings: the run.
        on_model: called in the main process with best/ or last/ each time that it has been written and is
            complete; by default pushes best/ to `settings.push_to`.
        build: makes another model of settings and class names, and its image processor.
        task: what is learned of each image; default: its class.

    Returns:
        The summary, in the main process; None if the run was complete before.

    Raises:
        ValueError: in one line, for settings, data or a model that do not serve, before the model is built
            where that can be; a loss that is not finite.
        OSError: something cannot be written; earlier checkpoints and models are as they were.
        SystemExit: with 143 or 130, after SIGTERM or Ctrl-C, when the state is saved.
    """
    logging.disable_progress_bar()  # of writing small files
    task = task or ImageClassification()
    check_unused(task, settings)
    if missing := [name for name in settings.trackers if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--trackers: {missing[0]} is missing: pip install {missing[0]}")
    if settings.film and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--film needs matplotlib: pip install 'flashkat_hf[train]'")
    accelerator = make_accelerator(settings)
    folder = RunFolder(settings.output)
    with folder.claimed(settings, accelerator):
        return _train(settings, accelerator, folder, on_model, build or build_model, task)


def _train(
    settings: Settings,
    accelerator: Accelerator,
    folder: RunFolder,
    on_model: Callable[[Path], None] | None,
    build: Callable[[Settings, list[str]], tuple[nn.Module, Any]],
    task: Task,
) -> dict[str, Any] | None:
    main, started = accelerator.is_main_process, time.monotonic()
    if settings.batch_size:
        resolve(settings, accelerator)  # refuses what cannot be shared out, before the data are read
    data = task.open_data(settings, accelerator.process_index, accelerator.num_processes)
    if not isinstance(task, ImageClassification):
        settings = settings.fixed()  # what the rule knows is about classes
    data, selection = select(settings, data)
    settings, reasons = complete(settings, facts(settings, data, accelerator))
    num_images = data.train.num_images
    if num_images is not None and num_images < settings.batch_size:
        raise ValueError(f"--batch_size: {settings.batch_size} is more than the {num_images} training images")
    if main:
        print(describe_data(settings, data), *reasons, selection.reason, sep="\n", flush=True)
    resuming = settings.resume and folder.settings.exists()
    if settings.time and resuming:
        settings = folder.with_epochs(settings)
    plan = resolve(settings, accelerator, selection, data)
    checkpoints = Checkpoints(folder.checkpoints, settings.keep_checkpoints)
    earlier = folder.compare(plan.describe(data)) if resuming else {}
    if resuming and folder.summary.exists():
        if main and not (settings.keep_after_success or earlier.get("keep_after_success")):
            checkpoints.remove()  # a kill came before the run could
        warn(f"{folder.path} is complete; nothing is left to do")
        return None
    accelerator.wait_for_everyone()  # until every process has checked
    pushes = settings.push_to and main and not on_model
    with _pushing(settings, folder) if pushes else nullcontext(on_model) as on_model:
        seed_update(settings.seed, 2**31, 0)  # weights: alike in every process, and as no update
        network, processor = build(plan.settings, data.class_names)
        outputs = getattr(getattr(network, "config", None), "num_labels", len(data.class_names))
        if outputs != len(data.class_names):
            raise ValueError(f"the model has {outputs} outputs, but the data {len(data.class_names)} classes")
        model = PreparedModel(plan, accelerator, network, processor)
        feed = Feed(plan, accelerator, data, processor, task)
        parts = (data, model, feed, folder, checkpoints, StopSignals(), on_model, task)
        trainer = Trainer(plan, accelerator, *parts)
        small = settings.size == "micro" and isinstance(task, ImageClassification)
        if accelerator.device.type == "cpu" and small:
            torch.set_num_threads(1)  # more gain little on such small products, and lose much on busy cores
        if plan.settings.epochs is None:
            trainer.choose_epochs(started)
        if main:
            folder.repair()
            if not resuming:
                folder.start(plan.describe(data), settings.overwrite)
            if not folder.pictures:
                warn("matplotlib is missing, so the run leaves no curves.png and functions.png")
        accelerator.wait_for_everyone()
        with trainer.signals, closing(feed):
            return trainer.run(checkpoints.newest() if resuming else None)


@contextmanager
def _pushing(settings: Settings, folder: RunFolder) -> Iterator[Callable[[Path], None]]:
    """Push each best/ to a branch while training, and the last one to main; warn of what was not pushed."""
    from ..hub.background import BackgroundPusher

    pusher = BackgroundPusher(str(settings.push_to), private=settings.push_private or None)

    def submit(path: Path) -> None:
        if path == folder.best:
            pusher.submit(path, f"Best model after {read_json(path / 'summary.json')['epochs']} epochs")

    unsent: list[str] = []
    try:
        yield submit
        unsent = pusher.finish(folder.best, "Upload the best model")
    except BaseException:  # stopped, and not to be held up
        unsent = pusher.finish(None, "", patience=0.0)
        raise
    finally:
        for line in unsent:
            warn(line)


def make_accelerator(settings: Settings) -> Accelerator:
    """Return accelerate's, in the precision of the settings, of `accelerate launch`, or bfloat16 on a GPU.

    Raises:
        ValueError: the precision, or another setting of accelerate's, is not supported.
    """
    cpu = without_accelerator()  # said aloud: otherwise accelerate does not see torchrun's other processes
    check_launch(settings, cpu)
    gpu = cast(torch.device, PartialState(cpu=cpu).device).type == "cuda"
    told = os.environ.get("ACCELERATE_MIXED_PRECISION")
    precision = settings.precision or (told or "no").lower()
    if precision not in ("no", "bf16"):
        raise ValueError(f"--precision: {precision} is not supported, no or bf16 are")
    if settings.precision is None and gpu and torch.cuda.is_bf16_supported():
        if told and precision == "no" and PartialState().is_main_process:  # its default, too
            warn("accelerate says mixed_precision no, its default: this is bf16; --precision no is float32")
        precision = "bf16"
    if gpu:
        torch.set_float32_matmul_precision("high")
    project = ProjectConfiguration(str(settings.output), logging_dir=str(settings.output / "logs"))
    trackers: list = list(settings.trackers)
    uncompiled = TorchDynamoPlugin(backend=cast(Any, "no"))  # the plan compiles, as accelerate was told
    options: dict[str, Any] = {"log_with": trackers or None, "dynamo_plugin": uncompiled}
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, project_config=project, **options)
    if accelerator.is_fsdp2:
        # As without FSDP2, autocast alone decides what is computed in bfloat16: accelerate's policy would
        # round coefficients, norms, the loss and the sums of gradients, too.
        cast(Any, accelerator.state.fsdp_plugin).mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator


def without_accelerator() -> bool:
    """Return True if training is on the CPU, because it was told to or has nothing else."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
