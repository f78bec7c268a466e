"""Measure the throughput of FlashKAT beside timm's ViT of the same size: training step and inference.

It runs on a GPU or a CPU.

A training step is forward, cross-entropy, backward and fused AdamW on synthetic images, under bfloat16
autocast on a GPU and in float32 on a CPU; inference has bfloat16 weights on a GPU. The providers take turns,
so what else the machine does meets them alike. A result is one JSON line with the machine, the versions and
the commit; its images per second are those of the turns' 10th percentile (`p10_ms`), `ms` is their median.

On a GPU a turn is `--turn` steps in a row between two events, behind one step that is not timed: the GPU
never waits for the host to launch the next step, as in training. What the host takes for one call shows
with one image: inference at batch size 1 is timed call by call on the host's clock, each waited for. On a
CPU, too, each step is timed alone.

What docs/performance.md shows, on a GPU; each command adds its lines, so that one can be repeated or left
out:

    R=benchmarks/results
    python benchmarks/bench_model.py --append --output $R/model.jsonl --modes compiled
    python benchmarks/bench_model.py --append --output $R/model.jsonl --modes eager
    python benchmarks/bench_model.py --append --output $R/inference.jsonl --task inference --batch_sizes 256

Every cell of size, image size and batch size, in every mode, beside both ViTs; compiling costs half a minute
a cell and model. Several of these programs may run side by side (`--lock`):

    C="--append --turn 3 --turns 12 --modes eager graphs compiled"
    python benchmarks/bench_model.py $C --output $R/cells.jsonl --batch_sizes 1 8 32 64 512 \
        --image_sizes 224 384 --providers flashkat_hf "timm ViT" "transformers ViT"
    python benchmarks/bench_model.py $C --output $R/cells_inference.jsonl --task inference \
        --batch_sizes 1 8 32 256 --providers flashkat_hf "timm ViT" "transformers ViT"

The original code, from clones (`peers.py`); KAT runs at 32 images at most, since a step of it takes that
long:

    python benchmarks/bench_model.py --append --output $R/model.jsonl --peer PATH \
        --providers "FlashKAT, original"
    python benchmarks/bench_model.py --append --output $R/model.jsonl --peer PATH \
        --providers "KAT, original" --modes eager --turn 1 --turns 3

Compiling takes most of the time, on one core. With `--lock FILE` several of these programs, and of
`profile_step.py`, run side by side on one GPU: they make their steps together and time them alone, one
program after the other.

On a CPU:

    python benchmarks/bench_model.py --device cpu --sizes tiny --batch_sizes 8 --output $R/cpu_train.jsonl
    python benchmarks/bench_model.py --device cpu --sizes tiny --batch_sizes 8 --task inference \
        --output $R/cpu_inference.jsonl
"""

import fcntl
import json
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

import numpy
import peers
import timm
import torch
from torch.nn.functional import cross_entropy
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.model.modeling_flashkat import FlashKATPatchProjection

BATCH_SIZES = {"tiny": 1024, "small": 512, "base": 256}  # training step on a GPU
LARGEST_BATCH = {peers.KAT: 32}
COMPILED, REPLAYED = "compiled", "graphs"
MODES = ("eager", COMPILED, REPLAYED, f"{COMPILED} {REPLAYED}")
LABELS, PATCH_SIZE, WARM_UP = 1000, 16, 4


