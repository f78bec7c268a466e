"""Several runs of training beside each other on one device, each update as one CUDA graph.

All of an update is on the device: the batch is picked by a counter out of the epoch's pictures, the learning
rate out of the schedule, the loss is written to its place. So a graph of it, captured once, is the whole run,
and the host only replays. Runs have a stream each: models as small as these do not fill a GPU alone. On a CPU
the same updates run one after the other.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import timm.optim
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flashkat_hf.messages import warn

from .contenders import CONTENDERS, groups, num_parameters
from .pictures import Pictures

WEIGHT_DECAY, BETAS, SMOOTHING, WARM_UP = 0.05, (0.9, 0.98), 0.1, 0.05  # WARM_UP: a part of the updates
WARM_STEPS = 3  # updates before a capture, undone afterwards
EVALUATED = 2000  # pictures of a batch of the test
DIVERGED = 1.05  # a mean loss of the last epoch of so many times that of guessing
TIMED_UPDATES, TIMED_TURNS = 100, 5


@dataclass(frozen=True)
class Task:
    """One run: a contender, its seed, and how long and how fast it learns."""

    contender: str
    seed: int
    rate: float  # highest learning rate
    updates: int
    batch_size: int


@dataclass
class Run:
    """A model in training."""

    task: Task
    model: nn.Module
    pictures: Pictures
    device: str
    epoch: int = 0
    losses: Tensor = field(init=False)
    replay: Callable[[], None] = field(init=False)

    def __post_init__(self):
        task, device = self.task, self.device
        contender = CONTENDERS[task.contender]
        self.model.to(device).train()
        self.precision = contender.precision or ("bfloat16" if device == "cuda" else "float32")
        self.half = getattr(torch, self.precision)
        self.scaler = torch.amp.GradScaler(device, enabled=self.half == torch.float16)  # pyright: ignore[reportPrivateImportUsage]
        self.per_epoch = len(self.pictures.train) // task.batch_size
        parameters = groups(self.model, task.contender, task.rate, WEIGHT_DECAY)
        rates = schedule(parameters, task.updates)
        self.rates = [torch.tensor(column, device=device) for column in rates]
        for group in parameters:
            group["lr"] = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            parameters, betas=BETAS, fused=True, capturable=device == "cuda", weight_decay=WEIGHT_DECAY
        )
        self.losses = torch.zeros(task.updates, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = torch.arange(task.batch_size, device=device)
        count = self.per_epoch * task.batch_size
        self.images = torch.zeros(count, 1, *self.pictures.train.shape[1:], device=device)
        self.labels = torch.zeros(count, dtype=torch.int64, device=device)
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def beside(self) -> contextlib.AbstractContextManager:
        """Return the context in which this run's work goes to its own stream."""
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device, self.half, enabled=self.half != torch.float32):
            outputs = self.model(images)
        return getattr(outputs, "logits", outputs).float()

    def update(self) -> None:
        """Train on the next batch; nothing of it waits for the device."""
        rows = self.rows + self.step % self.per_epoch * len(self.rows)
        for group, rates in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"].copy_(rates.index_select(0, self.step).squeeze(0))
        logits = self.logits(self.images.index_select(0, rows))
        loss = cross_entropy(logits, self.labels.index_select(0, rows), label_smoothing=SMOOTHING)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.index_copy_(0, self.step, loss.detach().view(1))
        self.step += 1

    def prepare(self) -> None:
        """Capture the update on a GPU; where that fails its kernels are launched one by one."""
        if self.stream is None:
            return
        self.next_epoch()
        start = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.stream.wait_stream(torch.cuda.current_stream())
        with self.beside():
            for _ in range(WARM_STEPS):
                self.step.zero_()
                self.update()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.update()
            self.graph = graph
        except RuntimeError as error:
            warn(f"{self.task.contender}: no CUDA graph ({str(error).splitlines()[0]}); launching kernels")
        torch.cuda.synchronize()
        self.undo(start)
        torch.cuda.synchronize()

    @torch.no_grad()
    def undo(self, start: Sequence[Tensor]) -> None:
        """Put everything back to where it stood before the first update."""
        for parameter, value in zip(self.model.parameters(), start, strict=True):
            parameter.copy_(value)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        if self.scaler.is_enabled():  # the warm updates may have halved the scale
            self.scaler.update(torch.tensor(2.0**16, device=self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.step.zero_()
        self.losses.zero_()
        self.epoch = 0

    def next_epoch(self) -> None:
        images, labels = self.pictures.epoch(self.task.seed, self.epoch)
        self.images.copy_(images[: len(self.images)])
        self.labels.copy_(labels[: len(self.labels)])
        self.epoch += 1

    def advance(self) -> None:
        """Make one update."""
        self.graph.replay() if self.graph else self.update()

    @torch.no_grad()
    def result(self) -> dict:
        """Return what became of the run; the only look at the test pictures."""
        self.model.eval()
        right, logits = 0, []
        for first in range(0, len(self.pictures.test), EVALUATED):
            part = slice(first, first + EVALUATED)
            logits = self.logits(self.pictures.normalised(self.pictures.test[part]))
            right += int((logits.argmax(-1) == self.pictures.test_labels[part]).sum())
        accuracy = right / len(self.pictures.test)
        last = self.losses[-self.per_epoch :].double().cpu()
        guessing = math.log(self.pictures.sizes["num_labels"])  # the loss of equal probabilities
        diverged = not last.mean().item() <= DIVERGED * guessing  # NaN is
        return {
            "accuracy": accuracy,
            "train_loss": None if diverged else round(last.mean().item(), 5),
            "diverged": diverged,
            "parameters": num_parameters(self.model),
            "run_precision": self.precision,
            "updates": self.task.updates,
            "batch_size": self.task.batch_size,
            "rate": self.task.rate,
            "graph": self.graph is not None,
        }


def schedule(parameters: Sequence[Mapping], updates: int) -> list[list[float]]:
    """Return the learning rates of each parameter group at each update: timm's cosine after a warm-up."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in parameters]
    plain = [
        {"params": [weight], "lr": group["lr"]} for weight, group in zip(weights, parameters, strict=True)
    ]
    optimizer = timm.optim.create_optimizer_v2(plain, opt="sgd", lr=1.0, weight_decay=0.0)
    warm = max(1, round(WARM_UP * updates))
    cosine = CosineLRScheduler(
        optimizer, t_initial=updates, warmup_t=warm, warmup_lr_init=0.0, t_in_epochs=False
    )
    columns: list[list[float]] = [[] for _ in parameters]
    for update in range(updates):
        cosine.step_update(update + 1 if update < warm else update)  # the first update moves, too
        for column, group in zip(columns, optimizer.param_groups, strict=True):
            column.append(float(group["lr"]))
    return columns


class OutOfTime(Exception):
    """The runs under way do not end before the time that was given."""


def train(runs: Sequence[Run], deadline: float | None = None) -> None:
    """Train runs of equally many updates beside each other.

    Raises:
        OutOfTime: the deadline, in seconds of `time.monotonic`, has come.
    """
    for run in runs:
        run.prepare()
    most = max(run.task.updates for run in runs)
    for update in range(most):
        for run in runs:
            if update < run.task.updates:
                with run.beside():
                    if update % run.per_epoch == 0:
                        run.next_epoch()
                    run.advance()
        if update % runs[0].per_epoch == 0:
            if runs[0].stream:
                torch.cuda.synchronize()
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTime
    if runs[0].stream:
        torch.cuda.synchronize()


def step_milliseconds(run: Run) -> list[float]:
    """Return the time of an update of a run that is alone on its device, several times."""
    run.prepare()
    with run.beside():
        run.next_epoch()
    times = []
    count = min(TIMED_UPDATES, run.task.updates // (TIMED_TURNS + 1))
    for _ in range(TIMED_TURNS + 1):
        start = time.perf_counter()
        for _ in range(count):
            with run.beside():
                run.advance()
        if run.stream:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / count)
    return times[1:]
