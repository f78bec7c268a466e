"""Which runs there are, in the order of their value, and which of them the results file has already."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import mean, median

import transformers
from torch import nn

from flashkat_hf.messages import one_line, warn

from . import functions
from .contenders import (
    CONTENDERS,
    DISTILLED,
    GELU,
    PRECISIONS,
    PRIMARY,
    RATIONAL,
    SWIGLU,
    TIMED,
    UPCYCLED,
    VARIANTS,
    make,
    upcycled,
)
from .pictures import Pictures
from .settings import PILOT, STAGES, Settings, batch_size
from .training import OutOfTime, Run, Task, step_milliseconds, train

RATES = (1e-3, 2e-3, 4e-3)
FIRST_RATE_SEED, RATE_SEEDS = 100, 2
FIRST_PILOT_SEED, PILOT_SEEDS, PILOT_RATE = 200, 6, 2e-3
FAMILIES = {GELU: "gelu", SWIGLU: "swiglu", RATIONAL: "flashkat"}  # who stands for each
UPCYCLED_RATE = 0.25  # of GELU's
DESCRIBED = ("flashkat", "separate", "converted")
DESCRIBED_PICTURES = 2000
MARGIN = 1.15  # of a forecast


@dataclass
class Bench:
    """The runs of one data set on one machine, and their results."""

    settings: Settings
    pictures: Pictures
    machine: str
    write_line: Callable[[dict], None]
    rows: list[dict] = field(default_factory=list)  # of this place
    deadline: float | None = None
    seconds: float | None = None  # of an update of one run, lately
    failures: list[str] = field(default_factory=list)  # runs that ended by an error

    def __post_init__(self):
        data = self.pictures.name
        self.place = {
            "data": data,
            "pictures": len(self.pictures.train),
            "epochs": self.settings.epochs_of(data),
            "toy": self.settings.toy,
        }
        self.rows = [row for row in self.rows if in_place(row, self.place, self.machine)]
        self.batch_size = batch_size(self.settings, data)
        self.sizes = self.settings.sizes(self.pictures)
        self.updates = self.place["epochs"] * (len(self.pictures.train) // self.batch_size)

    def stage(self, name: str) -> None:
        """Run what is missing of a stage.

        Raises:
            OutOfTime: the deadline comes before the next runs end.
        """
        half = range((self.settings.seeds + 1) // 2)
        rest = range(len(half), self.settings.seeds)
        if name == PILOT:
            self.pilot()
        elif name == "rates":
            self.choose_rates()
        elif name == "primary":
            self.compare("parameters", PRIMARY, range(self.settings.seeds))
        elif name == "time":
            self.equal_time()
        else:
            for each in ("variants", "upcycled", "distilled", "precision") if name == "more" else (name,):
                self.half_stage(each, rest if name == "more" else half)

    def half_stage(self, name: str, seeds: range) -> None:
        if name == "variants":
            self.compare("parameters", VARIANTS, seeds)
        elif name == "upcycled":
            self.upcycle(seeds)
        elif name == "distilled":
            self.distill(seeds)
        else:
            self.compare("precision", PRECISIONS, seeds)

    def compare(self, part: str, names: Sequence[str], seeds: Iterable[int]) -> None:
        """Train contenders from scratch for equally many updates."""
        wanted = [self.task(name, seed) for seed, name in product(seeds, self.chosen(names))]
        self.train_missing(part, wanted)

    def chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.settings.contenders]

    def task(self, name: str, seed: int, rate: float | None = None, updates: int | None = None) -> Task:
        rate = self.rate(CONTENDERS[name].family) if rate is None else rate
        return Task(name, seed, rate, updates or self.updates, self.batch_size)

    def train_missing(
        self,
        part: str,
        tasks: Iterable[Task],
        build: Callable[[Task], nn.Module] | None = None,
        pictures: Pictures | None = None,
    ) -> list[Run]:
        """Train what the results do not have, some runs at a time, and return the last runs."""
        build = build or (lambda task: make(task.contender, task.seed, self.sizes))
        missing = [task for task in tasks if not self.has(part, task)]
        runs: list[Run] = []
        for block in blocks(missing, self.settings.together):
            self.check_time(sum(task.updates for task in block))
            try:
                runs = self.train_block(part, block, build, pictures)
            except (RuntimeError, ValueError) as error:
                warn(f"{part}: {', '.join(task.contender for task in block)}: {one_line(error)}; one by one")
                runs = []
                for task in block:
                    try:
                        runs += self.train_block(part, [task], build, pictures)
                    except (RuntimeError, ValueError) as error:
                        name = f"{part}, {task.contender}, seed {task.seed}"
                        self.failures.append(f"{name}: {one_line(error)}")
                        warn(f"failed: {self.failures[-1]}")
        return runs

    def train_block(
        self,
        part: str,
        block: Sequence[Task],
        build: Callable[[Task], nn.Module],
        pictures: Pictures | None,
    ) -> list[Run]:
        """Train some runs beside each other and write their results."""
        start = time.monotonic()
        runs = [Run(task, build(task), pictures or self.pictures, self.settings.device) for task in block]
        train(runs, self.deadline)
        wall = time.monotonic() - start
        self.seconds = wall / sum(task.updates for task in block)
        for run in runs:
            self.write(part, run, wall / len(block), len(block))
        return runs

    def check_time(self, updates: int) -> None:
        forecast = MARGIN * updates * (self.seconds or 0)
        if self.deadline is not None and time.monotonic() + forecast > self.deadline:
            raise OutOfTime

    def has(self, part: str, task: Task) -> bool:
        key = {"part": part, "contender": task.contender, "seed": task.seed}
        key |= {"rate": task.rate} if part == "rates" else {}
        return bool(self.found(**key))

    def found(self, **key) -> list[dict]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def write(self, part: str, run: Run, seconds: float, together: int) -> None:
        about = {"part": part, "contender": run.task.contender, "seed": run.task.seed, **self.place}
        about |= {"transformers": transformers.__version__, "seconds": round(seconds, 2)}
        row = about | run.result() | {"together": together}
        self.keep(row)
        if part in ("parameters", "upcycled") and run.task.contender in DESCRIBED and not row["diverged"]:
            images = run.pictures.normalised(run.pictures.train[:DESCRIBED_PICTURES])
            self.keep({**about, "part": "functions", "of": part} | functions.describe(run.model, images))

    def keep(self, row: dict) -> None:
        self.rows.append(row)
        self.write_line(row)

    def pilot(self) -> None:
        seeds = range(FIRST_PILOT_SEED, FIRST_PILOT_SEED + min(PILOT_SEEDS, self.settings.seeds))
        tasks = [self.task(name, seed, PILOT_RATE) for seed in seeds for name in ("gelu", "flashkat")]
        self.train_missing(PILOT, tasks)

    def choose_rates(self) -> None:
        """Train who stands for each family with each rate, and look at held-out training pictures."""
        held_out = self.pictures.with_held_out()
        updates = self.place["epochs"] * (len(held_out.train) // self.batch_size)
        seeds = range(FIRST_RATE_SEED, FIRST_RATE_SEED + RATE_SEEDS)
        tasks = [
            self.task(name, seed, rate, updates)
            for seed, rate, name in product(seeds, RATES, FAMILIES.values())
        ]
        self.train_missing("rates", tasks, pictures=held_out)

    def rate(self, family: str) -> float:
        """Return the learning rate of a family: the best on the held-out pictures, of equals the lowest.

        Raises:
            SystemExit: it has not been chosen yet.
        """
        rows = self.found(part="rates", contender=FAMILIES[family])
        means = {
            rate: mean(row["accuracy"] for row in rows if row["rate"] == rate)
            for rate in sorted({row["rate"] for row in rows})
        }
        if len(means) < len(RATES):
            raise SystemExit(
                f"no learning rate chosen for {family} on {self.place['data']}: --stages rates first"
            )
        return max(means, key=lambda rate: means[rate])

    def upcycle(self, seeds: Iterable[int]) -> None:
        """Train a ViT for half of the updates, then go on with it as it is and as a FlashKAT."""
        rate, half = self.rate(GELU), max(1, self.updates // 2)
        names = self.chosen(UPCYCLED)
        later = {
            seed: [self.task(name, seed, UPCYCLED_RATE * rate, self.updates - half) for name in names]
            for seed in seeds
        }
        missing = [seed for seed, tasks in later.items() if not all(self.has("upcycled", t) for t in tasks)]
        for block in blocks(missing, max(1, self.settings.together // max(1, len(names)))):
            self.rows = [  # a source is trained again where its followers are missing
                row for row in self.rows if not (row["part"] == "source" and row["seed"] in block)
            ]
            runs = self.train_missing("source", [self.task("gelu", seed, rate, half) for seed in block])
            sources = {run.task.seed: run.model.state_dict() for run in runs}
            self.train_missing(
                "upcycled",
                [task for seed in block if seed in sources for task in later[seed]],
                lambda task: upcycled(
                    task.contender,
                    {name: value.cpu().clone() for name, value in sources[task.seed].items()},  # noqa: B023
                    self.sizes,
                ),
            )

    def distill(self, seeds: Iterable[int]) -> None:
        learned = sorted(
            self.found(part="functions", of="parameters", contender="flashkat"), key=lambda row: row["seed"]
        )
        names = self.chosen(DISTILLED)
        if len(learned) < 2:
            if names:
                warn("distilled: needs two runs of flashkat (--stages primary); left out")
            return

        def build(task: Task) -> nn.Module:
            model = make(task.contender, task.seed, self.sizes)
            kind = CONTENDERS[task.contender].distilled
            functions.install(model, learned, str(kind), task.seed)
            return model

        self.train_missing(
            "distilled", [self.task(name, seed) for seed, name in product(seeds, names)], build
        )

    def equal_time(self) -> None:
        """Train for as many updates as fit into the time that the GELU ViT's take."""
        names = self.chosen(TIMED)
        for name in dict.fromkeys(["gelu", *names]):
            if not self.found(part="steps", contender=name):
                self.check_time(self.updates)
                task = replace(self.task(name, 0, RATES[0]), updates=max(self.updates, 12))
                run = Run(task, make(name, 0, self.sizes), self.pictures, self.settings.device)
                times = step_milliseconds(run)
                row = {"part": "steps", "contender": name, **self.place, "ms": round(median(times), 4)}
                row |= {"times": [round(each, 4) for each in times], "graph": run.graph is not None}
                self.keep(row | {"batch_size": self.batch_size})
        gelu = self.milliseconds("gelu")
        tasks = []
        for seed, name in product(range(self.settings.seeds), names):
            if name != "gelu" and (name in PRIMARY or seed < (self.settings.seeds + 1) // 2):
                updates = max(1, round(self.updates * gelu / self.milliseconds(name)))
                tasks.append(self.task(name, seed, updates=updates))
        self.train_missing("time", tasks)

    def milliseconds(self, name: str) -> float:
        return self.found(part="steps", contender=name)[-1]["ms"]


def blocks(items: list, size: int) -> list[list]:
    """Return runs of neighbours, `size` each but for the last."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def in_place(row: dict, place: dict, machine: str) -> bool:
    return row["machine"] == machine and all(row.get(name) == value for name, value in place.items())


def stages(settings: Settings) -> list[str]:
    """Return the stages that are asked for, in their order."""
    return [name for name in (PILOT, *STAGES) if name in settings.stages]