class Logits(torch.nn.Module):
    """A transformers classifier with timm's calling convention."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def flashkat(size: str, image_size: int) -> torch.nn.Module:
    config = FlashKATConfig.from_size(size, num_labels=LABELS, image_size=image_size)
    return Logits(FlashKATForImageClassification(config))


def vit(size: str, image_size: int) -> torch.nn.Module:
    return timm.create_model(f"vit_{size}_patch16_224", num_classes=LABELS, img_size=image_size)


def vit_matrix_patches(size: str, image_size: int) -> torch.nn.Module:
    """Build a ViT that computes the patch embedding as ours does, as a matrix product."""
    model = vit(size, image_size)
    convolution = model.patch_embed.proj
    model.patch_embed.proj = FlashKATPatchProjection(
        3, convolution.out_channels, kernel_size=PATCH_SIZE, stride=PATCH_SIZE
    )
    return model


def transformers_vit(size: str, image_size: int) -> torch.nn.Module:
    width = {"tiny": 192, "small": 384, "base": 768}[size]
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    return Logits(ViTForImageClassification(ViTConfig(**shape, num_labels=LABELS, image_size=image_size)))


PROVIDERS = {
    "flashkat_hf": flashkat,
    "timm ViT": vit,
    "timm ViT, matrix-product patches": vit_matrix_patches,
    "transformers ViT": transformers_vit,
}


@dataclass(frozen=True, kw_only=True)
class Provided:
    """Settings that say what is measured, where, and where the results go."""

    output: Path = field(metadata={"help": "JSON lines are written here"})
    append: bool = field(default=False, metadata={"help": "add to the output file instead of starting it"})
    providers: list[str] | None = field(
        default=None, metadata={"help": "; ".join([*PROVIDERS, *peers.SOURCES]) + "; default: all there are"}
    )
    peer: Path | None = field(
        default=None, metadata={"help": "folder with clones of the original repositories"}
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu"}
    )
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})
    lock: Path | None = field(
        default=None, metadata={"help": "file that programs side by side take turns by"}
    )

    def __post_init__(self):
        refuse(self.device not in ("cuda", "cpu"), f"--device: {self.device!r} is neither cuda nor cpu")
        refuse(self.device == "cuda" and not torch.cuda.is_available(), "--device: there is no GPU")
        unknown = set(self.providers or ()) - {*PROVIDERS, *peers.SOURCES}
        refuse(unknown, f"--providers: {'; '.join(sorted(unknown))} unknown; see --help")
        missing = [name for name in self.providers or () if name not in self.makers()]
        refuse(missing, f"--providers: {'; '.join(missing)} needs --peer")
        refuse(self.output.is_dir(), f"--output: {self.output} is a folder")
        full = self.output.exists() and self.output.stat().st_size
        refuse(full and not self.append, f"--output: {self.output} exists; --append adds to it")
        originals = [name for name in self.chosen() if name in peers.SOURCES]
        refuse(originals and self.device == "cpu", "--peer: the original kernels need a GPU")
        for name in originals:
            peers.load(self.peer, name)

    def makers(self) -> dict[str, Callable[[str, int], torch.nn.Module]]:
        """Return functions of size and image size, by provider; the originals only with --peer."""
        originals = peers.SOURCES if self.peer is not None else ()
        return PROVIDERS | {
            name: partial(peers.make, self.peer, name, num_labels=LABELS) for name in originals
        }

    def chosen(self) -> list[str]:
        return self.providers or list(self.makers())


@dataclass(frozen=True, kw_only=True)
class Settings(Provided):
    task: Literal["train", "inference"] = field(default="train", metadata={"help": "what a step is"})
    sizes: list[str] = field(
        default_factory=lambda: list(BATCH_SIZES), metadata={"help": ", ".join(BATCH_SIZES)}
    )
    modes: list[str] = field(
        default_factory=lambda: ["compiled", "eager"], metadata={"help": ", ".join(MODES)}
    )
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "default: by the model's size"})
    image_sizes: list[int] = field(default_factory=lambda: [224], metadata={"help": "pixels"})
    turn: int | None = field(
        default=None, metadata={"help": "steps of a turn; default: 5 on a GPU, 1 on a CPU"}
    )
    turns: int | None = field(
        default=None, metadata={"help": "of each provider; default: 12 on a GPU, 20 on a CPU"}
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_unknown("--sizes", self.sizes, BATCH_SIZES)
        refuse_unknown("--modes", self.modes, MODES)
        for name, value in (("turn", self.turn), ("turns", self.turns)):
            refuse(value is not None and value < 1, f"--{name}: {value} must be at least 1")
        wrong = [batch_size for batch_size in self.batch_sizes or () if batch_size < 1]
        refuse(wrong, f"--batch_sizes: {wrong} must be at least 1")
        wrong = [pixels for pixels in self.image_sizes if pixels < 1 or pixels % PATCH_SIZE]
        refuse(wrong, f"--image_sizes: {wrong} must be positive multiples of {PATCH_SIZE}")
        originals = [name for name in self.chosen() if name in peers.SOURCES]
        problem = "computes in float32, but inference here has bfloat16 weights"
        refuse(originals and self.task == "inference", f"--providers: {'; '.join(originals)} {problem}")


def refuse(condition: object, message: str) -> None:
    if condition:
        raise SystemExit(message)


def refuse_unknown(option: str, values: list[str], known: Collection[str]) -> None:
    unknown = sorted(set(values) - set(known))
    refuse(unknown, f"{option}: {', '.join(unknown)} unknown; known are {', '.join(known)}")


def about(settings: Provided) -> dict[str, str | None]:
    """Return what every result says of the machine, the versions and the code."""
    gpu = settings.device == "cuda"
    if gpu:
        import triton
    try:
        commit = settings.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"--commit: git does not tell it ({error})") from error
    return {
        "machine": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "precision": "bfloat16" if gpu else "float32",
        "torch": torch.__version__,
        "triton": triton.__version__ if gpu else None,
        "timm": timm.__version__,
        "commit": commit,
    }


@contextmanager
def results_file(settings: Provided) -> Iterator[Callable[[dict], None]]:
    """Give a function that writes a result, with `about` the machine, and shows it; lines survive a kill."""
    facts = about(settings)
    try:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        lines = settings.output.open("a")
    except OSError as error:
        raise SystemExit(f"--output: cannot write {settings.output}: {error.strerror}") from error

    def write(result: dict) -> None:
        print(json.dumps(result), flush=True)
        lines.write(json.dumps(result | facts) + "\n")
        lines.flush()

    with lines:
        yield write


@contextmanager
def beside_others(settings: Provided) -> Iterator[None]:
    """Hold the lock that lets other programs make a step, but not time one."""
    with locked(settings.lock, fcntl.LOCK_SH):
        yield


@contextmanager
def alone(settings: Provided) -> Iterator[None]:
    """Hold the lock that lets other programs wait while a step is timed."""
    with locked(settings.lock, fcntl.LOCK_EX):
        yield


@contextmanager
def locked(path: Path | None, operation: int) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("w") as file:
        with path.with_name(f"{path.name}.next").open("w") as queue:  # who waits to be alone lets none past
            fcntl.flock(queue, fcntl.LOCK_EX)
            fcntl.flock(file, operation)
        yield


def make_step(
    model: torch.nn.Module, task: str, mode: str, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Return a function that makes one step and returns the loss or the logits."""
    gpu = images.is_cuda
    if task == "inference" and gpu:
        model, images = model.bfloat16(), images.bfloat16()
    model.train(task == "train")
    run = torch.compile(model) if COMPILED in mode else model
    if task == "inference":
        infer = torch.no_grad()(lambda: run(images))
        return replayed(infer) if REPLAYED in mode else infer
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True, capturable=gpu)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return replayed(step) if REPLAYED in mode else step


