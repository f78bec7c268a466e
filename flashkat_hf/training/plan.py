"""The plan of a run: all that follows from its settings and devices, decided before anything is built."""

import copy
import os
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator, DistributedType

from ..data.gpu.shifting import held_size
from ..data.samples import Examples, ImageData
from .defaults import model_config
from .launch import accumulation, dynamo
from .recipe import Settings
from .selection import Selection
from .speed import cores

ON_THE_TEST_IMAGES = Selection("test", "")


@dataclass(frozen=True)
class Plan:
    """The decisions of a run; its settings are a copy of the caller's, the augmentation's "auto" decided."""

    settings: Settings
    num_processes: int
    precision: str  # "no" or "bf16"
    micro_batch: int  # images of a process at a time
    accumulate: int  # micro-batches of an update, in each process
    workers: int  # processes that read images, for each process
    sharded: bool  # the weights are spread over the processes (FSDP)
    compiled: bool  # the training pass goes through torch.compile
    compile_mode: str | None  # of torch.compile; None is its default
    replicated: bool  # on GPUs, each of which has all the weights
    graphed: bool  # updates are replayed as CUDA graphs
    selection: Selection = ON_THE_TEST_IMAGES  # how the best epoch is chosen

    def describe(self, data: ImageData) -> dict[str, Any]:
        """Return what settings.json says of a run: settings, decisions, and which data it has."""
        stream_workers = None
        if not isinstance(data.train, Examples):  # a stream's order follows from them
            stream_workers = max(1, min(self.workers, data.train.most_workers(self.num_processes)))
        return self.settings.to_dict() | {
            "precision": self.precision,
            "selection": self.selection.kind,
            "compile": self.compiled,
            "micro_batch": self.micro_batch,
            "num_processes": self.num_processes,
            "stream_workers": stream_workers,
            "class_names": data.class_names,
            "data_fingerprint": data.fingerprint,
        }


def resolve(
    settings: Settings,
    accelerator: Accelerator,
    selection: Selection = ON_THE_TEST_IMAGES,
    data: ImageData | None = None,
) -> Plan:
    """Return the plan of a run, if its batches can be shared out; the settings stay as they are.

    Without data, which are not read yet, it says nothing of what depends on them.
    """
    micro_batch, accumulate = micro_batches(settings, accelerator.num_processes, accumulation())
    told, mode = dynamo()
    kinds = DistributedType.NO, DistributedType.MULTI_GPU
    replicated = accelerator.device.type == "cuda" and accelerator.distributed_type in kinds
    serve = replicated and not settings.gradient_checkpointing  # CUDA graphs
    compiled = settings.compile
    if compiled is None:
        compiled = told or (accelerator.device.type == "cuda" and not serve)
    if mode != "default" and not compiled:
        raise ValueError(
            f"accelerate's dynamo_mode {mode} is for a compiled run, which this is not; --compile true"
        )
    settings = copy.deepcopy(settings)
    num_bytes = 0
    if data is not None and not settings.augmentation.beside_shifts:
        num_bytes = held_bytes(settings, data)
    settings.augmentation = settings.augmentation.resolved(accelerator.device, settings.in_memory, num_bytes)
    return Plan(
        settings=settings,
        num_processes=accelerator.num_processes,
        precision=accelerator.mixed_precision,
        micro_batch=micro_batch,
        accumulate=accumulate,
        workers=worker_processes(settings),
        sharded=accelerator.distributed_type == DistributedType.FSDP,
        compiled=compiled,
        compile_mode=compile_mode(mode, serve and settings.cuda_graphs),
        replicated=replicated,
        graphed=serve and settings.cuda_graphs,
        selection=selection,
    )


def held_bytes(settings: Settings, data: ImageData) -> int | None:
    """Return the bytes of all training images at the model's size; None for a stream."""
    if not isinstance(data.train, Examples):
        return None
    size = settings.image_size
    if size is None:
        config = model_config(settings)
        size = config.image_size if config else 0
    height, width = held_size((size, size) if isinstance(size, int) else (size[0], size[1]))
    return 3 * height * width * len(data.train)


def micro_batches(settings: Settings, num_processes: int, told: int | None = None) -> tuple[int, int]:
    """Return the images of a process at a time, and how many such micro-batches an update accumulates.

    `told` is the latter number as accelerate was told it.

    Raises:
        ValueError: the batch cannot be shared out so, or mixing cannot pair its images.
    """
    batch_size = settings.batch_size
    micro_batch = settings.micro_batch or batch_size // (num_processes * (told or 1))
    if told and micro_batch * num_processes * told != batch_size:
        wanted = f"accelerate's gradient_accumulation_steps {told} on {num_processes} processes"
        raise ValueError(f"--batch_size: {batch_size} is not {wanted} with micro-batches of {micro_batch}")
    if not micro_batch or batch_size % (micro_batch * num_processes):
        share = f" with --micro_batch {micro_batch}" if settings.micro_batch else ""
        raise ValueError(
            f"--batch_size: {batch_size} cannot be shared out to {num_processes} processes{share}"
        )
    if (settings.mixup or settings.cutmix) and micro_batch % 2:
        raise ValueError(
            f"--micro_batch: mixing pairs images, so {micro_batch} of a device at a time must be even"
        )
    return micro_batch, batch_size // (micro_batch * num_processes)


def worker_processes(settings: Settings) -> int:
    """Return the number of processes that read images for each process; default: its share of the cores."""
    if settings.workers is not None:
        return settings.workers
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(1, max(0, share - 1)) if settings.in_memory else min(16, max(1, share))


def compile_mode(told: str, graphed: bool) -> str | None:
    """Return torch.compile's mode, without CUDA graphs of its own, for the mode that accelerate was told.

    Raises:
        ValueError: accelerate was told to use graphs where they do not serve.
    """
    if told == "reduce-overhead" and not graphed:
        raise ValueError(
            "accelerate's dynamo_mode reduce-overhead replays CUDA graphs, which need a GPU, no FSDP,"
            " no --gradient_checkpointing and --cuda_graphs true"
        )
    return "max-autotune-no-cudagraphs" if told == "max-autotune" else None
