"""The settings of a training run.

One dataclass, read from a YAML recipe and the command line, checked when made.
"""

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..data.augmentation import Augmentation
from .speed import cores

TRACKERS = ("tensorboard", "trackio", "wandb")
# What cannot change the weights; a resumed run may have other values.
FREE = frozenset(
    {
        *(
            "output",
            "resume",
            "overwrite",
            "workers",
            "cuda_graphs",
            "trackers",
            "log_steps",
            "skip_nonfinite",
        ),
        *("checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "keep_after_success"),
        *("push_to", "push_private"),
    }
)
DATA = (  # what `open_data` is told besides the source
    *("skip_corrupt", "streaming", "subset", "revision", "image_column", "label_column", "class_names"),
    *("train_split", "test_split", "train_size", "test_size", "shuffle_buffer"),
)
RANGES: tuple[tuple[tuple[str, ...], float, float], ...] = (  # at least, below
    (
        ("epochs", "max_steps", "batch_size", "micro_batch", "image_size", "log_steps", "evaluate_epochs"),
        1,
        math.inf,
    ),
    (("checkpoint_steps", "keep_checkpoints", "lora_rank"), 1, math.inf),
    (("train_size", "test_size", "shuffle_buffer"), 1, math.inf),
    (("checkpoint_minutes", "learning_rate", "eps", "clip_norm", "lora_alpha"), 1e-12, math.inf),
    (("weight_decay", "workers", "warmup_epochs", "warmup_learning_rate", "min_learning_rate"), 0, math.inf),
    (("mixup", "cutmix"), 0, math.inf),
    (("drop_path", "label_smoothing", "beta1", "beta2", "ema_decay"), 0, 1),
    (("mix_switch", "mix_probability", "layer_decay"), 0, 1 + 1e-12),
    (("seed",), 0, 2**31),
)


def setting(default: Any, text: str) -> Any:
    return HfArg(default=default, help=text)


@dataclass
class Settings:
    """What a run is made of. Names are the flags of the command line and the keys of a recipe.

    Raises:
        ValueError: a value is out of its range, or two contradict each other; the message has names and
            values.
    """

    # data and output
    data: str | None = setting(None, "image folder, data set or shards; default: scikit-learn's digits")
    skip_corrupt: bool = setting(False, "leave out images that cannot be read, and count them")
    streaming: bool = setting(False, "read a data set of the Hub as it comes, without downloading it first")
    subset: str | None = setting(None, "of a data set: name of the configuration")
    revision: str | None = setting(None, "of a data set on the Hub: branch, tag or commit")
    image_column: str | None = setting(None, "of a data set; default: found by its type")
    label_column: str | None = setting(None, "of a data set; default: found by its type")
    class_names: list[str] = field(
        default_factory=list, metadata={"help": "by index, where the data do not say"}
    )
    train_split: str | None = setting(None, "of a data set or shards; default: train")
    test_split: str | None = setting(None, "of a data set or shards; default: validation, val or test")
    train_size: int | None = setting(None, "images of a stream that does not know it")
    test_size: int | None = setting(None, "images of a stream that does not know it")
    shuffle_buffer: int = setting(1000, "images among which the shuffling of a stream draws, in each worker")
    workers: int | None = setting(
        None, "processes for each device that read images; default: as the data needs"
    )
    output: Path | None = setting(None, "folder of the run; default: runs/ and the data's name")  # noqa: RUF009
    resume: bool = setting(False, "go on from the newest complete checkpoint in the output, if there is one")
    overwrite: bool = setting(False, "replace an earlier run in the output")
    push_to: str | None = setting(
        None, "owner/name on the Hub for the best model; branch checkpoints while training"
    )
    push_private: bool = setting(False, "make that repository private, if it is new")
    # model
    model: str | None = setting(None, "FlashKAT folder or Hub id to start from; default: a fresh model")
    size: Literal["micro", "tiny", "small", "base"] | None = setting(None, "of a fresh model; default: tiny")
    image_size: int | None = setting(
        None, "height and width in pixels; default: the model's; positions follow"
    )
    head: Literal["auto", "fresh", "keep"] = setting(
        "auto", "of --model; auto: fresh where the labels differ"
    )
    drop_path: float = setting(0.0, "stochastic depth of the last block")
    freeze_backbone: bool = setting(False, "train the classifier only")
    lora_rank: int | None = setting(
        None, "train low-rank updates of the linear maps, and the rationals in full"
    )
    lora_alpha: float = setting(16.0, "scale of the low-rank updates, divided by their rank")
    gradient_checkpointing: bool = setting(False, "compute activations twice to save memory")
    # optimisation
    epochs: int = setting(50, "passes over the training images")
    max_steps: int | None = setting(None, "end after so many updates; the schedule stays that of all epochs")
    batch_size: int = setting(64, "images of one update, over all devices")
    micro_batch: int | None = setting(
        None, "images of a device at a time; default: the update's share in one go"
    )
    learning_rate: float | None = setting(
        None, "the highest; default: 1e-4 for --model, 3e-3 for a micro one, else 5e-4"
    )
    min_learning_rate: float = setting(0.0, "at the end of the cosine")
    warmup_epochs: float | None = setting(
        None, "in which the learning rate rises; default: a tenth, 5 at most"
    )
    warmup_learning_rate: float = setting(1e-5, "where it rises from")
    schedule: Literal["epoch", "update"] = setting("update", "when the learning rate changes")
    weight_decay: float = setting(0.05, "of matrices and rational coefficients")
    decay_coefficients: bool = setting(True, "decay the rational coefficients too, as the released weights")
    layer_decay: float | None = setting(
        None, "learning rate of a block as part of the next one's; default: all alike"
    )
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.999, "of AdamW")
    eps: float = setting(1e-8, "of AdamW")
    clip_norm: float | None = setting(None, "largest norm of the gradient; default: no clipping")
    mixup: float = setting(0.0, "alpha of mixup; 0: off")
    cutmix: float = setting(0.0, "alpha of cutmix; 0: off")
    mix_switch: float = setting(0.5, "probability of cutmix where both are on")
    mix_probability: float = setting(1.0, "probability that a batch is mixed at all")
    label_smoothing: float = setting(0.1, "part of each label that is spread over all")
    ema_decay: float | None = setting(
        None, "of averaged weights, evaluated beside the raw ones; default: none"
    )
    precision: Literal["no", "bf16"] | None = setting(None, "default: accelerate's, else bf16 on a GPU")
    compile: bool | None = setting(None, "torch.compile; default: on a GPU")
    cuda_graphs: bool = setting(
        True, "replay a compiled step where nothing is accumulated; takes more memory"
    )
    seed: int = setting(0, "of weights, order, augmentation, mixing and stochastic depth")
    # what is shown and kept
    evaluate_epochs: int = setting(1, "evaluate after so many epochs, and after the last")
    log_steps: int = setting(50, "updates between lines of metrics; reading the loss waits for the device")
    trackers: list[str] = field(
        default_factory=list, metadata={"help": f"accelerate's, beside metrics.jsonl: {', '.join(TRACKERS)}"}
    )
    checkpoint_steps: int | None = setting(None, "updates between checkpoints; default: by time")
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints")
    keep_checkpoints: int = setting(1, "older ones are removed when a new one is complete")
    keep_after_success: bool = setting(False, "keep checkpoints when the run is complete")
    skip_nonfinite: bool = setting(
        False, "skip updates whose loss or gradient is not finite, instead of stopping"
    )

    augmentation: Augmentation = field(default_factory=Augmentation, init=False)

    def __post_init__(self):
        for names, low, high in RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value < high:
                    limit = f" and at most {round(high)}" if high == 1 + 1e-12 else f" and below {high}"
                    raise ValueError(
                        f"--{name}: {value} must be at least {low:g}{'' if high == math.inf else limit}"
                    )
        if self.model is not None and self.size is not None:
            raise ValueError(
                f"--size: {self.size} is for a fresh model, but --model {self.model} has a size of its own"
            )
        if self.model is None and self.head != "auto":
            raise ValueError(f"--head: {self.head} is for --model; a fresh model has a fresh head")
        if self.freeze_backbone and self.lora_rank:
            raise ValueError(f"--freeze_backbone contradicts --lora_rank {self.lora_rank}")
        if self.warmup_epochs is None:
            self.warmup_epochs = min(5.0, self.epochs / 10)
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup_epochs: {self.warmup_epochs:g} must be below --epochs {self.epochs}")
        if self.resume and self.overwrite:
            raise ValueError("--resume contradicts --overwrite")
        if unknown := sorted(set(self.trackers) - set(TRACKERS)):
            raise ValueError(f"--trackers: {unknown[0]} is unknown; known: {', '.join(TRACKERS)}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"--batch_size: {self.batch_size} must be a multiple of --micro_batch {self.micro_batch}"
            )
        if self.output is None:
            self.output = Path("runs", self.data_name)
        if self.model is None and self.size is None:
            self.size = "tiny"
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.model else 3e-3 if self.size == "micro" else 5e-4

    @property
    def in_memory(self) -> bool:
        """Whether the images are there, so that nothing is read: the digits."""
        return self.data in (None, "digits")

    @property
    def data_name(self) -> str:
        """A word for the data, for file names."""
        if self.in_memory:
            return "digits"
        return Path(str(self.data)).resolve().name or "data"

    def to_dict(self) -> dict[str, Any]:
        """All of it, flat, as JSON takes it."""
        flat = asdict(self)
        flat.update(flat.pop("augmentation"))
        return {key: str(value) if isinstance(value, Path) else value for key, value in flat.items()}

    def micro_batches(self, num_processes: int) -> tuple[int, int]:
        """Images of a process at a time, and how many such an update accumulates.

        Raises:
            ValueError: the batch cannot be shared out so, or mixing cannot pair its images.
        """
        micro, rest = (self.micro_batch, 0) if self.micro_batch else divmod(self.batch_size, num_processes)
        if rest or self.batch_size % (micro * num_processes):
            share = f"{num_processes} processes" + (
                f" with --micro_batch {micro}" if self.micro_batch else ""
            )
            raise ValueError(f"--batch_size: {self.batch_size} cannot be shared out to {share}")
        if (self.mixup or self.cutmix) and micro % 2:
            raise ValueError(
                f"--micro_batch: mixing pairs images, so {micro} of a device at a time must be even"
            )
        return micro, self.batch_size // (micro * num_processes)

    def worker_processes(self) -> int:
        """How many of them read images for each process."""
        if self.workers is not None:
            return self.workers
        share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return min(1, max(0, share - 1)) if self.in_memory else min(16, max(1, share))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str], recipe: str, recipes: Path, description: str) -> Settings:
    """The settings of a command line; what it does not name comes from a recipe.

    Args:
        arguments: the command line, less the script. `--recipe` names a file, or one in `recipes` without its
            suffix.
        recipe: the recipe where it names none.
        recipes: folder of the named recipes.
        description: for `--help`.

    Raises:
        ValueError: in one line: an unknown recipe, key or flag, a value of the wrong type or out of range.
    """
    known = sorted(path.stem for path in recipes.glob("*.yaml"))
    parser = _Parser(Settings, description=description, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    parser.add_argument("--recipe", default=recipe, help=f"YAML file, or one of {', '.join(known)}")
    _add_augmentation(parser)
    named = parser.parse_known_args(list(arguments))[0]
    path = recipes / f"{named.recipe}.yaml" if named.recipe in known else Path(named.recipe)
    if not path.is_file():
        raise ValueError(f"--recipe: {named.recipe} is no file and none of {', '.join(known)}")
    given = read_recipe(path)
    if named.model:
        given.pop("size", None)  # of the fresh model that the recipe is for
    settings, others, unknown = parser.parse_args_into_dataclasses(
        [*_as_flags(given), *arguments], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}{_suggestion(unknown[0].lstrip('-'))}")
    settings.augmentation = Augmentation(
        **{item.name: getattr(others, item.name) for item in fields(Augmentation)}
    )
    return settings


def _add_augmentation(parser: HfArgumentParser) -> None:
    group = parser.add_argument_group("augmentation", "see flashkat_hf.augmentation.Augmentation")
    for item in fields(Augmentation):
        numbers, names = (
            isinstance(item.default, float | tuple),
            (f"--{item.name}", f"--{item.name.replace('_', '-')}"),
        )
        group.add_argument(
            *names,
            default=item.default,
            type=float if numbers else _text_or_none,
            nargs=len(item.default) if isinstance(item.default, tuple) else None,
        )


def _text_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe.

    Raises:
        ValueError: it is no YAML mapping, or has a key that is no setting; the message names it.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"yaml is missing: pip install 'flashkat_hf[train]' ({error})") from error
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, one setting a line")
    for name, value in values.items():
        if name not in NAMES:
            raise ValueError(f"{path}: {name} is no setting{_suggestion(str(name))}")
        if isinstance(value, dict) or (isinstance(value, list) and name not in LISTS):
            raise ValueError(f"{path}: {name} is one value, not {value}")
    return values


NAMES = [item.name for cls in (Settings, Augmentation) for item in fields(cls) if item.init]
LISTS = {
    item.name
    for cls in (Settings, Augmentation)
    for item in fields(cls)
    if item.default_factory is list or isinstance(item.default, tuple)
}


def _as_flags(values: dict[str, Any]) -> list[str]:
    """Values of a recipe as the command line would give them, so that both are checked alike."""
    flags = []
    for name, value in values.items():
        if value is None and name in {item.name for item in fields(Settings)}:
            continue  # the default
        if value != []:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, 1)
    return f"; perhaps {close[0]}" if close else ""