def replayed(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a whole step as one CUDA graph: forward, backward and the optimiser."""
    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    torch._C._cuda_clearCublasWorkspaces()  # of the warm-up: the graph has one of its own
    with torch.cuda.graph(graph):
        outcome = step()

    def replay(keep: object = step) -> torch.Tensor:
        graph.replay()
        return outcome

    return replay  # it keeps the step, whose weights are where the graph expects them


def warm_step(
    make: Callable[[str, int], torch.nn.Module],
    task: str,
    size: str,
    mode: str,
    batch_size: int,
    image_size: int,
    device: str,
) -> Callable[[], torch.Tensor]:
    """Return a step that has compiled and allocated what it needs, and whose outcome is finite."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    labels = torch.randint(LABELS, (batch_size,), device=device)
    step = make_step(make(size, image_size).to(device), task, mode, images, labels)
    for _ in range(WARM_UP):
        outcome = step()
    refuse(not outcome.isfinite().all(), "the step gives numbers that are not finite")
    return step


def together(step: Callable[[], torch.Tensor], turn: int) -> list[float]:
    """Milliseconds of one step on the GPU: the mean over `turn` of them in a row, behind queued work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    start.record()
    for _ in range(turn):
        step()
    end.record()
    end.synchronize()
    return [start.elapsed_time(end) / turn]


def one_by_one(step: Callable[[], torch.Tensor], turn: int, gpu: bool) -> list[float]:
    """Milliseconds of each of `turn` steps on the host's clock, from the call until its result is there."""
    wait = torch.cuda.synchronize if gpu else lambda: None
    times = []
    for _ in range(turn):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measure(settings: Settings, size: str, mode: str, image_size: int, batch_size: int) -> list[dict]:
    """Time the providers in turns, and return one result for each."""
    gpu = settings.device == "cuda"
    torch.compiler.reset()
    makers, steps, peaks, batches = settings.makers(), {}, {}, {}
    with beside_others(settings):
        for provider in settings.chosen():
            if gpu:
                torch._C._cuda_clearCublasWorkspaces()  # each provider allocates, and counts, its own
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            batches[provider] = min(batch_size, LARGEST_BATCH.get(provider, batch_size))
            case = settings.task, size, mode, batches[provider], image_size, settings.device
            try:
                steps[provider] = warm_step(makers[provider], *case)
            except (torch.OutOfMemoryError, SystemExit) as error:
                raise SystemExit(
                    f"{provider}, {', '.join(map(str, case))}: {str(error).splitlines()[0]}"
                ) from error
            peaks[provider] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2) if gpu else None
    single = not gpu or (settings.task, batch_size) == ("inference", 1)
    turn, turns = settings.turn or (5 if gpu else 1), settings.turns or (12 if gpu else 20)
    times: dict[str, list[float]] = {provider: [] for provider in steps}
    with alone(settings):
        for _ in range(turns):
            for provider, step in steps.items():
                times[provider] += one_by_one(step, turn, gpu) if single else together(step, turn)
    return [
        {
            "provider": provider,
            "task": settings.task,
            "size": size,
            "mode": mode,
            "batch_size": batches[provider],
            "image_size": image_size,
            "images_per_s": round(batches[provider] / p10 * 1e3, 1),
            "ms": round(median(samples), 3),
            "p10_ms": round(p10, 3),
            "spread": round((max(samples) - min(samples)) / median(samples), 3),
            "peak_gib": peaks[provider],
            "turn": 1 if single else turn,
        }
        for provider, samples in times.items()
        for p10 in (float(numpy.percentile(samples, 10)),)
    ]


def main(settings: Settings) -> None:
    torch.set_float32_matmul_precision("high")
    cases = product(settings.sizes, settings.modes, settings.image_sizes)
    with results_file(settings) as write:
        for size, mode, image_size in cases:
            for batch_size in settings.batch_sizes or [BATCH_SIZES[size]]:
                for result in measure(settings, size, mode, image_size, batch_size):
                    write(result)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
